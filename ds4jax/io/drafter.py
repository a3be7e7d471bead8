"""The DSpark drafter of a model, in a file of its own: three dialects, which are put into one. No JAX here.

Files of ds4, and of `ds4jax convert`, name its tensors as DeepSeek does, by stage; those of other engines by what they
are (``dspark.*``), or as an architecture of llama.cpp's, ``dflash``, which numbers the layers whose outputs are read by
the layer that comes after. Embedding and output matrix are the main model's in all of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from ds4jax.config import ARCHITECTURE as MAIN_ARCHITECTURE
from ds4jax.config import PREFIX, DrafterConfig, ModelConfig
from ds4jax.errors import GGUFError, show
from ds4jax.io.checkpoint import (
    MTP_ARCHITECTURE,
    Checkpoint,
    Drafter,
    check_architecture,
    check_tensors,
    open_checkpoint,
    opened,
)
from ds4jax.io.download import resolve_model
from ds4jax.io.gguf import GGUFFile, Typed
from ds4jax.io.packed import PackedFile
from ds4jax.model.tensors import drafter_table
from ds4jax.settings import Settings

ARCHITECTURE = "deepseek4-dspark"  # general.architecture of ds4's files, and of those with dspark.*
_DFLASH = "dflash"

# The tensors after the stages: name here, L standing for the last stage → with dspark.*, with dflash.
_HEADS = {
    "mtp.0.main_proj": ("dspark.main_proj", "fc"),
    "mtp.0.main_norm": ("dspark.main_norm", "enc.output_norm"),
    "mtp.L.norm": ("dspark.norm", "output_norm"),
    "mtp.L.hc_head_fn": ("dspark.hc_head_fn", "output_hc_fn"),
    "mtp.L.hc_head_base": ("dspark.hc_head_base", "output_hc_base"),
    "mtp.L.hc_head_scale": ("dspark.hc_head_scale", "output_hc_scale"),
    "mtp.L.markov_head.markov_w1": ("dspark.markov_w1", "markov_w1"),
    "mtp.L.markov_head.markov_w2": ("dspark.markov_w2", "markov_w2"),
    "mtp.L.confidence_head.proj": ("dspark.conf_proj", "conf_proj"),
}
_PREFIXES = ("mtp", "dspark", "blk")  # of a stage's tensors

# Field of `DrafterConfig` → what its key is called, after any of three beginnings.
_KEYS = {
    "stages": ("stage_count", "layer_count", "n_layers"),
    "block_size": ("block_size",),
    "markov_rank": ("markov_rank",),
    "noise_token": ("noise_token_id",),
    "target_layers": ("target_layer_ids", "target_layers"),
}
_BEGINNINGS = ("dspark.", f"{PREFIX}dspark.", f"{PREFIX}dspark_")
_DFLASH_KEYS = {
    "stages": f"{_DFLASH}.block_count",
    "block_size": f"{_DFLASH}.block_size",
    "markov_rank": f"{_DFLASH}.markov_rank",
    "noise_token": "tokenizer.ggml.mask_token_id",
    "target_layers": f"{_DFLASH}.target_layers",
}
# What ds4's files may leave out: the values of the published drafter. It reads the last layers.
_PUBLISHED = {"block_size": 5, "noise_token": 128799}

# What both files may say of the model that they were made from → the keys that say it.
_ORIGINS = {
    "source revision": ("dspark.source.revision", "general.source.revision"),
    "checkpoint variant": (f"{PREFIX}checkpoint_variant",),
    "base version": ("general.base_model.0.version",),
}


def open_drafter(path: str | os.PathLike | GGUFFile, main: Checkpoint) -> Drafter:
    """Opens the drafter of the model `main`, in any dialect, and checks all but the weights' values.

    Raises GGUFError naming the key or tensor, what was found and what was expected: another kind of file, such as an
    MTP head, V4.1's drafter, one of another model, or one whose source is stated to be another than the main model's.
    """
    with opened(path) as file:
        check_architecture(file, ARCHITECTURE, _DFLASH)
        stages, dialect = _canonical(file)
        for name, axis, what, expected in (
            ("mtp.0.main_norm", 0, "values a stream", main.cfg.embed_dim),
            (f"mtp.{stages - 1}.markov_head.markov_w1", 0, "tokens", main.cfg.vocab_size),
            (f"mtp.{stages - 1}.hc_head_base", 0, "streams", main.cfg.n_streams),
        ):
            tensor = file.tensors.get(f"{name}.weight")
            if tensor and tensor.shape[axis] != expected:
                raise GGUFError(
                    f"tensor {show(tensor.name)}: found {tensor.shape[axis]} {what}, expected {expected}, the main "
                    "model's: this is the drafter of another model"
                )
        for prefix in (PREFIX, f"{_DFLASH}.", *_BEGINNINGS):
            if wrong := main.cfg.contradiction(file.metadata, prefix):
                raise GGUFError(wrong)
        _check_origin(file.metadata, main.file)
        values, spelled = _values(file, stages, dialect, main.cfg)
        cfg = DrafterConfig.read(values, spelled, main.cfg, GGUFError)
        if cfg.stages != stages:
            raise GGUFError(f"key '{spelled['stages']}': found {cfg.stages}, expected {stages}, as there are tensors")
        check_tensors(file, drafter_table(main.cfg, cfg))
        return Drafter(file, cfg, {name: t.type for name, t in file.tensors.items()})


def open_with_drafter(settings: Settings) -> Checkpoint:
    """The model of `settings`, and what `settings.draft` says. Raises Ds4Error if a file is missing or does not fit."""
    path = resolve_model(settings)
    return with_drafter(open_checkpoint(path), settings.draft, path)


def with_drafter(main: Checkpoint, draft: str, path: Path | None = None) -> Checkpoint:
    """A model with what drafts for it, as `Settings.draft` says. An MTP head in its own file is there already.

    path: the model's, by default as it was opened. A folder of `ds4jax checkpoint` has its drafter, or a head from a
    file of its own, in it. Raises Ds4Error as `open_drafter` and `open_mtp` do.
    """
    if draft == "auto" and isinstance(main.file, PackedFile):
        if "mtp" in main.file.roles:
            return main.with_mtp(main.file.beside("mtp"))
        return _drafting(main, main.file.beside("drafter")) if "drafter" in main.file.roles else main
    beside = beside_model(path or Path(main.file.path))
    if draft == "off" or draft == "auto" and not beside.is_file():
        return main
    chosen = beside if draft == "auto" else Path(draft).expanduser()
    if not chosen.is_file():
        raise GGUFError(f"draft: found {draft!r}, expected a GGUF file, auto or off")
    with opened(chosen) as file:
        is_mtp = file.metadata.get("general.architecture") in (MTP_ARCHITECTURE, MAIN_ARCHITECTURE)
        file.close()
    if is_mtp and draft != "auto":
        return main.with_mtp(chosen)
    return _drafting(main, chosen)


def _drafting(main: Checkpoint, file: Path | GGUFFile) -> Checkpoint:
    """A model with the DSpark drafter in a file."""
    drafter = open_drafter(file, main)
    return dataclasses.replace(main, cfg=dataclasses.replace(main.cfg, drafter=drafter.cfg), drafter=drafter)


def beside_model(path: Path) -> Path:
    """Where the drafter of a model's file lies, if it lies beside it; `ds4jax convert` puts it there."""
    return path.with_name(f"{path.stem}-dspark.gguf")


