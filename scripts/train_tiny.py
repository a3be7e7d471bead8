"""Trains the tiny model: ``python scripts/train_tiny.py --data build/tiny --out build/run``.

As many GPUs as divide a step's rows evenly take part.

The data come from scripts/tiny_data.py. A run that is interrupted, or stopped by --minutes, goes on where its last
checkpoint is when started again with the same flags; the end is the same as without the interruption.

It writes tiny-f32.gguf, the weights as trained; tiny.imatrix.gguf, from some of the rows it was trained with; and
tiny_q2-f32.gguf, the weights after further steps in which the experts are seen as the q2 recipe and that imatrix store
them. `python -m ds4jax.convert` makes the embedded models of these: see their cards in ds4jax/models.

The seed and the number of GPUs decide the result: XLA is told to take no operation whose result depends on timing, and
not to choose kernels by timing them, which would sum in another order at another time. That costs a third of the speed.
`XLA_FLAGS=--xla_gpu_deterministic_ops=false` before the command gives it back; then no two runs end alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"
START = time.monotonic()  # --minutes count from here: the imports take their time as well

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402
from flax import struct  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from ds4jax import training  # noqa: E402
from ds4jax.config import ModelConfig  # noqa: E402
from ds4jax.errors import ConfigError  # noqa: E402
from ds4jax.formats import IQ2_XXS, Q2_K, Quantized  # noqa: E402
from ds4jax.io.gguf import TensorData, write_gguf  # noqa: E402
from ds4jax.io.imatrix import Imatrix  # noqa: E402
from ds4jax.io.load import load  # noqa: E402
from ds4jax.io.recipes import RECIPES  # noqa: E402
from ds4jax.io.synthetic import KERNEL, storage_type  # noqa: E402
from ds4jax.io.tokenizer import Tokenizer, byte_tokenizer  # noqa: E402
from ds4jax.model import weights  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402
from ds4jax.model.weights import Hash, Route, SwiGLU, Weights  # noqa: E402
from ds4jax.tools import cli, imatrix  # noqa: E402

# Every kind of layer, as small as the kernels take it, and 10 MB in the published q2 recipe. It is trained with all
# compressed rows of its context in sight (512 tokens have 128 of them), and the indexer beside it, to rank them.
TINY = dataclasses.replace(
    KERNEL, n_mtp=1, vocab_size=tiny_data.VOCAB, q_lora_rank=128, o_lora_rank=32, o_groups=8, index_top_k=128,
    n_experts=7, n_experts_used=2, yarn_factor=2.0, yarn_original_ctx=tiny_data.CONTEXT // 2,
)  # fmt: skip

Q2_EXPERTS = SwiGLU(gate=IQ2_XXS, up=IQ2_XXS, down=Q2_K)  # of the published q2 file
CALIBRATION_ROWS = 100  # of the training data, for the importance matrix

FLAGS = flags.FlagValues()
flags.DEFINE_string("data", "build/tiny", "Folder that scripts/tiny_data.py wrote.", flag_values=FLAGS)
flags.DEFINE_string("out", "build/run", "Folder for checkpoints and the trained model.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 12_000, "Optimiser steps of the whole run.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 32, "Rows per step.", flag_values=FLAGS)
flags.DEFINE_float("learning_rate", 2e-3, "The highest.", flag_values=FLAGS)
flags.DEFINE_integer("q2_steps", 2500, "Further steps, with quantized experts.", flag_values=FLAGS)
flags.DEFINE_float("q2_learning_rate", 4e-4, "The highest in these.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the initial weights and of the order of the rows.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the activations.", flag_values=FLAGS)
flags.DEFINE_float("minutes", 0, "Save a checkpoint and stop after this time; 0 is never.", flag_values=FLAGS)
flags.DEFINE_integer("save_every", 2000, "Steps between checkpoints.", flag_values=FLAGS)
flags.DEFINE_bool(
    "smoke", False, "A few steps of a miniature, interrupted and not: both must be equal.", flag_values=FLAGS
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run. What it ends with depends on nothing but this and the data."""

    cfg: ModelConfig
    compute: Compute
    steps: int
    batch: int
    learning_rate: float
    seed: int

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW, warm-up and cosine; only matrices decay."""
        warm_up = min(300, self.steps // 5)
        rate = optax.warmup_cosine_decay_schedule(
            0, self.learning_rate, warm_up, self.steps, 0.02 * self.learning_rate
        )  # fmt: skip

        def is_matrix(params: Weights) -> Weights:
            leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Quantized))
            return jax.tree.unflatten(treedef, [isinstance(x, Quantized) for x in leaves])

        adam = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=is_matrix)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)


@struct.dataclass
class State:
    """Between two steps. params: the weights that have gradients; hash and route hold the others."""

    step: jax.Array
    params: Weights
    hash: Hash
    route: Route
    moments: optax.OptState

    @property
    def weights(self) -> Weights:
        return dataclasses.replace(self.params, hash=self.hash, route=self.route)


# ---- training --------------------------------------------------------------------------------------------------------
@functools.partial(jax.jit, static_argnames="plan")
def initial(table: jax.Array, *, plan: Plan) -> Weights:
    """table: see `expert_table`."""
    return training.init(plan.cfg, plan.seed, table)


# What pyright is to ignore below: the types of optax know no dataclasses.
@functools.partial(jax.jit, static_argnames="plan")
def begin(w: Weights, *, plan: Plan) -> State:
    """The state before the first step, from some weights."""
    params = dataclasses.replace(w, hash=None, route=None)
    return State(jnp.zeros((), jnp.int32), params, w.hash, w.route, plan.optimiser().init(params))  # pyright: ignore[reportArgumentType]


def expert_table(tokens: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """The experts of each token in layers that route by token: int32 (vocab, k), the frequent tokens spread evenly."""
    counts = np.bincount(tokens.reshape(-1), minlength=cfg.vocab_size)
    table, load = np.zeros((cfg.vocab_size, cfg.n_experts_used), np.int32), np.zeros(cfg.n_experts)
    for token in np.argsort(-counts, kind="stable"):
        table[token] = np.argsort(load, kind="stable")[: cfg.n_experts_used]
        load[table[token]] += counts[token] + 1
    return table


def mesh(plan: Plan) -> Mesh:
    """As many devices as divide a step's rows evenly. Each takes its share of the rows and has all of the state."""
    n = math.gcd(len(jax.devices()), plan.batch)
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train_step(
    state: State, tokens: jax.Array, mask: jax.Array, rows: jax.Array, importance: SwiGLU | None, *, plan: Plan
) -> tuple[State, dict[str, jax.Array]]:
    """One step on some rows (batch,) of tokens and mask, which stay on the device → and the parts of the loss.

    importance: if given, the experts are seen as they are after quantizing them with it.
    """
    # Every compressed row of a training row is seen, so that no choice stands between the loss and the rows.
    cfg = dataclasses.replace(plan.cfg, index_top_k=max(plan.cfg.index_top_k, tokens.shape[1]))

    def share(state: State, tokens: jax.Array, mask: jax.Array, rows: jax.Array, importance: SwiGLU | None):
        """The gradient and the parts of the loss of one device's rows, in the mean over the devices."""

        def loss(params: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
            w = dataclasses.replace(params, hash=state.hash, route=state.route)
            if importance is not None:
                w = training.as_stored(w, Q2_EXPERTS, importance)
            return training.loss(w, tokens[rows].astype(jnp.int32), mask[rows], cfg, plan.compute)

        return jax.lax.pmean(jax.grad(loss, has_aux=True)(state.params), "data")

    all_of_it, a_part = PartitionSpec(), PartitionSpec("data")
    specs = all_of_it, all_of_it, all_of_it, a_part, all_of_it
    shared = jax.shard_map(share, mesh=mesh(plan), in_specs=specs, out_specs=all_of_it, check_vma=False)
    gradient, parts = shared(state, tokens, mask, rows, importance)
    update, moments = plan.optimiser().update(gradient, state.moments, state.params)  # pyright: ignore[reportArgumentType]
    route = training.balance(state.weights, parts["loads"]).route
    params = optax.apply_updates(state.params, update)  # pyright: ignore[reportArgumentType]
    parts["norm"] = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    return dataclasses.replace(state, step=state.step + 1, params=params, route=route, moments=moments), parts


def rows_of(plan: Plan, step: int, n_rows: int) -> np.ndarray:
    """The rows of a step: every epoch all of them once, but for the last few, in an order of its own."""
    epoch, nth = divmod(step, n_rows // plan.batch)
    order = _order(plan.seed, epoch, n_rows)
    return order[nth * plan.batch : (nth + 1) * plan.batch]


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_rows).astype(np.int32)


def train(
    plan: Plan,
    tokens: np.ndarray,
    mask: np.ndarray,
    folder: Path,
    save_every: int,
    start: Weights | None = None,
    importance: SwiGLU | None = None,
    deadline: float = float("inf"),
    stop: int | None = None,
    log_every: int = 100,
) -> State:
    """Train from the last checkpoint in `folder`, or from the start, and save one at the end.

    start: the weights to start from; None is initial ones. importance: see `train_step`. tokens, mask: (rows, T + 1) as
    `tiny_data.pack` gives them. deadline: of `time.monotonic`. The end is the end of the plan, the deadline or, if
    given, step `stop`, whichever comes first.
    """
    if len(tokens) < plan.batch:
        raise ConfigError(f"data: found {len(tokens)} rows, expected at least a batch of {plan.batch}")
    last = plan.steps if stop is None else min(stop, plan.steps)
    if start is None:
        start = initial(jnp.asarray(expert_table(tokens, plan.cfg)), plan=plan)
    state = begin(start, plan=plan)
    leaves, treedef = jax.tree.flatten(state)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(folder.absolute() / "checkpoints", options=options) as checkpoints:
        if checkpoints.latest_step() is not None:
            leaves = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(leaves))
        # Placed explicitly, as a restored state is: a step compiled for one would not take the other.
        everywhere = NamedSharding(mesh(plan), PartitionSpec())
        leaves, importance, *data = jax.device_put((leaves, importance, tokens, mask), everywhere)
        state = jax.tree.unflatten(treedef, leaves)
        first = at = int(state.step)
        since = time.monotonic()
        while at < last and time.monotonic() < deadline:
            rows = jax.device_put(rows_of(plan, at, len(tokens)), everywhere)
            state, parts = train_step(state, *data, rows, importance, plan=plan)
            at += 1
            if at % log_every == 0 or at in (first + 1, last):
                parts = jax.device_get(parts)
                speed = max(1, at - first - 1) / (time.monotonic() - since)
                print(_line(plan, at, parts, speed, tokens.shape[1] - 1), flush=True)
            if at == first + 1:
                print(f"first step compiled and run in {time.monotonic() - since:.1f} s", flush=True)
                since = time.monotonic()
            if at % save_every == 0 or at == last:
                checkpoints.save(at, args=ocp.args.StandardSave(jax.tree.leaves(state)))
        if at < last and checkpoints.latest_step() != at:
            checkpoints.save(at, args=ocp.args.StandardSave(jax.tree.leaves(state)))
    return state


