"""The weight tree. `abstract(cfg, types)` describes every leaf; everything else about weights derives from it.

Weights of one family (say, every layer's ``attn.q_b``) are stacked over layers into few arrays: a `Stack`. The
attribute path of a family is `TensorSpec.family`, so this file and `tensors.py` mirror each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, GGUFError
from ds4jax.formats import FORMATS, UNFILED, WIDE, Quantized
from ds4jax.model.tensors import TensorSpec, drafter_table, mtp_layout, mtp_table, tensor_table
from ds4jax.ops.weight import Weight, single
from ds4jax.unfiled import AnyType

Leaf = Any  # Stack of Quantized or Array; after `.at(layer)`, Weight; in `abstract`, WeightSpec

# A stack stays below 2^31 bytes, so that 32-bit element offsets reach all of it. Layers that do not fit in one stand
# alone: the code of a kernel names the length of its stack, and XLA compiles equal code once.
MAX_STACK_BYTES = 2**31 - 1


@struct.dataclass
class Stack:
    """One weight family over layers, as few arrays: each group holds the layers of one format along axis 0.

    groups: Quantized (layers, ..., out, in) or Array (layers, ...).
    layers: the model's layer numbers in each group.
    """

    groups: tuple[Any, ...]
    layers: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)

    def at(self, layer: int) -> Weight:
        """A layer's weight: the group that holds it, and its number there."""
        for group, layers in zip(self.groups, self.layers, strict=True):
            if layer in layers:
                return Weight(group, layers.index(layer))
        raise KeyError(f"no weight for layer {layer}; this family has layers {self.layers}")

    def __getitem__(self, layer: int) -> Quantized | jax.Array:
        return self.at(layer).value


class Family:
    """Base of the dataclasses below."""

    def at(self, layer: int) -> Self:
        """The same tree with one layer's `Weight` in place of every Stack."""
        return jax.tree.map(lambda s: s.at(layer), self, is_leaf=lambda x: isinstance(x, Stack))

    def single(self) -> Self:
        """The same tree, of weights that belong to no layer, with a `Weight` for each."""
        return jax.tree.map(single, self, is_leaf=lambda x: isinstance(x, Quantized))


@struct.dataclass
class HyperConnection(Family):
    """Manifold-constrained hyper-connection: fn (2N + N², N·E), base (2N + N²), scale (3). In the head: N, N, 1."""

    fn: Leaf
    base: Leaf
    scale: Leaf


@struct.dataclass
class Attention(Family):
    """hc; norm (E); q_a (Rq, E), q_a_norm (Rq), q_b (H·D, Rq); kv (D, E), kv_norm (D); sinks (H);
    o_a (G·Ro, H·D/G), o_b (E, G·Ro)."""

    hc: HyperConnection
    norm: Leaf
    q_a: Leaf
    q_a_norm: Leaf
    q_b: Leaf
    kv: Leaf
    kv_norm: Leaf
    sinks: Leaf
    o_a: Leaf
    o_b: Leaf


@struct.dataclass
class Compressor(Family):
    """kv, gate (c·D, E); ape (R, c·D); norm (D). c = 2 for overlapping windows (ratio 4), else 1."""

    kv: Leaf
    gate: Leaf
    ape: Leaf
    norm: Leaf


@struct.dataclass
class Indexer(Family):
    """q_b (Hi·Di, Rq); proj (Hi, E); compressor of width Di."""

    q_b: Leaf
    proj: Leaf
    compressor: Compressor


@struct.dataclass
class CSA(Family):
    """What layers of ratio 4 have besides `Attention`."""

    compressor: Compressor
    indexer: Indexer


@struct.dataclass
class HCA(Family):
    """What layers of ratio 128 have besides `Attention`."""

    compressor: Compressor


@struct.dataclass
class SwiGLU(Family):
    """gate, up (..., F, E); down (..., E, F). Routed experts have a leading expert axis."""

    gate: Leaf
    up: Leaf
    down: Leaf


@struct.dataclass
class FFN(Family):
    """hc; norm (E); router (n_experts, E); routed experts; the shared expert."""

    hc: HyperConnection
    norm: Leaf
    router: Leaf
    experts: SwiGLU
    shared: SwiGLU


@struct.dataclass
class Hash(Family):
    """The first layers route by token id. tid2eid: int32 (vocab, n_experts_used)."""

    tid2eid: Leaf


@struct.dataclass
class Route(Family):
    """The other layers choose the experts of largest score + bias. bias (n_experts)."""

    bias: Leaf


@struct.dataclass
class Head(Family):
    """hc: fn (N, N·E), base (N), scale (1); norm (E); out (vocab, E)."""

    hc: HyperConnection
    norm: Leaf
    out: Leaf