def _canonical(file: GGUFFile) -> tuple[int, int]:
    """Give the tensors their names here; → the number of stages, and the dialect: 0 ds4's, 1 dspark.*, 2 dflash."""
    tensors = file.tensors
    firsts = [f"{name}.weight" for name in ("mtp.0.main_proj", *_HEADS["mtp.0.main_proj"])]
    dialect = next((i for i, name in enumerate(firsts) if name in tensors), None)
    if dialect is None:
        heads = ("mtp.0.e_proj.weight", ".nextn.eh_proj.weight")
        if head := next((t.name for name, t in tensors.items() if name.endswith(heads)), None):
            raise GGUFError(f"tensor {show(head)}: found the MTP head of the first release, expected a DSpark drafter")
        raise GGUFError(f"found none of the tensors {', '.join(firsts)}, expected one of them: a DSpark drafter")
    if dialect == 2 and not {"markov_w1.weight", "blk.0.attn_q_a.weight"} <= tensors.keys():
        raise GGUFError(
            "found no tensor markov_w1.weight or no blk.0.attn_q_a.weight, expected a DSpark drafter of DeepSeek-V4; "
            f"other drafters are of the architecture {_DFLASH!r} too"
        )
    of_stage = re.compile(rf"{_PREFIXES[dialect]}\.(\d{{1,2}})\.")
    stages = 1 + max((int(found[1]) for name in tensors if (found := of_stage.match(name))), default=0)
    names = {}
    for own, theirs in _HEADS.items():
        own = own.replace(".L.", f".{stages - 1}.")
        names[f"{(own, *theirs)[dialect]}.weight"] = f"{own}.weight"
    file.tensors = {names.get(name) or of_stage.sub(r"mtp.\1.", name): t for name, t in tensors.items()}
    if len(file.tensors) < len(tensors):
        raise GGUFError("found tensors of the same meaning under two names, expected those of one dialect")
    confidence = f"mtp.{stages - 1}.confidence_head.proj.weight"
    if (found := file.tensors.get(confidence)) and len(found.shape) == 1:  # its one row, written as a vector
        file.tensors[confidence] = dataclasses.replace(found, shape=(1, *found.shape))
    return stages, dialect


