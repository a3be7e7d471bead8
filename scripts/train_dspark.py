"""Trains the DSpark drafter of the tiny model: ``python scripts/train_dspark.py --data build/tiny --out build/dspark``.

The data come from scripts/tiny_unseen.py and, half of every batch, from scripts/tiny_answers.py. The model is the
embedded one, and stays as it is: the drafter learns from its distributions. The result is two files in --out:
dspark-f16.gguf, and dspark.gguf in the types of the q4 recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works without being installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tiny_data  # noqa: E402
from absl import flags  # noqa: E402

from ds4jax import training  # noqa: E402
from ds4jax.config import DrafterConfig, ModelConfig  # noqa: E402
from ds4jax.formats import F32, FORMATS, Quantized  # noqa: E402
from ds4jax.formats.quantize import quantize  # noqa: E402
from ds4jax.io.drafter import to_metadata  # noqa: E402
from ds4jax.io.gguf import TensorData, write_gguf  # noqa: E402
from ds4jax.io.load import load  # noqa: E402
from ds4jax.io.recipes import RECIPES, Recipe  # noqa: E402
from ds4jax.io.synthetic import storage_type  # noqa: E402
from ds4jax.model import weights  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402
from ds4jax.model.weights import Dspark, Weights  # noqa: E402
from ds4jax.paths import embedded_model  # noqa: E402
from ds4jax.tools import cli  # noqa: E402

# Two stages gain most over one. The rank is as small as the kernels take it. The noise token is a byte that UTF-8 does
# not have, so that no text contains it.
DRAFTER = DrafterConfig(stages=2, block_size=5, markov_rank=128, noise_token=0xC0, target_layers=(1, 2, 3))

FLAGS = flags.FlagValues()
flags.DEFINE_string("data", "build/tiny", "Folder that scripts/tiny_data.py wrote.", flag_values=FLAGS)
flags.DEFINE_string("out", "build/dspark", "Folder for the trained drafter.", flag_values=FLAGS)
flags.DEFINE_string("model", None, "Another GGUF file than the embedded model.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 4000, "Optimiser steps.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 16, "Rows per step.", flag_values=FLAGS)
flags.DEFINE_integer("anchors", 64, "Blocks per row.", flag_values=FLAGS)
flags.DEFINE_float("learning_rate", 2e-3, "The highest.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the initial weights, the rows and the anchors.", flag_values=FLAGS)
flags.DEFINE_float("minutes", 0, "Stop after this time, warm-down included; 0 is never.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the activations.", flag_values=FLAGS)


def draw_anchors(mask: jax.Array, key: jax.Array, n: int, slots: int) -> jax.Array:
    """n positions of each row of mask (B, T + 1), the token after each of which is to be predicted: int32 (B, n)."""
    T = mask.shape[1] - 1
    allowed = mask[:, 2 : T - slots + 2]  # anchors 1 … T - slots
    score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    return 1 + jax.lax.top_k(score, n)[1].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "rate", "n", "batch"), donate_argnums=0)
def train_step(
    state: tuple, w: Weights, tokens: jax.Array, mask: jax.Array, key: jax.Array, fraction: jax.Array, *,
    cfg: ModelConfig, compute: Compute, rate: float, n: int, batch: int, others: int,
) -> tuple[tuple, dict[str, jax.Array]]:  # fmt: skip
    """One step on random rows and anchors: half of the rows are of the first `others`, half of the model's own answers.

    fraction: of the run that is over; the learning rate follows it.
    """
    d, moments = state
    assert cfg.drafter is not None
    rows_key, anchors_key = jax.random.split(key)
    start, end = jnp.array([[0], [others]]), jnp.array([[others], [len(tokens)]])
    rows = jax.random.randint(rows_key, (2, batch // 2), start, end).reshape(batch)
    anchors = draw_anchors(mask[rows], anchors_key, n, cfg.drafter.block_size)

    def loss(params: Dspark):
        whole = dataclasses.replace(params, route=d.route)
        return training.drafter_loss(
            whole, w, tokens[rows].astype(jnp.int32), mask[rows], anchors, cfg, compute
        )  # fmt: skip

    params = dataclasses.replace(d, route=None)
    gradient, parts = jax.grad(loss, has_aux=True)(params)
    update, moments = optimiser().update(gradient, moments, params)
    scale = rate * jnp.minimum(fraction / 0.04, 1) * (0.02 + 0.98 * 0.5 * (1 + jnp.cos(jnp.pi * fraction)))
    params = jax.tree.map(lambda p, u: p - scale * u, params, update)
    d = dataclasses.replace(params, route=training.balanced(d.route, parts["loads"]))
    return (d, moments), parts


def optimiser() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))


def widened(w: Weights) -> Weights:
    """The weights in float32, so that no step decodes them again."""
    return jax.tree.map(
        lambda x: F32(x.dequantize()) if isinstance(x, Quantized) else x, w, is_leaf=lambda x: isinstance(x, Quantized)
    )


def export(path: Path, d: Dspark, cfg: ModelConfig, recipe: Recipe) -> None:
    """Write weights as a drafter's own GGUF file."""
    assert cfg.drafter is not None
    specs, treedef = jax.tree.flatten(weights.abstract_drafter(cfg, RECIPES["f32"]))
    tensors = {}
    for spec, value in zip(specs, treedef.flatten_up_to(d), strict=True):
        array = np.asarray(value.dequantize() if isinstance(value, Quantized) else value)
        for i, tensor in enumerate(spec.tensors):
            data, qtype = array[i] if spec.layered else array, storage_type(tensor, recipe)
            stored = quantize(data, FORMATS[qtype]).to_bytes() if tensor.kind == "matrix" else data
            tensors[tensor.name] = TensorData(tensor.shape, qtype, functools.partial(np.asarray, stored))
    write_gguf(path, to_metadata(cfg.drafter), tensors.items())


