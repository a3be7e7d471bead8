"""llama.cpp's dialect of a model file, put into the words of `ds4jax.config` and `ds4jax.model.tensors`. No JAX here.

Its converters and their forks write tensors with or without a suffix, leave out keys that the tensors imply, and store
the MTP head as one more block: in the main file, or in a sidecar that repeats what the head shares with the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.config import PREFIX, ModelConfig
from ds4jax.errors import GGUFError, show
from ds4jax.io.gguf import TensorInfo

Tensors = Mapping[str, TensorInfo]

# Key that a file may lack → the tensor that implies it, of the first block that has one where it begins with a dot, and
# the axis of its shape. `complete` has the keys that take more than this, and no others can be lacking.
IMPLIED = {
    "vocab_size": ("token_embd.weight", 0),
    "embedding_length": ("token_embd.weight", 1),
    "attention.head_count": (".attn_sinks.weight", 0),
    "attention.key_length": (".attn_kv.weight", 0),
    "attention.value_length": (".attn_kv.weight", 0),
    "attention.q_lora_rank": (".attn_q_a.weight", 0),
    "attention.indexer.head_count": (".indexer.proj.weight", 0),
    "attention.indexer.key_length": (".indexer_compressor_norm.weight", 0),
    "expert_count": (".ffn_gate_inp.weight", 0),
    "expert_used_count": (".ffn_gate_tid2eid.weight", 1),
    "expert_feed_forward_length": (".ffn_gate_exps.weight", 1),
    "hyper_connection.count": ("output_hc_base.weight", 0),
}
_RATIO = "attn_compressor_ape.weight"  # has a row for each token of a window
_NEXTN = "nextn.eh_proj.weight"
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")


def full_names(tensors: Tensors) -> dict[str, TensorInfo]:
    """Tensors by name, with ``.weight`` or ``.bias`` where it lacks them. Raises GGUFError for a name found twice."""
    out: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if not name.endswith((".weight", ".bias")):
            name += ".bias" if name.endswith(("exp_probs_b", "exp_probs_b_vl")) else ".weight"
        if name in out:
            raise GGUFError(f"tensor {show(tensor.name)}: found beside {show(out[name].name)}, expected one of them")
        out[name] = tensor
    return out


def complete(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Metadata with the keys that it lacks and that the tensors imply. tensors: by `full_names`.

    What is there stays as it is, and what nothing implies stays away: `ModelConfig.from_metadata` names it.
    """
    blocks = 1 + max((int(found[1]) for name in tensors if (found := _BLOCK.match(name))), default=-1)

    def shape(name: str) -> tuple[int, ...]:
        names = [f"blk.{i}{name}" for i in range(blocks)] if name.startswith(".") else [name]
        return next((tensors[n].shape for n in names if n in tensors), ())

    def count(name: str) -> int:
        return sum(f"blk.{i}.{name}" in tensors for i in range(blocks))

    def quotient(a: int | None, b: int | None) -> int | None:
        return a // b if a and b and a % b == 0 else None

    def size(name: str, axis: int) -> int | None:
        return dict(enumerate(shape(name))).get(axis)

    implied: dict[str, Any] = {key: size(*tensor) for key, tensor in IMPLIED.items()}

    def value(key: str) -> int | None:
        found = metadata.get(PREFIX + key, implied[key])
        return found if type(found) is int and found > 0 else None

    heads, dim = value("attention.head_count"), value("attention.key_length")
    groups = quotient((heads or 0) * (dim or 0), size(".attn_output_a.weight", 1))
    implied |= {
        "block_count": blocks or None,
        "nextn_predict_layers": count(_NEXTN) or None,
        "hash_layer_count": count("ffn_gate_tid2eid.weight"),
        "attention.compress_ratios": [
            tensors[name].shape[0] if (name := f"blk.{i}.{_RATIO}") in tensors else 0 for i in range(blocks)
        ],
        "attention.head_count_kv": quotient(size(".attn_kv.weight", 0), dim),
        "attention.output_group_count": groups,
        "attention.output_lora_rank": quotient(size(".attn_output_a.weight", 0), groups),
        "expert_shared_count": quotient(size(".ffn_gate_shexp.weight", 0), value("expert_feed_forward_length")),
    }
    return {PREFIX + key: found for key, found in implied.items() if found is not None} | dict(metadata)


def without_images(tensors: Tensors, cfg: ModelConfig) -> dict[str, TensorInfo]:
    """Tensors less those that only images need: the routers' bias for image tokens, in DeepSeek-V4-Flash-Vision-Exp.

    Its vision encoder is in a file of its own.
    """
    biases = {f"blk.{i}.exp_probs_b_vl.bias" for i in range(cfg.n_layers + cfg.n_mtp)}
    return {name: t for name, t in tensors.items() if name not in biases or t.shape != (cfg.n_experts,)}


def sidecar(tensors: Tensors, cfg: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors of a file with the MTP head alone, named as they are in a main file.

    There the head's own norm and hyper-connection may be called ``output_norm`` and ``output_hc_*``. The embedding and
    the output matrix, which the head shares with the main model `cfg`, are left out: that one's are taken. Raises
    GGUFError if they are not of its shape, or if the head is of a model with another number of layers.
    """
    out = dict(tensors)
    block = f"blk.{cfg.n_layers}."
    for name in tensors:
        if name.endswith("." + _NEXTN) and name != block + _NEXTN:
            raise GGUFError(f"tensor {show(name)}: found the MTP head of another model, expected {block}{_NEXTN}")
    for name in ("token_embd.weight", "output.weight"):
        shared, expected = out.pop(name, None), (cfg.vocab_size, cfg.embed_dim)
        if shared and shared.shape != expected:
            raise GGUFError(f"tensor '{name}': found shape {shared.shape}, expected {expected}, the main model's")
    own = {f"output_hc_{leaf}.weight": f"nextn.hc_head_{leaf}.weight" for leaf in ("fn", "base", "scale")}
    for name, inside in (own | {"output_norm.weight": "nextn.shared_head_norm.weight"}).items():
        if name in out:
            out.setdefault(block + inside, out.pop(name))
    return out


def is_sidecar(tensors: Tensors) -> bool:
    """Whether a file holds an MTP head in a block of its own, and no main layers."""
    return any(name.endswith("." + _NEXTN) for name in tensors) and "blk.0.attn_norm.weight" not in tensors


def release_0731(metadata: Mapping[str, Any], cfg: ModelConfig) -> str | None:
    """What tells that a main model is DeepSeek-V4-Flash-0731; None if nothing does.

    It came without an MTP head, but with a DSpark drafter of three stages, which its compress ratios count.
    """
    ratios: Sequence | None = metadata.get(f"{PREFIX}attention.compress_ratios")
    if ratios is not None and len(ratios) > cfg.n_layers + 1:
        return f"key '{PREFIX}attention.compress_ratios' has {len(ratios)} values for {cfg.n_layers} layers"
    names = ("general.version", "general.name", "general.basename")
    for key in (*names, "general.base_model.0.version", "general.base_model.0.name"):
        found = metadata.get(key)
        if isinstance(found, str) and "0731" in found:
            return f"key '{key}' is {show(found)}"
    return None
