"""DSpark in plain numpy, float32, one position at a time: a target whose layers all have ratio 0, and its drafter.

Written from the architecture's description, with nothing of the package but the configs: a model is {tensor name:
array}. `MISTAKES` are what an implementation may get wrong; `draft` makes one on demand, so that a test can see that it
would have noticed.
"""

from collections.abc import Mapping

import numpy as np

from ds4jax.config import DrafterConfig, ModelConfig

Model = Mapping[str, np.ndarray]

MISTAKES = (
    "anchor one early",  # the block stands at the last position that the target has run
    "anchor one late",
    "causal block",
    "normed taps",
    "layers one on",  # ids counted by another convention
    "slot 0 dropped",  # the first draft taken for the anchor's own position
    "context one short",  # the oldest of the 128 rows is not seen
    "context through hc",  # a context row made as a block row is, with attn_norm
    "normed confidence",
    "main head",
    "no markov",
)


def rms(x, eps, weight=None):
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    return (y if weight is None else y * weight).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, position, cfg, back=False):
    """RoPE without scaling on the last dims of x (heads, D) or (D)."""
    x, half = x.copy(), cfg.rope_dim // 2
    angle = position * cfg.rope_base ** (-np.arange(half) / half) * (-1 if back else 1)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., -2 * half :: 2].copy(), x[..., -2 * half + 1 :: 2].copy()
    x[..., -2 * half :: 2], x[..., -2 * half + 1 :: 2] = a * cos - b * sin, a * sin + b * cos
    return x


