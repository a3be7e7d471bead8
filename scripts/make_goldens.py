"""Writes tests/goldens: runs small random GGUF files through Hugging Face transformers' DeepSeek-V4 in float32.

    python scripts/make_goldens.py [--case NAME]

Needs the extra `oracle` (torch, transformers). Of ds4jax only the writer of the file takes part: the file is read by
the `gguf` package, its metadata and tensors are given transformers' names here, and the round trips of the `official`
numerics, which transformers lacks, are written here in torch. A golden is written only if it is sharp (every kind of
changed weight and every missing round trip fails it) and stable (noise of the size of float32's does not).
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # of the extra `oracle`
import transformers  # pyright: ignore[reportMissingImports]
from absl import app, flags
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import (  # pyright: ignore[reportMissingImports]
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DynamicCache,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle  # noqa: E402

CASE = flags.DEFINE_multi_enum("case", [], [c.name for c in oracle.CASES], "Cases to write (default: all).")

ROUND_TRIPS = {"plain": (), "official": ("window", "compressed", "index_query", "index_key")}
NOISE, NOISE_RUNS = 5e-7, 6  # relative, on the output of every matrix product: about what float32 leaves open

# transformers' names of the tensors of one block, by the part of the GGUF name between ``blk.N.`` and ``.weight``.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attn_q_a": "self_attn.q_a_proj.weight",
    "attn_q_a_norm": "self_attn.q_a_norm.weight",
    "attn_q_b": "self_attn.q_b_proj.weight",
    "attn_kv": "self_attn.kv_proj.weight",
    "attn_kv_a_norm": "self_attn.kv_norm.weight",
    "attn_sinks": "self_attn.sinks",
    "attn_output_a": "self_attn.o_a_proj.weight",
    "attn_output_b": "self_attn.o_b_proj.weight",
    "indexer.attn_q_b": "self_attn.compressor.indexer.q_b_proj.weight",
    "indexer.proj": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn_gate_inp": "mlp.gate.weight",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
    "ffn_gate_tid2eid": "mlp.gate.tid2eid",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp": "mlp.shared_experts.down_proj.weight",
}
for _hc in ("attn", "ffn"):
    BLOCK_NAMES |= {f"hc_{_hc}_{leaf}": f"{_hc}_hc.{leaf}" for leaf in ("fn", "base", "scale")}
for _prefix, _module in (("attn", "compressor"), ("indexer", "compressor.indexer")):
    BLOCK_NAMES |= {
        f"{_prefix}_compressor_kv": f"self_attn.{_module}.kv_proj.weight",
        f"{_prefix}_compressor_gate": f"self_attn.{_module}.gate_proj.weight",
        f"{_prefix}_compressor_ape": f"self_attn.{_module}.position_bias",
        f"{_prefix}_compressor_norm": f"self_attn.{_module}.kv_norm.weight",
    }
TOP_NAMES = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
    "output_hc_fn": "model.hc_head.hc_fn",
    "output_hc_base": "model.hc_head.hc_base",
    "output_hc_scale": "model.hc_head.hc_scale",
}


def hf_config(meta: dict) -> DeepseekV4Config:
    """transformers' config from GGUF metadata without the prefix ``deepseek4.``."""
    layers = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    n_layers, n_hash = meta["block_count"], meta["hash_layer_count"]
    original, factor = meta["rope.scaling.original_context_length"], meta["rope.scaling.factor"]
    assert meta["expert_weights_norm"] and meta["attention.head_count_kv"] == meta["expert_shared_count"] == 1
    return DeepseekV4Config(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        moe_intermediate_size=meta["expert_feed_forward_length"],
        num_hidden_layers=n_layers,
        num_attention_heads=meta["attention.head_count"],
        head_dim=meta["attention.key_length"],
        partial_rotary_factor=meta["rope.dimension_count"] / meta["attention.key_length"],
        q_lora_rank=meta["attention.q_lora_rank"],
        num_experts_per_tok=meta["expert_used_count"],
        n_routed_experts=meta["expert_count"],
        routed_scaling_factor=meta["expert_weights_scale"],
        max_position_embeddings=int(original * factor),
        rope_theta=meta["rope.freq_base"],
        compress_rope_theta=meta["attention.compress_rope_freq_base"],
        rope_parameters={
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": meta["rope.scaling.yarn_beta_fast"],
            "beta_slow": meta["rope.scaling.yarn_beta_slow"],
            "attention_factor": 1.0,
        },
        layer_types=[layers[r] for r in meta["attention.compress_ratios"][:n_layers]],
        mlp_layer_types=["hash_moe"] * n_hash + ["moe"] * (n_layers - n_hash),
        hc_mult=meta["hyper_connection.count"],
        hc_sinkhorn_iters=meta["hyper_connection.sinkhorn_iterations"],
        hc_eps=meta["hyper_connection.epsilon"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        sliding_window=meta["attention.sliding_window"],
        o_groups=meta["attention.output_group_count"],
        o_lora_rank=meta["attention.output_lora_rank"],
        index_n_heads=meta["attention.indexer.head_count"],
        index_head_dim=meta["attention.indexer.key_length"],
        index_topk=meta["attention.indexer.top_k"],
    )


def state_dict(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """Every tensor of the file in float32 under transformers' name; gate and up of the experts are one tensor there."""
    state, experts = {}, {}
    for t in reader.tensors:
        if t.name.startswith("mtp."):  # transformers has no such head
            continue
        name = t.name.removesuffix(".weight").removesuffix(".bias")
        shape = [int(n) for n in t.shape[::-1]]
        ids = t.tensor_type == gguf.GGMLQuantizationType.I32
        values = torch.from_numpy(np.array(t.data if ids else dequantize(t.data, t.tensor_type)).reshape(shape))
        if not name.startswith("blk."):
            state[TOP_NAMES[name]] = values
            continue
        _, layer, name = name.split(".", 2)
        if name in ("ffn_gate_exps", "ffn_up_exps"):
            experts[layer, name] = values
        else:
            state[f"model.layers.{layer}.{BLOCK_NAMES[name]}"] = values.long() if ids else values
    for layer in {layer for layer, _ in experts}:
        both = torch.cat([experts[layer, "ffn_gate_exps"], experts[layer, "ffn_up_exps"]], dim=1)
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = both
    return state


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(x)) for x > 0, exactly."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def store_row(x: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """A cache row as it is read back: E4M3 in blocks of 64 with a power-of-two scale, the RoPE dims in float16."""
    nope, rope = x[..., :-rope_dim], x[..., -rope_dim:]
    blocks = nope.unflatten(-1, (nope.shape[-1] // 64, 64))
    scale = power_of_two_above(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
    blocks = (blocks / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return torch.cat([blocks.reshape(nope.shape), rope.half().to(x.dtype)], dim=-1)


def store_index(x: torch.Tensor) -> torch.Tensor:
    """An indexer query or key as it is read back: Hadamard-rotated, then E2M1 in blocks of 32."""
    hadamard, h2 = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(hadamard) < x.shape[-1]:
        hadamard = torch.kron(h2, hadamard)
    blocks = (x @ hadamard / math.sqrt(len(hadamard))).unflatten(-1, (x.shape[-1] // 32, 32))
    scale = power_of_two_above(blocks.abs().amax(-1, keepdim=True).clamp(min=6 * 2**-126) / 6)
    magnitude, code = (blocks / scale).abs(), 0
    for i, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):  # a middle rounds to the even code
        code = code + (magnitude > middle if i % 2 == 0 else magnitude >= middle).long()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[code]
    return (values * blocks.sign() * scale).reshape(x.shape)


def k_gap(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Gap between the k-th and the next of the last axis (-inf: not a candidate), relative to the largest magnitude."""
    if scores.shape[-1] <= k:
        return torch.full(scores.shape[:-1], torch.inf)
    top = scores.topk(k + 1, dim=-1).values
    largest = torch.where(scores.isinf(), 0, scores.abs()).amax(-1).clamp(min=1e-30)
    return torch.where(top[..., k].isinf(), torch.inf, (top[..., k - 1] - top[..., k]) / largest)


class Oracle:
    """A GGUF file in transformers, with hooks for the round trips and for the gaps at each top-k."""

    def __init__(self, path: Path):
        reader = GGUFReader(path)
        prefix = "deepseek4."
        meta = {k.removeprefix(prefix): f.contents() for k, f in reader.fields.items() if k.startswith(prefix)}
        self.config = hf_config(meta)
        self.model = DeepseekV4ForCausalLM._from_config(
            self.config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self.model.load_state_dict(state_dict(reader), strict=True)
        for layer, limit in zip(self.model.model.layers, meta["swiglu_clamp_exp"], strict=False):
            layer.mlp.experts.limit = layer.mlp.shared_experts.limit = limit
        self.active: tuple[str, ...] = ()
        self.gaps: dict[str, list[torch.Tensor]] = {}
        for layer in self.model.model.layers:
            if layer.self_attn.layer_type == "compressed_sparse_attention":
                scorer = layer.self_attn.compressor.indexer.scorer
                scorer.register_forward_pre_hook(self._store_query)
                scorer.register_forward_hook(self._index_gap)
            if not layer.mlp.is_hash:
                layer.mlp.gate.register_forward_hook(self._router_gap)

    def _store_query(self, scorer, args):
        query, keys, hidden = args
        return (store_index(query) if "index_query" in self.active else query), keys, hidden

    def _index_gap(self, scorer, args, scores):
        ready = (torch.arange(scores.shape[1]) + 1) // self.config.compress_rates["compressed_sparse_attention"]
        future = torch.arange(scores.shape[2]) >= ready[:, None]
        self.gaps["index"].append(k_gap(scores[0].masked_fill(future, -torch.inf), self.config.index_topk))

    def _router_gap(self, router, args, output):
        scores = router.score_fn(output[0]) + router.e_score_correction_bias
        self.gaps["router"].append(k_gap(scores, router.top_k))

    def _cache(self) -> DynamicCache:
        """transformers' cache, with what goes in passed through the active round trips."""
        cache = DynamicCache(config=self.config)
        rope_dim = self.config.qk_rope_head_dim
        for layer in cache.layers:
            if "window" in self.active:
                layer.update = lambda k, v, *a, f=layer.update: f(store_row(k, rope_dim), store_row(v, rope_dim), *a)
            if hasattr(layer, "update_compressor_states"):

                def update(name, rows, f=layer.update_compressor_states):
                    if name == "compressor" and "compressed" in self.active:
                        rows = store_row(rows, rope_dim)
                    if name == "indexer" and "index_key" in self.active:
                        rows = store_index(rows)
                    return f(name, rows)

                layer.update_compressor_states = update
        return cache

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, round_trips=()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """tokens (S,) → float32 logits (S, vocab); gaps ``index`` and ``router`` (S,), see `oracle.Golden`."""
        self.active, self.gaps = tuple(round_trips), {"index": [], "router": []}
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        out = self.model(input_ids=ids, past_key_values=self._cache(), use_cache=True).logits[0]
        return out.numpy(), {k: torch.stack(v).amin(0).numpy() for k, v in self.gaps.items()}

    @contextlib.contextmanager
    def noise(self, seed: int):
        """Within, every matrix product and embedding carries relative noise of deviation NOISE."""
        generator = torch.Generator().manual_seed(seed)

        def add_noise(module, args, out):
            return out * (1 + NOISE * torch.randn(out.shape, generator=generator))

        modules = [m for m in self.model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
        hooks = [m.register_forward_hook(add_noise) for m in modules]
        yield
        for hook in hooks:
            hook.remove()

    def changed_weights(self, token: int):
        """Changes one value of a tensor, yields transformers' name for it, changes it back; for every kind of tensor.

        Of the layers with the same kind of attention or routing it takes the last: in the first, the streams are still
        equal and their mixing is of no effect. The value is the one of largest magnitude, its sign is turned; of
        what is looked up by token it is one in `token`'s row.
        """
        kinds = set()
        for name, tensor in reversed(self.model.state_dict().items()):  # shares memory with the model
            kind = name
            if match := re.search(r"layers\.(\d+)\.", name):
                layer = self.model.model.layers[int(match[1])]
                part = name[match.end() :].split(".")[0]
                variant = {"self_attn": layer.self_attn.layer_type, "mlp": layer.mlp.is_hash}.get(part)
                kind = (name[match.end() :], variant)
            if kind in kinds:
                continue
            kinds.add(kind)
            values = (tensor[token] if "embed_tokens" in name or "tid2eid" in name else tensor).view(-1)
            at = values.abs().argmax()
            kept = values[at].clone()
            values[at] = (
                -kept if values.is_floating_point() else min(set(range(len(values) + 1)) - set(values.tolist()))
            )
            yield name
            values[at] = kept


def greedy(model: Oracle, tokens: np.ndarray, round_trips) -> dict[str, np.ndarray]:
    """GREEDY_STEPS greedy tokens behind the prompt, each from a forward pass over everything before it."""
    ids, logits = [], []
    for _ in range(oracle.GREEDY_STEPS):
        last = model.logits(tokens, round_trips)[0][-1]
        ids.append(np.argsort(-last, kind="stable")[: oracle.GREEDY_TOP].astype(np.int32))
        logits.append(last[ids[-1]])
        tokens = np.append(tokens, ids[-1][0])
    return {"greedy/tokens": tokens, "greedy/ids": np.stack(ids), "greedy/logits": np.stack(logits)}


def answers(case: oracle.Case, model: Oracle) -> dict[str, np.ndarray]:
    """The arrays of a Golden."""
    round_trips = ROUND_TRIPS[case.numerics]
    arrays = {}
    for n in oracle.LENGTHS:
        logits, gaps = model.logits(case.prompt(n), round_trips)
        kept = {"tokens": case.prompt(n), **oracle.record(logits), **{f"{k}_gap": v for k, v in gaps.items()}}
        arrays |= {f"{n}/{k}": v for k, v in kept.items()}
    return arrays | greedy(model, case.prompt(oracle.GREEDY_PROMPT), round_trips)


def objections(golden: oracle.Golden, model: Oracle) -> list[str]:
    """Why this golden would be a bad one: what it does not notice, and what disturbs it without being wrong."""
    case, arrays, longest = golden.case, golden.arrays, max(oracle.LENGTHS)
    round_trips, found = ROUND_TRIPS[case.numerics], []

    if case.numerics == "plain":
        gap = min(arrays[f"{n}/{k}_gap"].min() for n in oracle.LENGTHS for k in ("index", "router"))
        if gap < oracle.NEAR_TIE:
            found.append(f"a top-k is decided by a relative gap of {gap:.1e}")
    if case.numerics == "plain" and not isinstance(case, oracle.Trained):  # training leaves some values unused
        for name in model.changed_weights(case.prompt(longest)[0]):
            logits = model.logits(case.prompt(longest))[0]
            print(f"  {golden.errors(longest, logits).max():8.1e}  one value changed in {name}")
            if not golden.failures(longest, logits):
                found.append(f"a changed value in {name} is not noticed")
    for missing in round_trips:
        logits = model.logits(case.prompt(longest), [r for r in round_trips if r != missing])[0]
        errors = golden.errors(longest, logits)
        print(f"  {errors.max():8.1e}, median {np.median(errors):.1e}, without the round trip of {missing}")
        if not golden.failures(longest, logits):
            found.append(f"a missing round trip of {missing} is not noticed")

    for n in oracle.LENGTHS:
        errors = []
        for seed in range(NOISE_RUNS):
            with model.noise(seed):
                errors.append(golden.errors(n, model.logits(case.prompt(n), round_trips)[0]))
        worst, median = np.max(errors), np.median(errors, axis=1).max()
        print(f"  {worst:8.1e}, median {median:.1e}, with noise of {NOISE:.0e}, {n} tokens")
        limit, median_limit = case.tolerances
        if worst > limit / 4 or median > median_limit / 2:
            found.append(f"noise of {NOISE:.0e} moves {n} tokens by {worst:.1e}, median {median:.1e}")
    lead = -np.diff(arrays["greedy/logits"][:, :2]).min()
    if lead < 0.01:
        found.append(f"a greedy token leads by {lead:.1e} only")
    return found


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    for case in oracle.CASES:
        if CASE.value and case.name not in CASE.value:
            continue
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            case.build(path)
            model = Oracle(path)
            versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
            golden = oracle.Golden(case, {"sha256": oracle.fingerprint(path), **versions}, answers(case, model))
        print(case.name)
        if found := objections(golden, model):
            raise SystemExit(f"{case.name}: not written; choose another seed:\n" + "\n".join(found))
        print(f"  wrote {golden.save()}")


if __name__ == "__main__":
    app.run(main)
