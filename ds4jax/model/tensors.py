"""The table of tensors: what a DeepSeek-V4 file holds, for a given ModelConfig. No JAX here.

Everything that must know a tensor's name, shape or sharding derives from `tensor_table`: the check of a file,
the weight tree, random initialisation, the memory plan, the loader and the writer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal

from ds4jax.config import CSA_RATIO, DrafterConfig, ModelConfig

Kind = Literal["matrix", "vector", "ids"]
# Where a multi-token-prediction head is stored: ``mtp.0.*``, usually a file of its own, or, as llama.cpp's converter
# writes it, one more block after the main layers, with ``nextn.*`` beside the block's own tensors.
MtpLayout = Literal["mtp", "nextn"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file.

    family: attribute path of the weight in `weights.Weights`, e.g. ``attn.q_b``; layers share a family.
    layer: index of the block it belongs to, or None. The block of an MTP head comes after the main layers.
    name: GGUF tensor name.
    shape: row-major shape, i.e. GGUF dims reversed: a matrix is (out, in), experts are (expert, out, in).
    axes: one logical axis name per dimension; None is never sharded.
    kind: ``matrix`` may be stored in any supported format; ``vector`` is F32 (F16 and BF16 are read too);
        ``ids`` is I32.
    optional: the file may lack it; then the main model's weight of the same family, less ``mtp.``, takes its place.
    """

    family: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kind: Kind = "matrix"
    optional: bool = False

    @property
    def role(self) -> str:
        """The family less ``mtp.`` or ``dspark.``: what the tensor does in its block, or in the head after it."""
        return self.family.removeprefix("mtp.").removeprefix("dspark.")