class Block:
    """A block of ratio 0. p: the prefix of its tensors."""

    def __init__(self, model: Model, p: str, cfg: ModelConfig, layer: int):
        self.model, self.p, self.cfg = model, p, cfg
        self.clamp = cfg.swiglu_clamp[min(layer, cfg.n_layers - 1)]
        self.rows: dict[int, np.ndarray] = {}  # by position

    def __getitem__(self, name):
        return self.model[f"{self.p}.{name}"]

    def around(self, sub, X, f):
        """A sub-layer between hyper-connections: X (N, E) → X'."""
        u, post, comb = self.read(sub, X)
        y = f(rms(u, self.cfg.norm_eps, self[f"{sub}_norm.weight"]))
        return post[:, None] * y + comb.T @ X

    def read(self, sub, X):
        cfg, N = self.cfg, len(X)
        m = self[f"hc_{sub}_fn.weight"] @ rms(X.reshape(-1), cfg.norm_eps)
        scale, base = self[f"hc_{sub}_scale.weight"], self[f"hc_{sub}_base.weight"]
        pre = sigmoid(m[:N] * scale[0] + base[:N]) + cfg.hc_eps
        post = 2 * sigmoid(m[N : 2 * N] * scale[1] + base[N : 2 * N])
        comb = (m[2 * N :] * scale[2] + base[2 * N :]).reshape(N, N)
        comb = np.exp(comb - comb.max(-1, keepdims=True))
        comb = comb / comb.sum(-1, keepdims=True) + cfg.hc_eps
        comb = comb / (comb.sum(0, keepdims=True) + cfg.hc_eps)
        for _ in range(cfg.sinkhorn_iters - 1):
            comb = comb / (comb.sum(1, keepdims=True) + cfg.hc_eps)
            comb = comb / (comb.sum(0, keepdims=True) + cfg.hc_eps)
        return pre @ X, post, comb

    def row(self, h, position):
        row = rms(self["attn_kv.weight"] @ h, self.cfg.norm_eps, self["attn_kv_a_norm.weight"])
        return turned(row, position, self.cfg)

    def attend(self, h, position, rows):
        """rows: (n, D), what the query sees."""
        cfg = self.cfg
        r = rms(self["attn_q_a.weight"] @ h, cfg.norm_eps, self["attn_q_a_norm.weight"])
        q = rms((self["attn_q_b.weight"] @ r).reshape(cfg.n_heads, -1), cfg.norm_eps)
        s = turned(q, position, cfg) @ rows.T / np.sqrt(np.float32(cfg.head_dim))
        s = np.concatenate([s, self["attn_sinks.weight"][:, None]], axis=1)
        p = np.exp(s - s.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[:, :-1]
        o = turned(p @ rows, position, cfg, back=True).reshape(cfg.o_groups, -1)
        a = self["attn_output_a.weight"].reshape(cfg.o_groups, cfg.o_lora_rank, -1)
        return self["attn_output_b.weight"] @ np.concatenate([m @ x for m, x in zip(a, o, strict=True)])

    def swiglu(self, h, gate, up, down):
        g, u = np.minimum(gate @ h, self.clamp), np.clip(up @ h, -self.clamp, self.clamp)
        return down @ (g * sigmoid(g) * u)

    def experts(self, h, token):
        cfg = self.cfg
        score = np.sqrt(np.log1p(np.exp(self["ffn_gate_inp.weight"] @ h)))
        if f"{self.p}.ffn_gate_tid2eid.weight" in self.model:
            chosen = self["ffn_gate_tid2eid.weight"][token]
        else:
            chosen = np.argsort(-(score + self["exp_probs_b.bias"]), kind="stable")[: cfg.n_experts_used]
        weight = cfg.route_scale * score[chosen] / score[chosen].sum()
        names = [f"ffn_{part}_{{}}.weight" for part in ("gate", "up", "down")]
        y = self.swiglu(h, *(self[name.format("shexp")] for name in names))
        for e, share in zip(chosen, weight, strict=True):
            y = y + share * self.swiglu(h, *(self[name.format("exps")][e] for name in names))
        return y

    def step(self, X, token, position, rows):
        """A token: X (N, E) → X'. rows: what it sees, as a function of its normed input."""
        X = self.around("attn", X, lambda h: self.attend(h, position, rows(h)))
        return self.around("ffn", X, lambda h: self.experts(h, token))

    def append(self, X, token, position):
        """A token of the target: X (N, E) → X'. Its row stays."""

        def window(h):
            self.rows[position] = self.row(h, position)
            return np.stack([self.rows[p] for p in range(max(0, position - self.cfg.window + 1), position + 1)])

        return self.step(X, token, position, window)


def run(model: Model, cfg: ModelConfig, tokens) -> np.ndarray:
    """The streams after every layer: (positions, layers, N, E)."""
    blocks = [Block(model, f"blk.{i}", cfg, i) for i in range(cfg.n_layers)]
    out = []
    for position, token in enumerate(tokens):
        X = np.repeat(model["token_embd.weight"][token][None], cfg.n_streams, axis=0)
        after = []
        for block in blocks:
            X = block.append(X, token, position)
            after.append(X)
        out.append(after)
    return np.array(out)


def draft(
    model: Model, cfg: ModelConfig, drafter: DrafterConfig, streams: np.ndarray, anchor: int, mistake: str = ""
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The greedy drafts after `anchor`, the token after those that gave `streams` (see `run`).

    Returns the tokens, their logits (slots, V) and confidences (slots).
    """
    eps, last, t = cfg.norm_eps, f"mtp.{drafter.stages - 1}", len(streams) - 1
    layers = [i + (mistake == "layers one on") for i in drafter.target_layers]
    features = streams[:, layers].mean(2)
    if mistake == "normed taps":
        features = rms(features, eps)
    m = features.reshape(t + 1, -1) @ model["mtp.0.main_proj.weight"].T
    m = rms(m, eps, model["mtp.0.main_norm.weight"])

    at = t + 1 + {"anchor one early": -1, "anchor one late": 1}.get(mistake, 0)
    ids = [anchor] + [drafter.noise_token] * (drafter.block_size - 1)
    X = [np.repeat(model["token_embd.weight"][i][None], cfg.n_streams, axis=0) for i in ids]
    for stage in range(drafter.stages):
        block = Block(model, f"mtp.{stage}", cfg, cfg.n_layers)
        context = range(max(0, t + 1 - cfg.window + (mistake == "context one short")), t + 1)
        of_context = rms(m, eps, block["attn_norm.weight"]) if mistake == "context through hc" else m
        rows = [block.row(of_context[p], p) for p in context]
        normed = [rms(block.read("attn", x)[0], eps, block["attn_norm.weight"]) for x in X]
        own = [block.row(h, at + j) for j, h in enumerate(normed)]
        for j in range(len(X)):
            seen = np.stack(rows + (own[: j + 1] if mistake == "causal block" else own))
            X[j] = block.step(X[j], ids[j], at + j, lambda h, seen=seen: seen)

    tokens, logits, confidence, previous = [], [], [], anchor
    head, norm = ("output_hc", "output_norm") if mistake == "main head" else (f"{last}.hc_head", f"{last}.norm")
    w1, w2 = (model[f"{last}.markov_head.markov_{w}.weight"] for w in ("w1", "w2"))
    for x in X[1:] + X[:1] if mistake == "slot 0 dropped" else X:
        gate = model[f"{head}_fn.weight"] @ rms(x.reshape(-1), eps)
        h = (sigmoid(gate * model[f"{head}_scale.weight"] + model[f"{head}_base.weight"]) + cfg.hc_eps) @ x
        normed = rms(h, eps, model[f"{norm}.weight"])
        bias = 0 if mistake == "no markov" else w2 @ w1[previous]
        logits.append(model["output.weight"] @ normed + bias)
        told = np.concatenate([normed if mistake == "normed confidence" else h, w1[previous]])
        confidence.append(sigmoid(model[f"{last}.confidence_head.proj.weight"] @ told)[0])
        previous = int(np.argmax(logits[-1]))
        tokens.append(previous)
    return tokens, np.array(logits), np.array(confidence)