def main() -> int:
    start = time.monotonic()
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    given, own = (tiny_data.load_rows(Path(FLAGS.data) / f"{name}.npz") for name in ("unseen", "answers"))
    tokens, mask = (np.concatenate(parts) for parts in zip(given, own, strict=True))
    w, checkpoint = load(FLAGS.model or embedded_model("tiny"))
    cfg = dataclasses.replace(checkpoint.cfg, drafter=DRAFTER)
    w = jax.jit(widened)(w)
    compute = Compute("straight_through", FLAGS.dtype, query_blocks=(tokens.shape[1] - 1) // 128)
    d = jax.jit(training.init_drafter, static_argnums=(0, 1))(cfg, FLAGS.seed)
    # Placed explicitly, as a step returns it: a step compiled for one would not take the other.
    state, tokens, mask = jax.device_put(
        ((d, optimiser().init(dataclasses.replace(d, route=None))), tokens, mask), jax.devices()[0]
    )
    key = jax.random.key(FLAGS.seed)
    begun, step = None, 0
    while True:
        now = time.monotonic()
        by_steps = step / FLAGS.steps if FLAGS.steps else 1.0
        by_time = (now - begun) / (60 * FLAGS.minutes - (begun - start)) if FLAGS.minutes and begun else 0.0
        fraction = max(by_steps, by_time)
        if fraction >= 1:
            break
        state, parts = train_step(
            state, w, tokens, mask, jax.random.fold_in(key, step), jnp.float32(fraction), cfg=cfg, compute=compute,
            rate=FLAGS.learning_rate, n=FLAGS.anchors, batch=FLAGS.batch, others=len(given[0]),
        )  # fmt: skip
        step += 1
        if step == 1 or step % 100 == 0:
            parts = jax.device_get(parts)
            begun = begun or time.monotonic()
            print(f"step {step} at {time.monotonic() - start:.1f} s, {100 * fraction:.0f} %: "
                  f"accepted {np.round(parts['accepted'], 3)}, agrees {np.round(parts['agreement'], 3)}, "
                  f"loads {parts['loads'].min():.2f}-{parts['loads'].max():.2f}", flush=True)  # fmt: skip
    for name, recipe in (("dspark", "q4"), ("dspark-f16", "f16")):
        export(out / f"{name}.gguf", state[0], cfg, RECIPES[recipe])
    print(json.dumps({"steps": step, "seconds": time.monotonic() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
