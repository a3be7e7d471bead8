"""Importance matrices: how strongly a text drives each column of each weight matrix.

    ds4jax imatrix --config NAME --text FILE --out F.gguf [--ctx 512] [--chunks N] [--drafter D.gguf]
    ds4jax imatrix --merge A.gguf,B.gguf --out F.gguf

The model reads the text, and for every matrix the squares of what it is multiplied with are summed, column by column,
over the tokens; for routed experts, over the tokens that were routed to each. The sums over the counts weigh the
squared errors that a quantizer makes (`ds4jax.formats.quantize`). Files are those of llama.cpp's tools.

With --drafter, the model's DSpark drafter drafts along the text, and its stages are in the file too. An MTP head is
then not, whose tensors have the same names.
"""

from __future__ import annotations

import dataclasses
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

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, Ds4Error, show
from ds4jax.files import LARGE, read_small
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.imatrix import Entry, Imatrix, merge
from ds4jax.io.load import load, load_drafter
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import dspark, mtp, transformer
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap
from ds4jax.model.spread import WHOLE, spread
from ds4jax.model.tensors import MtpLayout, drafter_table, mtp_table, tensor_table
from ds4jax.model.transformer import bucket
from ds4jax.model.weights import Dspark, SwiGLU, Weights
from ds4jax.numerics import rows as numerics
from ds4jax.numerics.precision import matmul
from ds4jax.ops.linear import linear, swiglu
from ds4jax.ops.weight import Weight, single
from ds4jax.settings import Settings
from ds4jax.sharding import EXPERT, TENSOR, gathered, place
from ds4jax.terminal import counted, meter
from ds4jax.tools import cli

Array = jax.Array

# ---- collection ------------------------------------------------------------------------------------------------------
# Families of matrices → what they are multiplied with, as `Tap` and `_counting` name it. The matrices between the
# attention heads and the residual streams are not among them, nor what only a drafter has.
_INPUTS = {
    **dict.fromkeys(("attn.q_a", "csa.indexer.proj"), "attention"),
    "attn.kv": "rows",
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
    d: Dspark | None = None,
) -> dict[str, Entry]:
    """Runs texts, of 1 to `ctx` token ids each, through the model, `piece` tokens at a time; → entries by tensor.

    Routed experts count the tokens routed to them, and ``ffn_down_exps`` sees its input after the route's weight.
    layout: of the names of the MTP head's tensors, if the model has one; see `Checkpoint.mtp`. d: the drafter
    `cfg.drafter`, whose stages then take the head's place.
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
            found, cache = _observe(dataclasses.replace(w, dspark=d), cache, *args, cfg=cfg, compute=compute)
            totals = found if totals is None else _add(totals, found)
    table = [(spec, spec.layer) for spec in tensor_table(cfg)]
    if d is not None:
        assert cfg.drafter is not None
        table += [(spec, cfg.stages.start + (spec.layer or 0)) for spec in drafter_table(cfg, cfg.drafter)]
    elif layout:
        table += [(spec, cfg.n_layers) for spec in mtp_table(cfg, layout)]
    out = {}
    for spec, layer in table:
        family = spec.family.removeprefix("mtp.").removeprefix("dspark.")
        if family in _INPUTS and totals is not None:
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

    Sequences marked `fresh` (B,) are emptied first. With a drafter, `_drafted` takes the head's place.
    """
    step = spread(functools.partial(_step, cfg=cfg, compute=compute), compute.mesh, cfg, [WHOLE] * 5, [WHOLE])
    return step(w, cache, tokens, n, following, n_head, fresh)


def _step(
    w: Weights, cache: Cache, tokens: Array, n: Array, following: Array, n_head: Array, fresh: Array, *,
    cfg: ModelConfig, compute: Compute,
) -> tuple[Totals, Cache]:  # fmt: skip
    """`_observe` on one device, or on each of a mesh."""
    d, cache = w.dspark, kv.reset(cache, fresh)
    totals: Totals = [{} for _ in range(cfg.stages.stop)]
    length = cache.length
    counting = _counting(totals, tokens, n, w, cfg, compute)
    taps = dspark.Taps(cfg) if d is not None else None

    def both(layer: int, name: str, x: Any) -> None:
        counting(layer, name, x)
        if taps is not None:
            taps(layer, name, x)

    X, cache = transformer.forward(w, cache, tokens, n, cfg, compute, both)
    if d is not None and taps is not None:
        features = taps.features(len(tokens))
        drafted = _drafted(w, d, cache, tokens, features, length, n, cfg, compute)
        totals[cfg.stages.start :] = drafted[cfg.stages.start :]
        cache = dspark.write(d, cache, features, length, n, cfg, compute)
    elif cfg.n_mtp:
        tap = _counting(totals, tokens, n_head, w, cfg, compute)
        _, _, cache = mtp.draft(w, cache, X, following, length, n_head, cfg, compute, tap)
    return totals, cache


