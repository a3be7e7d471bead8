"""A model file, opened and checked: its config, and every tensor of the table present with the shape it must have."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from gguf.constants import GGMLQuantizationType

from ds4jax.config import ARCHITECTURE, DrafterConfig, ModelConfig, other
from ds4jax.errors import GGUFError, show
from ds4jax.io import dialect, split
from ds4jax.io.gguf import TYPES, GGUFFile
from ds4jax.io.packed import PackedFile
from ds4jax.model.tensors import Kind, MtpLayout, TensorSpec, mtp_layout, mtp_table, tensor_table
from ds4jax.profile import sign_of_0731

MTP_ARCHITECTURE = "deepseek4_mtp_support"  # general.architecture of a published MTP file

_T = GGMLQuantizationType
ALLOWED: dict[Kind, tuple[GGMLQuantizationType, ...]] = {
    "matrix": tuple(t for t in TYPES if t != _T.I32),
    "vector": (_T.F32, _T.F16, _T.BF16),
    "ids": (_T.I32,),
}


@dataclasses.dataclass(frozen=True)
class Drafter:
    """An open file whose tensors, under the names of `drafter_table`, are known to be those of `cfg`.

    types: tensor name → storage type, for every tensor.
    """

    file: GGUFFile
    cfg: DrafterConfig
    types: dict[str, GGMLQuantizationType]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open file whose tensors are known to be those of `cfg`.

    types: tensor name → storage type, for every tensor.
    mtp: the layout of the MTP head, or None. mtp_file: the file it is in, where that is not `file`.
    left_out: names of the tensors of `file` that only images need.
    drafter: the DSpark drafter in a file of its own, see `io.drafter.with_drafter`; then `cfg` has it as well.
    """

    file: GGUFFile
    cfg: ModelConfig
    types: dict[str, GGMLQuantizationType]
    mtp: MtpLayout | None
    mtp_file: GGUFFile | None = None
    left_out: tuple[str, ...] = ()
    drafter: Drafter | None = None

    @property
    def drafter_types(self) -> dict[str, GGMLQuantizationType] | None:
        """The storage types of the drafter's tensors, whose names are not unlike those of an MTP head."""
        return self.drafter.types if self.drafter else None

    def holder(self, name: str) -> GGUFFile:
        """The file that has tensor `name`."""
        return self.mtp_file if self.mtp_file and name in self.mtp_file.tensors else self.file

    def with_mtp(self, path: str | os.PathLike | GGUFFile) -> Checkpoint:
        """This main model with the MTP head in a file of its own.

        Raises GGUFError as `open_mtp` does, for a second head, or if the main model came without one.
        """
        if self.mtp:
            raise GGUFError(f"{path}: found a second MTP head, expected none: {self.file.path} has one")
        if sign := sign_of_0731(self.file.metadata, self.file.path.name):
            found = f"; its {sign} is {show(self.file.metadata[sign])}" if sign in self.file.metadata else ""
            raise GGUFError(
                f"{path}: found an MTP head, expected none beside {self.file.path}: "
                f"DeepSeek-V4-Flash-0731 and later have a DSpark drafter instead{found}"
            )
        head = open_mtp(path, self.cfg)
        return Checkpoint(self.file, head.cfg, self.types | head.types, head.mtp, head.file, self.left_out)


def check_tensors(file: GGUFFile, table: Sequence[TensorSpec]) -> None:
    """Raises GGUFError unless `file` holds the tensors of `table`, in shapes and types that fit, and no others."""
    for spec in table:
        if spec.name not in file.tensors:
            if spec.optional:
                continue
            raise GGUFError(f"{file.path}: tensor '{spec.name}': not found, expected shape {spec.shape}")
        found, allowed = file.tensors[spec.name], ALLOWED[spec.kind]
        if found.shape != spec.shape:
            raise GGUFError(f"{file.path}: tensor '{spec.name}': found shape {found.shape}, expected {spec.shape}")
        if found.type not in allowed:
            raise GGUFError(
                f"{file.path}: tensor '{spec.name}': found type {found.type.name}, "
                f"expected one of {', '.join(t.name for t in allowed)}"
            )
    unknown = [show(file.tensors[name].name) for name in file.tensors.keys() - {spec.name for spec in table}]
    if unknown:
        some = ", ".join(sorted(unknown)[:3]) + (", ..." if len(unknown) > 3 else "")
        raise GGUFError(f"{file.path}: {len(unknown)} tensors that belong to no known part of the model: {some}")


