"""Recipes: which GGUF type each matrix of a file is stored in. No JAX here.

A recipe is a function of a `TensorSpec`, asked about matrices only: vectors are always F32 and routing ids I32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ds4jax.errors import ConfigError
from ds4jax.model.tensors import TensorSpec
from ds4jax.unfiled import AnyType, Unfiled, sizes

Type = GGMLQuantizationType
Recipe = Callable[[TensorSpec], Type]

# The types that matrices can be written in.
MATRIX_TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q2_K, Type.IQ2_XXS, Type.MXFP4)


def fits(spec: TensorSpec, qtype: AnyType) -> bool:
    """Whether the rows of a tensor are whole blocks of a type."""
    return spec.shape[-1] % sizes(qtype)[0] == 0


_Q2, _Q4, _MXFP4 = (Type.IQ2_XXS, Type.Q2_K), (Type.Q4_K, Type.Q4_K), (Type.MXFP4, Type.MXFP4)


def _published(experts: tuple[Type, Type], late: tuple[Type, Type], mtp: tuple[Type, Type] = _Q4) -> Recipe:
    """The types of the published files, which differ only in the routed experts.

    experts: of gate and up, and of down, for the model's layers and a drafter's stages. late: from layer 37 on, of 43.
    mtp: of an MTP head.
    """

    def types(spec: TensorSpec) -> Type:
        role, of_drafter = spec.role, spec.family.startswith("dspark.")
        if role.startswith("ffn.experts."):
            of_mtp, is_late = spec.family.startswith("mtp."), not of_drafter and (spec.layer or 0) >= 37
            gate_up, down = mtp if of_mtp else late if is_late else experts
            return down if role.endswith("down") else gate_up
        if role in ("head.out", "e_proj", "h_proj", "eh_proj") or role.startswith("ffn.shared."):
            return Type.Q8_0
        if role.startswith("attn.") and not role.startswith("attn.hc.") or of_drafter and ".hc." not in role:
            return Type.Q8_0
        return Type.F16

    return types


RECIPES: dict[str, Recipe] = {
    "f32": lambda spec: Type.F32,
    "f16": lambda spec: Type.F16,
    "q8": lambda spec: Type.Q8_0,
    "q2": _published(_Q2, _Q2),
    "q2-q4": _published(_Q2, late=_Q4),
    "q4": _published(_Q4, _Q4),
    "mxfp4": _published(_MXFP4, _MXFP4, mtp=_MXFP4),
}


_E4M3 = ("attn.q_a", "attn.q_b", "attn.kv", "attn.o_a", "attn.o_b")


def _official(spec: TensorSpec) -> AnyType:
    """The types of DeepSeek's own checkpoint: MXFP4 experts, E4M3 in attention and in the shared expert, else BF16.

    Matrices of the streams are F32 there.
    """
    if spec.role.startswith("ffn.experts."):
        return Type.MXFP4
    if spec.role in _E4M3 or spec.role.startswith("ffn.shared."):
        return Unfiled.E4M3
    return Type.F32 if ".hc." in spec.role else Type.BF16


RANDOM_RECIPES: dict[str, Callable[[TensorSpec], AnyType]] = {
    **{name: RECIPES[name] for name in ("q2", "q2-q4", "q4", "mxfp4")},
    "official": _official,
}
"""Recipes of random weights: the published files', and official, whose E4M3 no GGUF file can have."""


def parse_types(pairs: Iterable[str]) -> dict[str, Type]:
    """``["ffn.experts=MXFP4", "embed=Q8_0"]`` → {family: type}. Raises ConfigError for what is not of this form."""
    names = {qtype.name: qtype for qtype in MATRIX_TYPES}
    out = {}
    for pair in pairs:
        family, equals, name = pair.strip().partition("=")
        if not equals or name.upper() not in names:
            raise ConfigError(f"types: found {pair!r}, expected FAMILY=TYPE with a type of {', '.join(names)}")
        if family in out:
            raise ConfigError(f"types: found {family!r} twice, expected once")
        out[family] = names[name.upper()]
    return out


def choose(table: Sequence[TensorSpec], recipe: Recipe, overrides: Mapping[str, Type]) -> dict[str, Type]:
    """Tensor name → type for every tensor of a table.

    overrides: by family, or by the start of one up to a dot (``ffn.experts`` is all three of them, ``mtp`` or
        ``dspark`` the whole head or drafter); the longest wins.
    Raises ConfigError if an override is about no matrix, or where rows are not whole blocks of their type.
    """
    out, used = {}, set()
    for spec in table:
        if spec.kind != "matrix":
            out[spec.name] = Type.F32 if spec.kind == "vector" else Type.I32
            continue
        parts = spec.family.split(".")
        ways = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        override = next((way for way in ways if way in overrides), None)
        used.add(override)
        out[spec.name] = qtype = recipe(spec) if override is None else overrides[override]
        if not fits(spec, qtype):
            raise ConfigError(
                f"tensor '{spec.name}': found rows of {spec.shape[-1]} values, expected a multiple of "
                f"{GGML_QUANT_SIZES[qtype][0]} for {qtype.name}; choose a type with --types {spec.family}=TYPE"
            )
    if unknown := sorted(overrides.keys() - used):
        families = sorted({spec.family for spec in table if spec.kind == "matrix"})
        raise ConfigError(f"types: found family {unknown[0]!r}, expected one of {', '.join(families)}, or its start")
    return out
