"""llama.cpp's dialect of a model file, put into the words of `ds4jax.config` and `ds4jax.model.tensors`. No JAX here.

Its converters and their forks write tensors with or without a suffix, leave out keys that the tensors imply, and store
the MTP head as one more block: in the main file, or in a sidecar that repeats what the head shares with the model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds4jax.config import PREFIX, ModelConfig
from ds4jax.errors import GGUFError, show
from ds4jax.io.gguf import TensorInfo

Tensors = Mapping[str, TensorInfo]

_NEXTN = "nextn.eh_proj.weight"
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")


class _File:
    """What a file tells of its model: ``file[key]`` is a number in its metadata, or the one that its tensors imply.

    Raises LookupError where they tell nothing, or nothing that makes sense.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Tensors):
        self.metadata, self.tensors = metadata, tensors
        self.blocks = range(1 + max((int(found[1]) for name in tensors if (found := _BLOCK.match(name))), default=-1))

    def __getitem__(self, key: str) -> int:
        found = self.metadata[PREFIX + key] if PREFIX + key in self.metadata else IMPLIED[key](self)
        if type(found) is not int or found < 1:
            raise LookupError(key)
        return found

    def size(self, name: str, axis: int) -> int:
        """The size of a tensor on an axis; of the first block that has it if its name begins with a dot."""
        names = [f"blk.{i}{name}" for i in self.blocks] if name.startswith(".") else [name]
        return next((self.tensors[n].shape for n in names if n in self.tensors), ())[axis]

    def sizes(self, name: str) -> list[int]:
        """By block, the size of a tensor on its first axis; 0 in a block that does not have it."""
        names = [f"blk.{i}{name}" for i in self.blocks]
        return [self.tensors[n].shape[0] if n in self.tensors else 0 for n in names]


def _divided(a: int, b: int) -> int:
    if a % b:
        raise LookupError(f"{a} / {b}")
    return a // b


# Every key that a file may lack → what implies it.
IMPLIED: dict[str, Callable[[_File], Any]] = {
    "block_count": lambda file: file.blocks[-1] + 1,
    "nextn_predict_layers": lambda file: sum(map(bool, file.sizes(f".{_NEXTN}"))),
    "vocab_size": lambda file: file.size("token_embd.weight", 0),
    "embedding_length": lambda file: file.size("token_embd.weight", 1),
    "attention.head_count": lambda file: file.size(".attn_sinks.weight", 0),
    "attention.head_count_kv": lambda file: _divided(file.size(".attn_kv.weight", 0), file["attention.key_length"]),
    "attention.key_length": lambda file: file.size(".attn_kv.weight", 0),
    "attention.value_length": lambda file: file.size(".attn_kv.weight", 0),
    "attention.q_lora_rank": lambda file: file.size(".attn_q_a.weight", 0),
    "attention.output_group_count": lambda file: _divided(
        file["attention.head_count"] * file["attention.key_length"], file.size(".attn_output_a.weight", 1)
    ),
    "attention.output_lora_rank": lambda file: _divided(
        file.size(".attn_output_a.weight", 0), file["attention.output_group_count"]
    ),
    "attention.compress_ratios": lambda file: file.sizes(".attn_compressor_ape.weight"),
    "attention.indexer.head_count": lambda file: file.size(".indexer.proj.weight", 0),
    "attention.indexer.key_length": lambda file: file.size(".indexer_compressor_norm.weight", 0),
    "expert_count": lambda file: file.size(".ffn_gate_inp.weight", 0),
    "expert_used_count": lambda file: file.size(".ffn_gate_tid2eid.weight", 1),
    "expert_feed_forward_length": lambda file: file.size(".ffn_gate_exps.weight", 1),
    "expert_shared_count": lambda file: _divided(
        file.size(".ffn_gate_shexp.weight", 0), file["expert_feed_forward_length"]
    ),
    "hash_layer_count": lambda file: sum(map(bool, file.sizes(".ffn_gate_tid2eid.weight"))),
    "hyper_connection.count": lambda file: file.size("output_hc_base.weight", 0),
}


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
    file, out = _File(metadata, tensors), dict(metadata)
    for key, implied in IMPLIED.items():
        if PREFIX + key not in metadata:
            with contextlib.suppress(LookupError):
                out[PREFIX + key] = implied(file)
    return out


def without_images(tensors: Tensors, cfg: ModelConfig) -> dict[str, TensorInfo]:
    """Tensors less those that only images need: the routers' bias for image tokens, in DeepSeek-V4-Flash-Vision-Exp.

    Its vision encoder is in a file of its own.
    """
    biases = {f"blk.{i}.exp_probs_b_vl.bias" for i in range(cfg.n_layers + cfg.n_mtp)}
    return {name: t for name, t in tensors.items() if name not in biases or t.shape != (cfg.n_experts,)}


def without_images_note(names: Sequence[str]) -> str:
    """A line that names tensors which are left out because only images need them."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"left out: {len(names)} tensors that only images need, which are not supported: {some}"


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


def drafter_in(tensors: Tensors) -> str | None:
    """The name of a tensor that only a DSpark drafter has, if there is one."""
    return next(
        (t.name for name, t in tensors.items() if name.endswith(("main_proj.weight", "markov_w1.weight"))), None
    )