def check_expert_ids(file: GGUFFile, cfg: ModelConfig) -> None:
    """Raises GGUFError unless every expert that the hash-routed layers choose by token id exists."""
    for spec in tensor_table(cfg):
        if spec.kind == "ids" and file.has_data:
            ids = file.array(spec.name)
            low, high = ids.min(), ids.max()
            if low < 0 or high >= cfg.n_experts:
                wrong = low if low < 0 else high
                raise GGUFError(
                    f"{file.path}: tensor '{spec.name}': found expert {wrong}, expected 0 to {cfg.n_experts - 1}"
                )


def _checkpoint(file: GGUFFile, cfg: ModelConfig, table: Sequence[TensorSpec], mtp: MtpLayout | None) -> Checkpoint:
    check_tensors(file, table)
    return Checkpoint(file, cfg, {name: t.type for name, t in file.tensors.items()}, mtp)


@contextlib.contextmanager
def opened(path: str | os.PathLike | GGUFFile) -> Iterator[GGUFFile]:
    """An open file with its tensors' full names. An error in the block closes it, and names it."""
    if isinstance(path, GGUFFile):
        file = path
    else:
        file = PackedFile.open_folder(path) if os.path.isdir(path) else split.open_file(path)
    try:
        file.tensors = dialect.full_names(file.tensors)
        yield file
    except GGUFError as error:
        file.close()
        named = str(error).startswith((f"{path}: ", f"{file.path}: "))
        raise error if named else GGUFError(f"{file.path}: {error}") from None


def check_architecture(file: GGUFFile, *expected: str) -> None:
    """Raises GGUFError for a file of another architecture than those expected."""
    found = file.metadata.get("general.architecture")
    if type(found) is not str or found not in expected:
        names = " or ".join(map(repr, expected))
        raise GGUFError(f"key 'general.architecture': found {show(found)}, expected {names}{other(found)}")


def open_checkpoint(path: str | os.PathLike | GGUFFile) -> Checkpoint:
    """Opens a main model, with or without an MTP head in the same file, and checks all but the weights' values.

    path: of the file, of any part of a split one, or of a folder of `ds4jax checkpoint`; or an open file. Raises
    GGUFError naming the key or tensor, what was found and what was expected.
    """
    with opened(path) as file:
        in_mtp = [name.startswith("mtp.") for name in file.tensors]
        drafter, sidecar = dialect.drafter_in(file.tensors), dialect.is_sidecar(file.tensors)
        if sidecar or in_mtp and all(in_mtp) and not drafter:
            which = "blk.*.nextn.*" if sidecar else "mtp.*"
            raise GGUFError(f"{path}: found only an MTP head ({which}), expected the main model that it must accompany")
        if drafter:
            alone = "token_embd.weight" not in file.tensors
            expected = "the main model that it must accompany" if alone else "it in a file of its own"
            raise GGUFError(f"tensor {show(drafter)}: found a DSpark drafter, expected {expected}")
        file.metadata = dialect.complete(file.metadata, file.tensors)
        cfg = ModelConfig.from_metadata(file.metadata, file.tensors)
        all_tensors, file.tensors = file.tensors, dialect.without_images(file.tensors, cfg)
        layout = mtp_layout(cfg, file.tensors)
        table = tensor_table(cfg) + (mtp_table(cfg, layout) if layout else [])
        checkpoint = _checkpoint(file, cfg, table, layout)
        check_expert_ids(file, cfg)
        return dataclasses.replace(checkpoint, left_out=tuple(sorted(all_tensors.keys() - file.tensors.keys())))


def open_mtp(path: str | os.PathLike | GGUFFile, cfg: ModelConfig) -> Checkpoint:
    """Opens a file that holds only the MTP head of the main model `cfg`, and checks it likewise.

    It is ``mtp.0.*``, or llama.cpp's sidecar: one block after the layers of `cfg`, with ``nextn.*``. What the file says
    of the main model must be true of `cfg`. The result's config is `cfg` with n_mtp = 1.
    """
    with opened(path) as file:
        check_architecture(file, MTP_ARCHITECTURE, ARCHITECTURE)
        if drafter := dialect.drafter_in(file.tensors):
            raise GGUFError(f"tensor {show(drafter)}: found a DSpark drafter, expected an MTP head of one layer")
        layout: MtpLayout = "nextn" if dialect.is_sidecar(file.tensors) else "mtp"
        if layout == "mtp" and not any(name.startswith("mtp.") for name in file.tensors):
            raise GGUFError(
                "found no tensor mtp.0.*, expected the MTP head of a DeepSeek-V4 model, or blk.*.nextn.* alone"
            )
        if wrong := cfg.contradiction(file.metadata):
            raise GGUFError(wrong)
        if layout == "nextn":
            file.tensors = dialect.sidecar(file.tensors, cfg)
        cfg = dataclasses.replace(cfg, n_mtp=1)
        return _checkpoint(file, cfg, mtp_table(cfg, layout), layout)
