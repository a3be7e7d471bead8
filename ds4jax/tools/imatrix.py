"""Importance matrices: how strongly a text drives each column of each weight matrix.

    python -m ds4jax.imatrix --config NAME --text FILE --out F.gguf [--ctx 512] [--chunks N]
    python -m ds4jax.imatrix --merge A.gguf,B.gguf --out F.gguf

The model reads the text, and for every matrix the squares of what it is multiplied with are summed, column by column,
over the tokens; for routed experts, over the tokens that were routed to each. The sums over the counts weigh the
squared errors that a quantizer makes (`ds4jax.formats.quantize`). Files are those of llama.cpp's tools.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from jax.sharding import PartitionSpec
from tqdm import tqdm

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, Ds4Error, show
from ds4jax.files import LARGE, read_small
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.imatrix import Entry, Imatrix, merge
from ds4jax.io.load import load
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import mtp, transformer
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap
from ds4jax.model.tensors import MtpLayout, mtp_table, tensor_table
from ds4jax.model.transformer import bucket
from ds4jax.model.weights import SwiGLU, Weights
from ds4jax.numerics import rows as numerics
from ds4jax.numerics.precision import matmul
from ds4jax.ops.linear import linear, swiglu
from ds4jax.ops.weight import Weight, single
from ds4jax.settings import Settings
from ds4jax.tools import cli

Array = jax.Array

# ---- collection ------------------------------------------------------------------------------------------------------
# Families of matrices → what they are multiplied with, as `Tap` and `_counting` name it. The matrices between the
# attention heads and the residual streams are not among them.
_INPUTS = {
    **dict.fromkeys(("attn.q_a", "attn.kv", "csa.indexer.proj"), "attention"),
    **dict.fromkeys(
        ("csa.compressor.kv", "csa.compressor.gate", "hca.compressor.kv", "hca.compressor.gate"), "attention"
    ),
    **dict.fromkeys(("csa.indexer.compressor.kv", "csa.indexer.compressor.gate"), "attention"),
    **dict.fromkeys(("attn.q_b", "csa.indexer.q_b"), "query"),
    **dict.fromkeys(("ffn.router", "ffn.shared.gate", "ffn.shared.up"), "ffn"),
    "ffn.shared.down": "shared",
    **dict.fromkeys(("ffn.experts.gate", "ffn.experts.up"), "routed"),
    "ffn.experts.down": "weighted",
}
Totals = list[
    dict[str, tuple[Array, Array]]
]  # per layer: name of an input → sums (matrices, columns), counts (matrices,)


def collect(
    w: Weights,
    cfg: ModelConfig,
    compute: Compute,
    texts: Iterable[Sequence[int]],
    ctx: int,
    piece: int = 128,
    layout: MtpLayout | None = None,
) -> dict[str, Entry]:
    """Runs texts, of 1 to `ctx` token ids each, through the model, `piece` tokens at a time; → entries by tensor.

    Routed experts count the tokens routed to them, and ``ffn_down_exps`` sees its input after the route's weight.
    layout: of the names of the MTP head's tensors, if the model has one; see `Checkpoint.mtp`.
    """
    everywhere = sharding.replicated(compute.mesh) if compute.mesh else None
    cache = kv.empty(cfg, compute.numerics, compute.dtype, 1, ctx, everywhere)
    totals: Totals | None = None
    for text in texts:
        for start in range(0, len(text), piece):
            size = bucket(min(piece, len(text)), 2**20)
            (tokens, n), (following, n_head) = (_pad(text[s : s + piece], size) for s in (start, start + 1))
            n_head = np.minimum(n, n_head)  # the head has nothing to read with the last token of a text
            args = tokens, n, following, n_head, np.array([start == 0])
            found, cache = _observe(w, cache, *args, cfg=cfg, compute=compute)
            totals = found if totals is None else _add(totals, found)
    out = {}
    for spec in tensor_table(cfg) + (mtp_table(cfg, layout) if layout else []):
        family = spec.family.removeprefix("mtp.")
        if family in _INPUTS and totals is not None:
            layer = spec.layer if family == spec.family else cfg.n_layers
            assert layer is not None
            sums, counts = (np.asarray(x, np.float64) for x in totals[layer][_INPUTS[family]])
            if not np.isfinite(sums).all():
                raise Ds4Error(f"tensor {show(spec.name)}: found inputs that are not finite; a damaged model?")
            out[spec.name] = Entry(sums, counts)
    return out


def _pad(part: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids → int32 (1, size), and their number (1,)."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(part)] = part
    return tokens, np.array([len(part)], np.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _add(a: Totals, b: Totals) -> Totals:
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"), donate_argnames="cache")
def _observe(
    w: Weights,
    cache: Cache,
    tokens: Array,
    n: Array,
    following: Array,
    n_head: Array,
    fresh: Array,
    *,
    cfg: ModelConfig,
    compute: Compute,
) -> tuple[Totals, Cache]:
    """`transformer.forward`, and `mtp.draft` of as many tokens as have one `following`, with sums over the tokens.

    Sequences marked `fresh` (B,) are emptied first.
    """
    cache = kv.reset(cache, fresh)
    totals: Totals = [{} for _ in range(cfg.n_layers + cfg.n_mtp)]
    length = cache.length
    X, cache = transformer.forward(w, cache, tokens, n, cfg, compute, _counting(totals, tokens, n, w, cfg, compute))
    if cfg.n_mtp:
        tap = _counting(totals, tokens, n_head, w, cfg, compute)
        _, _, cache = mtp.draft(w, cache, X, following, length, n_head, cfg, compute, tap)
    return totals, cache


def _counting(totals: Totals, tokens: Array, n: Array, w: Weights, cfg: ModelConfig, compute: Compute) -> Tap:
    """A tap that puts the sums of squares of what a layer's matrices are multiplied with into `totals`."""
    real = (jnp.arange(tokens.shape[1], dtype=jnp.int32) < n[:, None]).reshape(-1, 1).astype(jnp.float32)
    kept: dict[str, Any] = {}

    def sums(x: Array, who: Array) -> tuple[Array, Array]:
        """x (S, columns); who (S, matrices), 1 where a matrix is multiplied with that row."""
        x = x.astype(jnp.float32)
        return matmul("sm,si->mi", who, x * x), who.sum(0)

    def tap(layer: int, name: str, x: Any) -> None:
        if name not in ("attention", "query", "ffn", "shared", "routing"):
            return
        found = totals[layer]
        if name != "routing":
            kept[name] = x() if callable(x) else x
            found[name] = sums(kept[name], real)
            return
        chosen = (x.ids[..., None] == jnp.arange(cfg.n_experts, dtype=x.ids.dtype)).any(1).astype(jnp.float32) * real
        found["routed"] = sums(kept["ffn"], chosen)
        experts = jax.tree.map(lambda m: m.value, w.ffn.experts.at(layer), is_leaf=lambda m: isinstance(m, Weight))
        run = _weighted if compute.mesh is None else functools.partial(_sharded_weighted, mesh=compute.mesh)
        found["weighted"] = run(kept["ffn"], x.ids, x.weight * real, experts, cfg.clamp(layer)), found["routed"][1]

    return tap