def _line(plan: Plan, at: int, parts: dict, speed: float, length: int) -> str:
    loads = parts["loads"]
    return (
        f"step {at}: loss {parts['main']:.4f}, mtp {parts['mtp']:.4f} (agrees {parts['agreement']:.3f}), "
        f"index {parts['index']:.4f}, norm {parts['norm']:.2f}, loads {loads.min():.2f}-{loads.max():.2f}, "
        f"{speed * plan.batch * length:.0f} tokens/s, "
        f"{(plan.steps - at) / speed / 60:.1f} min left"
    )


# ---- the result ------------------------------------------------------------------------------------------------------
def export(path: Path, w: Weights, cfg: ModelConfig, tok: Tokenizer) -> None:
    """Write float32 weights as a GGUF file, with the MTP head under ``mtp.0``."""
    specs, treedef = jax.tree.flatten(weights.abstract(cfg, RECIPES["f32"]))
    tensors = {}
    for spec, value in zip(specs, treedef.flatten_up_to(w), strict=True):
        array = np.asarray(value.dequantize() if isinstance(value, Quantized) else value)
        for i, tensor in enumerate(spec.tensors):
            data = array[i] if spec.layered else array
            qtype = storage_type(tensor, RECIPES["f32"])
            tensors[tensor.name] = TensorData(tensor.shape, qtype, functools.partial(np.asarray, data))
    about = {
        "general.name": "tiny",
        "general.description": "A small trained model of DeepSeek-V4's architecture, for tests and demonstrations",
    }
    write_gguf(path, cfg.to_metadata() | about | tok.to_metadata(), tensors.items())