def _block(cfg: ModelConfig, prefix: str, layer: int | None, ratio: int, hashed: bool) -> list[TensorSpec]:
    """Tensors of one transformer block (see `tensor_table`); `prefix` is ``blk.3`` or ``mtp.0``."""
    E, N, D = cfg.embed_dim, cfg.n_streams, cfg.head_dim
    heads, groups = cfg.n_heads * D, cfg.o_groups * cfg.o_lora_rank
    mix = 2 * N + N * N
    shared = cfg.n_shared_experts * cfg.expert_dim
    out: list[TensorSpec] = []

    def add(family, name, shape, axes=None, kind: Kind = "matrix"):
        out.append(TensorSpec(family, layer, f"{prefix}.{name}", shape, axes or (None,) * len(shape), kind))

    for sub in ("attn", "ffn"):
        add(f"{sub}.hc.fn", f"hc_{sub}_fn.weight", (mix, N * E))
        add(f"{sub}.hc.base", f"hc_{sub}_base.weight", (mix,), kind="vector")
        add(f"{sub}.hc.scale", f"hc_{sub}_scale.weight", (3,), kind="vector")
        add(f"{sub}.norm", f"{sub}_norm.weight", (E,), kind="vector")

    add("attn.q_a", "attn_q_a.weight", (cfg.q_lora_rank, E))
    add("attn.q_a_norm", "attn_q_a_norm.weight", (cfg.q_lora_rank,), kind="vector")
    add("attn.q_b", "attn_q_b.weight", (heads, cfg.q_lora_rank), ("heads", None))
    add("attn.kv", "attn_kv.weight", (D, E))
    add("attn.kv_norm", "attn_kv_a_norm.weight", (D,), kind="vector")
    add("attn.sinks", "attn_sinks.weight", (cfg.n_heads,), ("heads",), kind="vector")
    add("attn.o_a", "attn_output_a.weight", (groups, heads // cfg.o_groups), ("groups", None))
    add("attn.o_b", "attn_output_b.weight", (E, groups), (None, "groups"))

    def compressor(family, name, dim):
        width = (2 if ratio == CSA_RATIO else 1) * dim
        add(f"{family}.kv", f"{name}_kv.weight", (width, E))
        add(f"{family}.gate", f"{name}_gate.weight", (width, E))
        add(f"{family}.ape", f"{name}_ape.weight", (ratio, width))
        add(f"{family}.norm", f"{name}_norm.weight", (dim,), kind="vector")

    if ratio:
        kind = "csa" if ratio == CSA_RATIO else "hca"
        compressor(f"{kind}.compressor", "attn_compressor", D)
    if ratio == CSA_RATIO:
        add("csa.indexer.q_b", "indexer.attn_q_b.weight", (cfg.index_heads * cfg.index_head_dim, cfg.q_lora_rank))
        add("csa.indexer.proj", "indexer.proj.weight", (cfg.index_heads, E))
        compressor("csa.indexer.compressor", "indexer_compressor", cfg.index_head_dim)

    add("ffn.router", "ffn_gate_inp.weight", (cfg.n_experts, E))
    if hashed:
        add("hash.tid2eid", "ffn_gate_tid2eid.weight", (cfg.vocab_size, cfg.n_experts_used), kind="ids")
    else:
        add("route.bias", "exp_probs_b.bias", (cfg.n_experts,), kind="vector")
    for fam, suffix, n, axes in (
        ("experts", "exps", cfg.expert_dim, ("experts",)),
        ("shared", "shexp", shared, ()),
    ):
        lead = (cfg.n_experts,) if axes else ()
        width = None if axes else "ffn"
        add(f"ffn.{fam}.gate", f"ffn_gate_{suffix}.weight", (*lead, n, E), (*axes, width, None))
        add(f"ffn.{fam}.up", f"ffn_up_{suffix}.weight", (*lead, n, E), (*axes, width, None))
        add(f"ffn.{fam}.down", f"ffn_down_{suffix}.weight", (*lead, E, n), (*axes, None, width))
    return out


def tensor_table(cfg: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the main model, in file order (names and dims: ds4 and llama.cpp, arch ``deepseek4``)."""
    E, N = cfg.embed_dim, cfg.n_streams
    out = [TensorSpec("embed", None, "token_embd.weight", (cfg.vocab_size, E), (None, None))]
    for i, ratio in enumerate(cfg.compress_ratios):
        out += _block(cfg, f"blk.{i}", i, ratio, hashed=i < cfg.n_hash_layers)
    return [
        *out,
        TensorSpec("head.hc.fn", None, "output_hc_fn.weight", (N, N * E), (None, None)),
        TensorSpec("head.hc.base", None, "output_hc_base.weight", (N,), (None,), "vector"),
        TensorSpec("head.hc.scale", None, "output_hc_scale.weight", (1,), (None,), "vector"),
        TensorSpec("head.norm", None, "output_norm.weight", (E,), (None,), "vector"),
        TensorSpec("head.out", None, "output.weight", (cfg.vocab_size, E), ("vocab", None)),
    ]


def mtp_layout(cfg: ModelConfig, names: Collection[str]) -> MtpLayout | None:
    """How a file with tensors `names` holds its MTP head; None if `cfg` has none."""
    if not cfg.n_mtp:
        return None
    return "nextn" if f"blk.{cfg.n_layers}.nextn.eh_proj.weight" in names else "mtp"


def mtp_table(cfg: ModelConfig, layout: MtpLayout) -> list[TensorSpec]:
    """Every tensor of the multi-token-prediction head; families are those of a block and its own head under ``mtp.``.

    A ratio-0 block routed by score, the norms and projections that join a token's embedding (e) with the main model's
    streams (h), and a head that shares the main ``output.weight``. In layout ``nextn``, ``mtp.eh_proj`` is
    [e_proj, h_proj] side by side on the input axis, and the head's own norm and hyper-connection may be missing
    (llama.cpp then takes the main model's).
    """
    E, N = cfg.embed_dim, cfg.n_streams
    nextn = layout == "nextn"
    prefix = f"blk.{cfg.n_layers}" if nextn else "mtp.0"
    out = _block(cfg, prefix, cfg.n_layers, ratio=0, hashed=False)

    def add(family, name, shape, kind: Kind = "matrix", optional=False):
        name = f"{prefix}.nextn.{name}.weight" if nextn else f"{prefix}.{name}.weight"
        out.append(TensorSpec(family, None, name, shape, (None,) * len(shape), kind, optional))

    if nextn:
        add("eh_proj", "eh_proj", (E, 2 * E))
    else:
        add("e_proj", "e_proj", (E, E))
        add("h_proj", "h_proj", (E, E))
    add("enorm", "enorm", (E,), "vector")
    add("hnorm", "hnorm", (E,), "vector")
    add("head.norm", "shared_head_norm" if nextn else "norm", (E,), "vector", nextn)
    add("head.hc.fn", "hc_head_fn", (N, N * E), "matrix", nextn)
    add("head.hc.base", "hc_head_base", (N,), "vector", nextn)
    add("head.hc.scale", "hc_head_scale", (1,), "vector", nextn)
    return [dataclasses.replace(spec, family=f"mtp.{spec.family}") for spec in out]


def drafter_table(cfg: ModelConfig, drafter: DrafterConfig) -> list[TensorSpec]:
    """Every tensor of the DSpark drafter of the model `cfg`, named as ds4 does; families are under ``dspark.``.

    Its stages are ratio-0 blocks routed by score; `layer` is the stage. The first has what joins the model's streams,
    the last a head of its own before the model's ``output.weight``, and the Markov and confidence heads. Embedding and
    output matrix are the model's.
    """
    E, N, V, R = cfg.embed_dim, cfg.n_streams, cfg.vocab_size, drafter.markov_rank
    last = f"mtp.{drafter.stages - 1}"
    out = []
    for stage in range(drafter.stages):
        out += _block(cfg, f"mtp.{stage}", stage, ratio=0, hashed=False)

    def add(family, name, shape, kind: Kind = "matrix"):
        out.append(TensorSpec(family, None, f"{name}.weight", shape, (None,) * len(shape), kind))

    add("main_proj", "mtp.0.main_proj", (E, len(drafter.target_layers) * E))
    add("main_norm", "mtp.0.main_norm", (E,), "vector")
    add("head.norm", f"{last}.norm", (E,), "vector")
    add("head.hc.fn", f"{last}.hc_head_fn", (N, N * E))
    add("head.hc.base", f"{last}.hc_head_base", (N,), "vector")
    add("head.hc.scale", f"{last}.hc_head_scale", (1,), "vector")
    add("markov.w1", f"{last}.markov_head.markov_w1", (V, R))
    add("markov.w2", f"{last}.markov_head.markov_w2", (V, R))
    add("confidence", f"{last}.confidence_head.proj", (1, E + R))
    return [dataclasses.replace(spec, family=f"dspark.{spec.family}") for spec in out]


def model_table(cfg: ModelConfig) -> list[TensorSpec]:
    """Every tensor of a model as one file: the main model, and then, if `cfg` has one, the MTP head under ``mtp.0``."""
    return tensor_table(cfg) + (mtp_table(cfg, "mtp") if cfg.n_mtp else [])