def _weighted(x: Array, ids: Array, weight: Array, w: SwiGLU, clamp: float, first: Array | int = 0) -> Array:
    """For the experts held in w, which are first, first + 1, …: Σ over tokens of (activation · weight)², (held, F).

    x (S, E); ids, weight (S, k). The weight of tokens that do not count is 0.
    """

    def one(_, expert: tuple[SwiGLU, Array]) -> tuple[None, Array]:
        e, i = expert
        share = jnp.where(ids == i, weight, 0).sum(-1, keepdims=True)
        act = swiglu(linear(x, single(e.gate)), linear(x, single(e.up)), clamp).astype(jnp.float32) * share
        return None, (act * act).sum(0)

    return lax.scan(one, None, (w, first + jnp.arange(w.gate.shape[0], dtype=ids.dtype)))[1]


def _sharded_weighted(x: Array, ids: Array, weight: Array, w: SwiGLU, clamp: float, mesh: jax.sharding.Mesh) -> Array:
    """`_weighted` with the expert axis spread over the mesh."""
    axes = sharding.RULES["experts"]

    def local(x, ids, weight, w):
        return _weighted(x, ids, weight, w, clamp, lax.axis_index(axes) * w.gate.shape[0])

    everywhere = PartitionSpec()
    by_expert = jax.tree.map(lambda _: sharding.partition_spec(("experts", None, None)), w)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, everywhere, everywhere, by_expert), out_specs=PartitionSpec(axes),
        check_vma=False,
    )(x, ids, weight, w)  # fmt: skip


# ---- command line ----------------------------------------------------------------------------------------------------
FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_string("text", None, "A UTF-8 file for the model to read.", flag_values=FLAGS)
flags.DEFINE_integer("ctx", 512, "Tokens that are read together, the first of them BOS.", flag_values=FLAGS)
flags.DEFINE_integer("chunks", None, "Read no more than this many times --ctx tokens.", flag_values=FLAGS)
flags.DEFINE_list("merge", None, "Instead of reading a text: files to add up, with commas.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The GGUF file to write.", flag_values=FLAGS)


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if not FLAGS.out or bool(FLAGS.text) == bool(FLAGS.merge):
        raise ConfigError("expected --out FILE, and either --text FILE or --merge A,B")
    result = merge([Imatrix.read(path) for path in FLAGS.merge]) if FLAGS.merge else _read_text(Path(FLAGS.text))
    result.write(FLAGS.out)
    experts = [entry.counts for entry in result.entries.values() if len(entry.counts) > 1]
    unseen = sum(int((counts == 0).sum()) for counts in experts)
    print(f"{FLAGS.out}: {len(result.entries)} tensors, {result.chunks} chunks of {result.chunk_size} tokens; "
          f"{unseen} of {sum(map(len, experts))} expert matrices saw no token", file=sys.stderr)  # fmt: skip


def _read_text(path: Path) -> Imatrix:
    try:
        text = read_small(path, LARGE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Ds4Error(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if FLAGS.chunks is not None and FLAGS.chunks < 1:
        raise ConfigError(f"chunks: found {FLAGS.chunks}, expected at least 1")
    settings = Settings.load(FLAGS.config, model=FLAGS.model, ctx=FLAGS.ctx, draft="off")
    settings.set_environment()
    checkpoint = open_checkpoint(resolve_model(settings))
    tokenizer = Tokenizer.from_metadata(checkpoint.file.metadata)
    numerics.check(checkpoint.cfg, settings.numerics)
    chunks = itertools.batched(tokenizer.encode_text(text), settings.ctx - 1)
    chunks = [(tokenizer.bos_id, *chunk) for chunk in itertools.islice(chunks, FLAGS.chunks)]
    if not chunks:
        raise Ds4Error(f"{path}: found no text")
    mesh = sharding.make_mesh(settings.tp, settings.ep) if settings.tp * settings.ep > 1 else None
    w, _ = load(checkpoint, mesh, progress=True)
    compute = Compute(settings.numerics, settings.dtype, mesh)
    bar = tqdm(chunks, desc="reading", unit="chunk")
    entries = collect(w, checkpoint.cfg, compute, bar, settings.ctx, settings.prefill_chunk, checkpoint.mtp)
    return Imatrix(entries, [path.name], len(chunks), settings.ctx)