def _drafted(
    w: Weights,
    d: Dspark,
    cache: Cache,
    tokens: Array,
    features: Array,
    start: Array,
    n: Array,
    cfg: ModelConfig,
    compute: Compute,
) -> Totals:
    """The sums over a block of drafts after every so many of the tokens as a block has, and over the context's rows.

    cache: after the tokens, but with the stages' windows as before them. start (B,): the tokens before them.
    """
    assert cfg.drafter is not None
    (B, T), slots = tokens.shape, cfg.drafter.block_size
    staged = dataclasses.replace(w, attn=d.attn, ffn=d.ffn, route=d.route)

    def block(at: Array) -> Totals:
        """at (): how many of the tokens are context; the next is the block's anchor."""
        here: Totals = [{} for _ in range(cfg.stages.stop)]
        before = dspark.write(d, cache, features, start, jnp.broadcast_to(at, (B,)), cfg, compute)
        before = dataclasses.replace(before, length=start + at)
        size = jnp.where((at < n) & (start + at > 0), slots, 0)  # there is no draft without context
        tap = _counting(here, jnp.zeros((B, slots), jnp.int32), size, staged, cfg, compute)
        dspark.hidden(w, d, before, tokens[:, at], size, cfg, compute, tap)
        return here

    anchors = jnp.arange(0, T, slots, dtype=jnp.int32)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(block, anchors[0]))
    found, _ = lax.scan(lambda sums, at: (jax.tree.map(jnp.add, sums, block(at)), None), empty, anchors)
    m = dspark.joined(d, features, cfg, compute).reshape(B * T, -1)
    context = _sums(m, _real(T, n))
    for stage in cfg.stages:
        found[stage]["rows"] = jax.tree.map(jnp.add, found[stage]["rows"], context)
    return found


def _real(T: int, n: Array) -> Array:
    """1 for each of the first n (B,) of T tokens, 0 for the others: (B·T, 1)."""
    return (jnp.arange(T, dtype=jnp.int32) < n[:, None]).reshape(-1, 1).astype(jnp.float32)


def _sums(x: Array, who: Array) -> tuple[Array, Array]:
    """Sums of squares and counts. x (S, columns); who (S, matrices), 1 where a matrix is multiplied with that row."""
    x = x.astype(jnp.float32)
    return matmul("sm,si->mi", who, x * x), who.sum(0)


def _counting(totals: Totals, tokens: Array, n: Array, w: Weights, cfg: ModelConfig, compute: Compute) -> Tap:
    """A tap that puts the sums of squares of what a layer's matrices are multiplied with into `totals`."""
    real = _real(tokens.shape[1], n)
    kept: dict[str, Any] = {}

    def tap(layer: int, name: str, x: Any) -> None:
        if name not in ("attention", "query", "ffn", "shared", "routing"):
            return
        found = totals[layer]
        if name != "routing":
            kept[name] = x() if callable(x) else x
            sums, counts = _sums(kept[name], real)
            found[name] = gathered(sums, compute.mesh, TENSOR) if name == "shared" else sums, counts
            if name == "attention":
                found["rows"] = found[name]
            return
        chosen = (x.ids[..., None] == jnp.arange(cfg.n_experts, dtype=x.ids.dtype)).any(1).astype(jnp.float32) * real
        found["routed"] = _sums(kept["ffn"], chosen)
        experts = jax.tree.map(lambda m: m.value, w.ffn.experts.at(layer), is_leaf=lambda m: isinstance(m, Weight))
        first = place(compute.mesh, EXPERT, TENSOR) * experts.gate.shape[0]
        sums = _weighted(kept["ffn"], x.ids, x.weight * real, experts, cfg.clamp(layer), first)
        sums = gathered(gathered(sums, compute.mesh, TENSOR, 0), compute.mesh, EXPERT, 0)[: cfg.n_experts]
        found["weighted"] = sums, found["routed"][1]

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


# ---- command line ----------------------------------------------------------------------------------------------------
FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_string(
    "drafter", None, "The file of the model's DSpark drafter, if it is to be in --out too.", flag_values=FLAGS
)
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
    mesh = sharding.make_mesh(settings.tp, settings.ep, settings.dp) if settings.devices > 1 else None
    cfg, d = checkpoint.cfg, None
    if FLAGS.drafter:
        d, cfg = load_drafter(resolve_model(dataclasses.replace(settings, model=FLAGS.drafter)), checkpoint, mesh)
    w, _ = load(checkpoint, mesh, progress=True)
    compute = Compute(settings.numerics, settings.dtype, mesh)
    with meter(len(chunks), "reading", "chunk") as bar:
        texts = counted(chunks, bar)
        entries = collect(w, cfg, compute, texts, settings.ctx, settings.prefill_chunk, checkpoint.mtp, d)
    return Imatrix(entries, [path.name], len(chunks), settings.ctx)