def _values(file: GGUFFile, stages: int, dialect: int, cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The config's values by field, the tensors' where no key says them, and the fields' keys."""
    metadata, values, spelled = file.metadata, {}, {}
    for field, names in _KEYS.items():
        keys = [_DFLASH_KEYS[field]] if dialect == 2 else [start + name for name in names for start in _BEGINNINGS]
        there = [key for key in keys if key in metadata]
        spelled[field] = (there or keys)[0]
        for key in there:
            if not np.array_equal(metadata[key], metadata[there[0]]):
                found, expected = show(metadata[key]), show(metadata[there[0]])
                raise GGUFError(f"key '{key}': found {found}, expected {expected}, as '{there[0]}' has")
            values[field] = metadata[key].tolist() if isinstance(metadata[key], np.ndarray) else metadata[key]
    tensors = file.tensors
    implied: dict[str, Any] = {"stages": stages}
    if markov := tensors.get(f"mtp.{stages - 1}.markov_head.markov_w1.weight"):
        implied["markov_rank"] = markov.shape[-1]
    if dialect == 0:
        n_read = tensors["mtp.0.main_proj.weight"].shape[-1] // cfg.embed_dim
        implied |= _PUBLISHED | {"target_layers": list(range(cfg.n_layers))[-n_read:] if n_read else []}
    layers = values.get("target_layers")
    if dialect == 2 and isinstance(layers, list) and all(type(layer) is int for layer in layers):
        values["target_layers"] = [layer - 1 for layer in layers]  # they are the layers that come after
        spelled["target_layers"] += ", less 1"
    return implied | values, spelled


def _check_origin(metadata: Mapping[str, Any], main: GGUFFile) -> None:
    """Raises GGUFError if both files say what they were made from, and it is not the same."""
    for what, keys in _ORIGINS.items():
        said, expected = (next((file[k] for k in keys if k in file), None) for file in (metadata, main.metadata))
        if said is not None and expected is not None and said != expected:
            raise GGUFError(f"{what}: found {show(said)}, expected {show(expected)}, as {main.path} says of itself")


def to_metadata(cfg: DrafterConfig) -> dict[str, Any]:
    """The GGUF keys of a drafter's own file, for `gguf.write_gguf`, as ds4 has them."""
    return {
        "general.architecture": ARCHITECTURE,
        "dspark.stage_count": cfg.stages,
        "dspark.block_size": cfg.block_size,
        "dspark.markov_rank": cfg.markov_rank,
        "dspark.noise_token_id": cfg.noise_token,
        "dspark.target_layer_ids": Typed(list(cfg.target_layers), GGUFValueType.UINT32),
    }