def column_importance(w: Weights, cfg: ModelConfig, tokens: np.ndarray, out: Path) -> SwiGLU:
    """Let the model read rows of tokens, write the importance matrix to `out`, and return that of the experts."""
    texts = [row[:-1].tolist() for row in tokens]
    entries = imatrix.collect(w, cfg, Compute("official"), texts, ctx=len(texts[0]), piece=len(texts[0]), layout="mtp")
    Imatrix(entries, ["rows of the training data"], len(texts), len(texts[0])).write(out)
    # What the converter will read: float32.
    entries = Imatrix.read(out).entries

    def stacked(name: str) -> jax.Array:
        prefixes = [f"blk.{layer}" for layer in range(cfg.n_layers)] + ["mtp.0"]
        return jnp.stack([entries[f"{prefix}.ffn_{name}_exps.weight"].means() for prefix in prefixes])

    return SwiGLU(gate=stacked("gate"), up=stacked("up"), down=stacked("down"))


def main() -> int:
    if FLAGS.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder))
        return 0
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "xla"))
    tok, tokens, mask = tiny_data.load(FLAGS.data)
    cfg = dataclasses.replace(TINY, vocab_size=tok.vocab_size)
    compute = Compute("straight_through", FLAGS.dtype, query_blocks=tokens.shape[1] // 128)
    deadline = START + 60 * FLAGS.minutes if FLAGS.minutes else float("inf")

    def stage(plan: Plan, folder: Path, **more) -> Weights | None:
        state = train(plan, tokens, mask, folder, FLAGS.save_every, deadline=deadline, **more)
        if int(state.step) == plan.steps:
            return state.weights
        print(f"{folder}: stopped at step {int(state.step)} of {plan.steps}; the same command goes on")

    plan = Plan(cfg, compute, FLAGS.steps, FLAGS.batch, FLAGS.learning_rate, FLAGS.seed)
    trained = out / "tiny-f32.gguf"
    if trained.exists():
        print(f"{trained} is there already: going on with the steps for q2")
    else:
        w = stage(plan, out)
        if w is None:
            return 0
        export(trained, w, cfg, tok)
    w, _ = load(trained)
    importance = column_importance(w, cfg, tokens[:CALIBRATION_ROWS], out / "tiny.imatrix.gguf")
    plan = dataclasses.replace(plan, steps=FLAGS.q2_steps, learning_rate=FLAGS.q2_learning_rate, seed=FLAGS.seed + 1)
    w = stage(plan, out / "q2", start=w, importance=importance)
    if w is not None:
        export(out / "tiny_q2-f32.gguf", w, cfg, tok)
    return 0


# ---- smoke test ------------------------------------------------------------------------------------------------------
MINIATURE = dataclasses.replace(
    TINY, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2, n_hash_layers=1, embed_dim=64, n_heads=2,
    o_groups=2, head_dim=48, rope_dim=16, index_heads=2, index_head_dim=32, q_lora_rank=32, expert_dim=32, n_experts=4,
    window=32, sinkhorn_iters=3, vocab_size=byte_tokenizer().vocab_size,
)  # fmt: skip


def smoke(folder: Path) -> None:
    """Three steps of a miniature at once, and with an interruption; raises ConfigError unless both end the same."""
    tok = byte_tokenizer()
    documents = list(tiny_data.text_documents(Path(__file__).read_text(encoding="utf-8"), tok))
    tokens, mask = (x[:, :129] for x in tiny_data.pack(documents, tok.eos_id))
    compute = Compute("straight_through")
    plan = Plan(MINIATURE, compute, steps=3, batch=2, learning_rate=1e-2, seed=0)
    whole = train(plan, tokens, mask, folder / "whole", save_every=10, log_every=1)
    for stop in (2, None):
        resumed = train(plan, tokens, mask, folder / "resumed", save_every=10, stop=stop, log_every=1)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if not np.array_equal(a, b):
            raise ConfigError("smoke: a run that was interrupted ended otherwise than one that was not")
    export(folder / "smoke.gguf", whole.weights, plan.cfg, tok)
    print("smoke: an interruption changes nothing")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