@struct.dataclass
class MtpHead(Family):
    """hc: fn (N, N·E), base (N), scale (1); norm (E). The output matrix is the main model's."""

    hc: HyperConnection
    norm: Leaf


@struct.dataclass
class Mtp(Family):
    """What a multi-token-prediction head has besides its block: e_proj, h_proj (E, E); enorm, hnorm (E); head."""

    e_proj: Leaf
    h_proj: Leaf
    enorm: Leaf
    hnorm: Leaf
    head: MtpHead


@struct.dataclass
class Markov(Family):
    """The bias that a token puts on the next one's logits: w2 · w1[token]. w1, w2 (vocab, R)."""

    w1: Leaf
    w2: Leaf


@struct.dataclass
class Dspark(Family):
    """A DSpark drafter. attn, ffn, route: its stages, the layers `ModelConfig.stages`. main_proj (E, taps·E), main_norm
    (E); head; markov; confidence (1, E + R). Embedding and output matrix are the model's."""

    attn: Attention
    ffn: FFN
    route: Route
    main_proj: Leaf
    main_norm: Leaf
    head: MtpHead
    markov: Markov
    confidence: Leaf


@struct.dataclass
class Weights:
    """The whole model. embed (vocab, E); families over layers; head.

    mtp: None without an MTP head. Its block is one more layer of ratio 0 in the families over layers, number n_layers.
    dspark: the DSpark drafter that goes with the model, or None.
    """

    embed: Leaf
    attn: Attention
    csa: CSA
    hca: HCA
    ffn: FFN
    hash: Hash
    route: Route
    head: Head
    mtp: Mtp | None
    dspark: Dspark | None = None


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One leaf of `abstract`: a stacked group of a layered family, or a single weight.

    format: Quantized subclass, or a numpy dtype for plain arrays (vectors and ids).
    shape, axes: logical shape and axis names; a layered family has a leading "layers" axis.
    tensors: the file's tensors, in the order of that axis.
    missing: how many of the experts in `shape` no file has, see `even`.
    part: (i, n) for the i-th of n equal parts of the tensors' columns; `shape` is that of the part.
    """

    format: type[Quantized] | np.dtype
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    tensors: tuple[TensorSpec, ...]
    part: tuple[int, int] = (0, 1)
    missing: int = 0

    def even(self, mesh: Mesh | AbstractMesh) -> WeightSpec:
        """The spec with empty experts added, to which no token goes, so that a mesh divides them evenly."""
        if "experts" not in self.axes:
            return self
        in_files = self.shape[self.axes.index("experts")] - self.missing
        return self._with_missing(-in_files % sharding.parts(mesh, "experts"))

    def _with_missing(self, missing: int) -> WeightSpec:
        """The same experts of files, and so many more that no file has."""
        added = self._along_experts(missing - self.missing)
        shape = tuple(n + more for n, more in zip(self.shape, added, strict=True))
        return dataclasses.replace(self, shape=shape, missing=missing)

    def _along_experts(self, n: int) -> tuple[int, ...]:
        """For each axis: n along the experts, 0 along others."""
        return tuple(n if axis == "experts" else 0 for axis in self.axes)

    @property
    def quantized(self) -> bool:
        """Whether `format` is a Quantized class, as opposed to a plain dtype."""
        return not isinstance(self.format, np.dtype)

    @property
    def layered(self) -> bool:
        return self.tensors[0].layer is not None

    def struct(self) -> Any:
        """Shapes and dtypes: a Quantized of `jax.ShapeDtypeStruct`, or one `jax.ShapeDtypeStruct`."""
        if isinstance(self.format, np.dtype):
            return jax.ShapeDtypeStruct(self.shape, self.format)
        return self.format.struct(self.shape)

    @property
    def stored(self) -> type[Quantized] | np.dtype:
        """`format` as the file has it."""
        return self.format if isinstance(self.format, np.dtype) else self.format.stored or self.format

    def shardings(self, mesh: Mesh | AbstractMesh) -> Any:
        """The same structure with a NamedSharding per plane (planes have the logical rank, so one spec serves all).

        Raises ConfigError if an axis cannot be shared out evenly, in whole blocks of the format.
        """
        name = self.tensors[0].name
        block = 1 if isinstance(self.format, np.dtype) else self.format.block
        if self.shape[-1] % (blocks := sharding.parts(mesh, self.axes[-1]) * block):
            raise ConfigError(
                f"mesh {dict(mesh.shape)}: {name} has {self.shape[-1]} columns, not a multiple of {blocks}: each "
                f"device takes whole blocks of {_format_name(self.format)}"
            )

        def plane_sharding(plane: jax.ShapeDtypeStruct) -> NamedSharding:
            return sharding.named_sharding(mesh, self.axes, plane.shape, f"{name} as {_format_name(self.format)}")

        return jax.tree.map(plane_sharding, self.struct())

    @property
    def nbytes(self) -> int:
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(self.struct()))

    def random(self, key: jax.Array, cfg: ModelConfig) -> Any:
        """A well-scaled random value: a forward pass neither vanishes nor explodes, and every part of it matters."""
        if self.missing:
            added = [(0, n) for n in self._along_experts(self.missing)]
            return jax.tree.map(lambda p: jnp.pad(p, added), self._with_missing(0).random(key, cfg))
        spec = self.tensors[0]
        leaf = spec.family.rsplit(".", 1)[-1]
        if spec.kind == "ids":
            # Distinct experts per token: a random start and an odd stride would collide, so rank random numbers.
            noise = jax.random.uniform(key, (*self.shape[:-1], cfg.n_experts))
            return jnp.argsort(noise, axis=-1)[..., : self.shape[-1]].astype(jnp.int32)
        if spec.kind == "vector":
            noise = jax.random.normal(key, self.shape, jnp.float32)
            leaf = "norm" if leaf.endswith("norm") else leaf
            mean, std = {"norm": (1, 0.1), "scale": (1, 0.1), "bias": (0, 0.01)}.get(leaf, (0, 0.5))
            return mean + std * noise
        assert not isinstance(self.format, np.dtype)
        return self.format.random(key, self.shape, 1.0 if leaf == "embed" else self.shape[-1] ** -0.5)


def _format_name(fmt: type[Quantized] | np.dtype) -> str:
    return fmt.name if isinstance(fmt, np.dtype) else fmt.ggml_type.name


Types = Mapping[str, GGMLType] | Callable[[TensorSpec], AnyType]


def abstract(cfg: ModelConfig, types: Types, drafter: Types | None = None, wide: bool = False) -> Weights:
    """The weight tree with a `WeightSpec` in place of every array.

    types: the type of every matrix, by tensor name (a file's) or as a function (a recipe). Vectors are float32 and
    routing ids int32 whatever the file holds. A file's names also tell the layout of the MTP head.
    drafter: the types of the DSpark drafter, which is then part of the tree. wide: routed experts of the model are in
    the formats `WIDE`, where there is one.
    """
    families: dict[str, list[TensorSpec]] = {}
    for spec in tensor_table(cfg):
        families.setdefault(spec.family, []).append(spec)
    layout = mtp_layout(cfg, () if callable(types) else types)
    for spec in mtp_table(cfg, layout) if layout else ():
        in_main = spec.family.removeprefix("mtp.")
        if spec.layer is not None:  # the block: one more layer
            families.setdefault(in_main, []).append(spec)
        else:
            lacks = spec.optional and not callable(types) and spec.name not in types
            families[spec.family] = families[in_main] if lacks else [spec]
    tree = _build(Weights, "", families, types, wide)
    return tree if drafter is None else dataclasses.replace(tree, dspark=abstract_drafter(cfg, drafter))


def abstract_drafter(cfg: ModelConfig, types: Types) -> Dspark:
    """`abstract` of the DSpark drafter `cfg.drafter`. Raises ConfigError if that is None."""
    if cfg.drafter is None:
        raise ConfigError("the weights of a drafter: found a config without one")
    families: dict[str, list[TensorSpec]] = {}
    for spec in drafter_table(cfg, cfg.drafter):
        layer = None if spec.layer is None else cfg.stages[spec.layer]
        families.setdefault(spec.family, []).append(dataclasses.replace(spec, layer=layer))
    return _build(Dspark, "dspark.", families, types)


def _build(cls: type, prefix: str, families: dict[str, list[TensorSpec]], types: Types, wide: bool = False) -> Any:
    """The tree `cls` of `WeightSpec`s. prefix: of its families. wide: see `abstract`."""

    def fmt(spec: TensorSpec) -> type[Quantized] | np.dtype:
        if spec.kind != "matrix":
            return np.dtype(np.float32 if spec.kind == "vector" else np.int32)
        found = (FORMATS | UNFILED)[types(spec) if callable(types) else types[spec.name]]
        return WIDE.get(found, found) if wide and spec.family.startswith("ffn.experts.") else found

    def group(specs: list[TensorSpec]) -> WeightSpec:
        first = specs[0]
        return WeightSpec(fmt(first), (len(specs), *first.shape), ("layers", *first.axes), tuple(specs))

    def leaf(family: str) -> WeightSpec | Stack:
        specs = families.get(family, [])
        if specs and specs[0].layer is None:
            (spec,) = specs
            return WeightSpec(fmt(spec), spec.shape, spec.axes, (spec,))
        if family in ("mtp.e_proj", "mtp.h_proj"):  # layout nextn
            (spec,) = families["mtp.eh_proj"]
            rows, columns, matrix = spec.shape[0], spec.shape[1] // 2, fmt(spec)
            assert not isinstance(matrix, np.dtype)
            if columns % matrix.block:
                raise GGUFError(
                    f"tensor '{spec.name}': found type {_format_name(matrix)}, expected one whose blocks divide "
                    f"e_proj's rows of {columns} values, not blocks of {matrix.block}"
                )
            return WeightSpec(matrix, (rows, columns), spec.axes, (spec,), (int(family == "mtp.h_proj"), 2))
        groups = []
        for _, same in itertools.groupby(sorted(specs, key=lambda s: _format_name(fmt(s))), fmt):
            same = list(same)
            in_one = group(same).nbytes <= MAX_STACK_BYTES
            groups += [group(list(chunk)) for chunk in itertools.batched(same, len(same) if in_one else 1)]
        return Stack(tuple(groups), tuple(tuple(s.layer for s in g.tensors) for g in groups))

    def build(cls: type, prefix: str) -> Any:
        def child(name: str, kind: Any) -> Any:
            kinds = get_args(kind) or (kind,)  # Mtp | None: (Mtp, NoneType)
            if type(None) in kinds and not any(family.startswith(f"{prefix}{name}.") for family in families):
                return None
            if isinstance(kinds[0], type) and issubclass(kinds[0], Family):
                return build(kinds[0], f"{prefix}{name}.")
            return leaf(f"{prefix}{name}")

        return cls(**{name: child(name, kind) for name, kind in get_type_hints(cls).items()})

    return build(cls, prefix)


def structs[Tree: (Weights, Dspark)](tree: Tree) -> Tree:
    """`abstract` → the same tree of `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda s: s.struct(), tree)


def even[Tree: (Weights, Dspark)](tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """`abstract` → the same tree for a mesh, of `WeightSpec.even`."""
    return jax.tree.map(lambda s: s.even(mesh), tree)


def partition[Tree: (Weights, Dspark)](w: Tree, cfg: ModelConfig) -> Tree:
    """Where weights lie on a mesh, what `shardings` says, from the weights themselves: a tree of `PartitionSpec`s."""
    tables = [tensor_table(cfg)]
    tables += [mtp_table(cfg, "mtp")] if cfg.n_mtp else []
    tables += [drafter_table(cfg, cfg.drafter)] if cfg.drafter else []
    axes = {spec.family: spec.axes for table in tables for spec in table}
    prefix = "dspark." if isinstance(w, Dspark) else ""

    def of_matrix(path: tuple[Any, ...], matrix: Any) -> Any:
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        layered = "groups" in names
        here = axes[prefix + ".".join(name for name in names if name != "groups")]
        return jax.tree.map(lambda _: sharding.partition_spec((None, *here) if layered else here), matrix)

    return jax.tree_util.tree_map_with_path(of_matrix, w, is_leaf=lambda x: isinstance(x, Quantized))


def shardings[Tree: (Weights, Dspark)](tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """`abstract` → the same tree of `NamedSharding`s."""
    return jax.tree.map(lambda s: s.shardings(mesh), tree)


def nbytes(tree: Weights | Dspark) -> int:
    """Bytes of all weights of `abstract`, over all devices, counted once."""
    return sum(s.nbytes for s in jax.tree.leaves(tree))


def init_random[Tree: (Weights, Dspark)](
    tree: Tree,
    cfg: ModelConfig,
    seed: int = 0,
    mesh: Mesh | None = None,
    place: Callable[[WeightSpec, Any], Any] = lambda spec, made: made,
) -> Tree:
    """Random weights made on the devices, one leaf at a time; the same values for any mesh.

    place: puts each leaf where it is to be.
    """
    specs, treedef = jax.tree.flatten(tree)
    key = jax.random.key(seed)

    def lowered(spec: WeightSpec) -> jax.stages.Lowered:
        return jax.jit(lambda k: spec.random(k, cfg), out_shardings=mesh and spec.shardings(mesh)).lower(key)

    # The stacks of one family mostly have one shape, and so one program: 45 stacks of experts need six.
    firsts = [spec.tensors[0] for spec in specs]
    same = [dataclasses.replace(first, layer=None, name=first.family) for first in firsts]
    kinds = [dataclasses.replace(spec, tensors=(first,)) for spec, first in zip(specs, same, strict=True)]
    programs = {kind: lowered(kind) for kind in dict.fromkeys(kinds)}
    with ThreadPoolExecutor() as pool:  # nothing but compilation, which takes most of the time, and needs no lock
        programs = dict(zip(programs, pool.map(lambda p: p.compile(), programs.values()), strict=True))
    made = (programs[k](jax.random.fold_in(key, i)) for i, k in enumerate(kinds))
    return jax.tree.unflatten(treedef, [place(*leaf) for leaf in zip(specs, made, strict=True)])
