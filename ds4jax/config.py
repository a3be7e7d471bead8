"""ModelConfig: the architecture, every number of it read from the model file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import numpy as np

from ds4jax.errors import Ds4Error, GGUFError, show

ARCHITECTURE = "deepseek4"
PREFIX = "deepseek4."
SQRT_SOFTPLUS = 4  # the value of expert_gating_func, llama.cpp's numbering

# general.architecture, or config.json's model_type, of what is often taken for a model of this architecture → its name.
OTHERS = {
    "deepseek41": "DeepSeek-V4.1, another architecture",
    "deepseek_v41": "DeepSeek-V4.1, another architecture",
    "deepseek41-dspark": "the drafter of DeepSeek-V4.1, another architecture",
    "deepseek4-dspark": "a DSpark drafter",
    "dflash": "a drafter",
    "deepseek4_mtp_support": "the MTP head of the first release",
    "clip": "a vision encoder; images are not supported",
}


def other(architecture: Any) -> str:
    """What a wrong architecture stands for, as the end of an error message; empty if that is not known."""
    return f"; it is {OTHERS[architecture]}" if isinstance(architecture, str) and architecture in OTHERS else ""


# Field → (GGUF key, smallest, largest value). The upper bounds are far from any real model; they keep a damaged file
# from asking for absurd work before its tensors are looked at.
_INTS = {
    "n_layers": ("block_count", 1, 1024),
    "embed_dim": ("embedding_length", 1, 2**20),
    "vocab_size": ("vocab_size", 1, 2**24),
    "n_heads": ("attention.head_count", 1, 2**16),
    "head_dim": ("attention.key_length", 1, 2**16),
    "rope_dim": ("rope.dimension_count", 2, 2**16),
    "q_lora_rank": ("attention.q_lora_rank", 1, 2**20),
    "o_lora_rank": ("attention.output_lora_rank", 1, 2**20),
    "o_groups": ("attention.output_group_count", 1, 2**16),
    "window": ("attention.sliding_window", 1, 2**20),
    "index_heads": ("attention.indexer.head_count", 1, 2**16),
    "index_head_dim": ("attention.indexer.key_length", 1, 2**16),
    "index_top_k": ("attention.indexer.top_k", 1, 2**24),
    "yarn_original_ctx": ("rope.scaling.original_context_length", 1, 2**31 - 1),
    "n_experts": ("expert_count", 1, 2**16),
    "n_experts_used": ("expert_used_count", 1, 2**16),
    "n_shared_experts": ("expert_shared_count", 1, 2**10),
    "expert_dim": ("expert_feed_forward_length", 1, 2**20),
    "n_hash_layers": ("hash_layer_count", 0, 1024),
    "n_streams": ("hyper_connection.count", 1, 64),
    "sinkhorn_iters": ("hyper_connection.sinkhorn_iterations", 1, 1000),
}

# Field → (GGUF key, what it must exceed).
_FLOATS = {
    "rope_base": ("rope.freq_base", 1.0),
    "compress_rope_base": ("attention.compress_rope_freq_base", 1.0),
    "yarn_factor": ("rope.scaling.factor", 0.0),
    "yarn_beta_fast": ("rope.scaling.yarn_beta_fast", 0.0),
    "yarn_beta_slow": ("rope.scaling.yarn_beta_slow", 0.0),
    "route_scale": ("expert_weights_scale", 0.0),
    "hc_eps": ("hyper_connection.epsilon", 0.0),
    "norm_eps": ("attention.layer_norm_rms_epsilon", 0.0),
}

_ALSO_REQUIRED = {
    "attention.head_count_kv",
    "attention.value_length",
    "attention.compress_ratios",
    "expert_weights_norm",
    "swiglu_clamp_exp",
}

# Keys that select variants of the architecture, where a file has them → the variant that the forward pass implements,
# and other values to the same effect.
_VARIANTS = {
    "expert_gating_func": (SQRT_SOFTPLUS,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "rope.scaling.type": ("yarn",),
}


# GGUF key → where a Hugging Face config.json has the same value: as transformers writes it, as DeepSeek does (or one
# for both). Dots lead into nested objects.
_HF_KEYS = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.output_lora_rank": ("o_lora_rank",),
    "attention.output_group_count": ("o_groups",),
    "attention.sliding_window": ("sliding_window",),
    "attention.indexer.head_count": ("index_n_heads",),
    "attention.indexer.key_length": ("index_head_dim",),
    "attention.indexer.top_k": ("index_topk",),
    "attention.compress_ratios": ("compress_ratios",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "rope.dimension_count": ("qk_rope_head_dim",),
    "rope.freq_base": ("rope_parameters.main.rope_theta", "rope_theta"),
    "attention.compress_rope_freq_base": ("rope_parameters.compress.rope_theta", "compress_rope_theta"),
    "rope.scaling.type": ("rope_parameters.compress.rope_type", "rope_scaling.type"),
    "rope.scaling.factor": ("rope_parameters.compress.factor", "rope_scaling.factor"),
    "rope.scaling.original_context_length": (
        "rope_parameters.compress.original_max_position_embeddings",
        "rope_scaling.original_max_position_embeddings",
    ),
    "rope.scaling.yarn_beta_fast": ("rope_parameters.compress.beta_fast", "rope_scaling.beta_fast"),
    "rope.scaling.yarn_beta_slow": ("rope_parameters.compress.beta_slow", "rope_scaling.beta_slow"),
    "expert_count": ("n_routed_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "hash_layer_count": ("num_hash_layers",),
    "swiglu_clamp_exp": ("swiglu_limit",),
    "hyper_connection.count": ("hc_mult",),
    "hyper_connection.sinkhorn_iterations": ("hc_sinkhorn_iters",),
    "hyper_connection.epsilon": ("hc_eps",),
}

# transformers' names of the kinds of layers.
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

# What else selects a variant in a config.json → the one that the forward pass implements. Only the first must be there.
_HF_VARIANTS = {
    "model_type": "deepseek_v4",
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "compress_rates.compressed_sparse_attention": 4,
    "compress_rates.heavily_compressed_attention": 128,
    "rope_parameters.main.rope_type": "default",
    "rope_parameters.compress.attention_factor": 1.0,
}


class _Keys:
    """Reads values by GGUF key, less the prefix; each failure names the key, what was found and what was expected.

    spelling: the key as the file at hand has it. failure: the exception to raise.
    """

    def __init__(self, values: Mapping[str, Any], spelling: Callable[[str], str], failure: type[Ds4Error]):
        self.values, self.spelling, self.failure = values, spelling, failure

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def error(self, key: str, expected: str, found: str | None = None) -> Ds4Error:
        found = found or (show(self.values[key]) if key in self.values else "nothing")
        return self.failure(f"key '{self.spelling(key)}': found {found}, expected {expected}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}" if low < high else str(low))
        return value

    def number(self, key: str, above: float) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not above < value < math.inf:
            raise self.error(key, f"a finite number above {above:g}")
        return float(value)

    def per_layer(self, key: str, types: tuple[type, ...], n_layers: int) -> list:
        """An array of one value per layer. What follows, for an MTP head or the stages of a drafter, is cut."""
        value = self.get(key)
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list | tuple) or not all(type(v) in types for v in values):
            raise self.error(key, f"an array of {' or '.join(t.__name__ for t in types)}")
        if len(values) < n_layers:
            raise self.error(key, f"{n_layers}, one per layer", f"{len(values)} values")
        return list(values[:n_layers])

    def clamps(self, key: str, n_layers: int) -> tuple[float, ...]:
        value = self.get(key)  # one for all layers, or an array
        is_scalar = type(value) in (int, float)
        values = [value] * n_layers if is_scalar else self.per_layer(key, (int, float), n_layers)
        if not all(0 < v < math.inf for v in values):
            raise self.error(key, "finite numbers above 0")
        return tuple(map(float, values))


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of nested objects, or None."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V4 architecture. Hashable, so that it can be a static argument of a jitted step.

    The comments give DeepSeek-V4-Flash's value. GGUF keys carry the prefix ``deepseek4.``.
    """

    n_layers: int  # block_count: 43
    embed_dim: int  # embedding_length, E: 4096
    vocab_size: int  # 129280
    n_heads: int  # attention.head_count: 64
    head_dim: int  # attention.key_length = attention.value_length: 512
    rope_dim: int  # rope.dimension_count, the last dims of every head: 64
    q_lora_rank: int  # attention.q_lora_rank: 1024
    o_lora_rank: int  # attention.output_lora_rank: 1024
    o_groups: int  # attention.output_group_count: 8
    window: int  # attention.sliding_window: 128
    compress_ratios: tuple[int, ...]  # attention.compress_ratios, one per layer: 0, 0, 4, 128, 4, 128, ..., 4
    index_heads: int  # attention.indexer.head_count: 64
    index_head_dim: int  # attention.indexer.key_length: 128
    index_top_k: int  # attention.indexer.top_k: 512
    rope_base: float  # rope.freq_base, layers of ratio 0: 10000
    compress_rope_base: float  # attention.compress_rope_freq_base, all other layers: 160000
    yarn_factor: float  # rope.scaling.factor: 16
    yarn_original_ctx: int  # rope.scaling.original_context_length: 65536
    yarn_beta_fast: float  # rope.scaling.yarn_beta_fast: 32
    yarn_beta_slow: float  # rope.scaling.yarn_beta_slow: 1
    n_experts: int  # expert_count: 256
    n_experts_used: int  # expert_used_count: 6
    n_shared_experts: int  # expert_shared_count: 1
    expert_dim: int  # expert_feed_forward_length: 2048
    route_scale: float  # expert_weights_scale: 1.5
    route_norm: bool  # expert_weights_norm: true
    n_hash_layers: int  # hash_layer_count, the first layers route by token id: 3
    swiglu_clamp: tuple[float, ...]  # swiglu_clamp_exp, one per layer: 10.0
    n_streams: int  # hyper_connection.count, N: 4
    sinkhorn_iters: int  # hyper_connection.sinkhorn_iterations: 20
    hc_eps: float  # hyper_connection.epsilon: 1e-6
    norm_eps: float  # attention.layer_norm_rms_epsilon: 1e-6
    n_mtp: int = 0  # multi-token-prediction heads found in the file: 0 or 1
    drafter: DrafterConfig | None = None  # of the DSpark drafter that goes with the model, from a file of its own

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensors: Collection[str] = ()) -> Self:
        """The config a GGUF file declares; GGUFError for a key that is missing, malformed or contradicts another.

        tensors: the file's tensor names. They tell whether an MTP head is present, and whether ``block_count`` counts
            it (llama.cpp's layout): ``nextn_predict_layers`` alone does not, files without the head carry it too.
        """
        found = metadata.get("general.architecture")
        if type(found) is not str or found != ARCHITECTURE:
            raise GGUFError(f"key 'general.architecture': found {show(found)}, expected {ARCHITECTURE!r}{other(found)}")
        values = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
        keys = _Keys(values, lambda key: PREFIX + key, GGUFError)
        # The tokens imply the vocabulary's size. Nothing else may be missing.
        tokens = metadata.get("tokenizer.ggml.tokens")
        return cls._from_keys(keys, len(tokens) if isinstance(tokens, list) else None, tensors)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The config that a Hugging Face ``config.json`` of DeepSeek-V4 declares, DeepSeek's own or transformers'.

        Held to the same rules as a GGUF file's; Ds4Error names the key as config.json has it. The result has n_mtp = 0:
        whether a head is there, the tensors tell.
        """
        for key, expected in _HF_VARIANTS.items():
            found = _lookup(config, key)
            if found != expected and not (found is None and key != "model_type"):
                raise Ds4Error(f"key '{key}': found {show(found)}, expected {expected!r}{other(found)}")
        names = {
            key: next((p for p in paths if _lookup(config, p) is not None), paths[-1])
            for key, paths in _HF_KEYS.items()
        }
        values = {key: value for key, path in names.items() if (value := _lookup(config, path)) is not None}
        keys = _Keys(values, lambda key: names.get(key, key), Ds4Error)
        # transformers names the kinds of layers instead of numbers. Both lists may go on with the layers of MTP heads.
        n_layers = keys.integer(*_INTS["n_layers"])
        layer_types, mlp_types = config.get("layer_types"), config.get("mlp_layer_types")
        if "attention.compress_ratios" not in values and isinstance(layer_types, list):
            names["attention.compress_ratios"] = "layer_types"
            values["attention.compress_ratios"] = [_RATIOS.get(str(kind), kind) for kind in layer_types]
        if "hash_layer_count" not in values and isinstance(mlp_types, list):
            names["hash_layer_count"] = "mlp_layer_types"
            values["hash_layer_count"] = n_hash = mlp_types.count("hash_moe")
            if mlp_types != ["hash_moe"] * n_hash + ["moe"] * (len(mlp_types) - n_hash):
                raise keys.error("hash_layer_count", "layers 'hash_moe', then layers 'moe'", show(mlp_types))
        if isinstance(ratios := values.get("attention.compress_ratios"), list):
            values["attention.compress_ratios"] = ratios[:n_layers]
        return cls._from_keys(keys, None, ())

    @classmethod
    def _from_keys(cls, keys: _Keys, n_tokens: int | None, tensors: Collection[str]) -> Self:
        required = {key for key, *_ in (*_INTS.values(), *_FLOATS.values())} | _ALSO_REQUIRED
        lacking = sorted(required - keys.values.keys() - ({"vocab_size"} if n_tokens is not None else set()))
        if len(lacking) > 1:
            each = "; ".join(f"key '{keys.spelling(key)}': found nothing" for key in lacking)
            raise keys.failure(f"{each}, expected values for all of them")
        ints = {
            field: keys.integer(key, low, high, n_tokens if field == "vocab_size" else None)
            for field, (key, low, high) in _INTS.items()
        }
        floats = {field: keys.number(key, above) for field, (key, above) in _FLOATS.items()}
        route_norm = keys.get("expert_weights_norm")
        if type(route_norm) is not bool:
            raise keys.error("expert_weights_norm", "a boolean")
        keys.integer("attention.head_count_kv", 1, 1)
        keys.integer("attention.value_length", ints["head_dim"], ints["head_dim"])
        for key, allowed in _VARIANTS.items():
            value = keys.get(key, allowed[0])
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise keys.error(key, repr(allowed[0]))

        n_mtp = int(any(name.startswith("mtp.") for name in tensors))
        nextn = keys.integer("nextn_predict_layers", 0, 1024, 0)
        counted, more = (f"blk.{ints['n_layers'] - n}.nextn.eh_proj.weight" in tensors for n in (nextn, 0))
        if nextn and (counted or more):
            if nextn > 1 or n_mtp or ints["n_layers"] == int(counted):
                raise keys.error("nextn_predict_layers", "one MTP head in the file, after the main layers")
            ints["n_layers"] -= counted
            n_mtp = 1
        n_layers = ints["n_layers"]
        ratios = keys.per_layer("attention.compress_ratios", (int,), n_layers)
        if not set(ratios) <= {0, CSA_RATIO, HCA_RATIO}:
            raise keys.error("attention.compress_ratios", f"values of 0, {CSA_RATIO} and {HCA_RATIO}")
        clamps = keys.clamps("swiglu_clamp_exp", n_layers)
        if "swiglu_clamp_shexp" in keys.values and keys.clamps("swiglu_clamp_shexp", n_layers) != clamps:
            raise keys.error("swiglu_clamp_shexp", "the values of swiglu_clamp_exp")

        arrays = {"compress_ratios": tuple(ratios), "swiglu_clamp": clamps}
        cfg = cls(**ints, **floats, **arrays, route_norm=route_norm, n_mtp=n_mtp)
        for ok, key, expected in (
            (n_tokens in (None, cfg.vocab_size), "vocab_size", f"{n_tokens}, one per token"),
            (cfg.rope_dim % 2 == 0, "rope.dimension_count", "an even number"),
            (
                cfg.rope_dim <= min(cfg.head_dim, cfg.index_head_dim),
                "rope.dimension_count",
                "at most either key_length",
            ),
            (cfg.n_heads % cfg.o_groups == 0, "attention.output_group_count", f"a divisor of {cfg.n_heads} heads"),
            (cfg.n_experts_used <= cfg.n_experts, "expert_used_count", f"at most expert_count, {cfg.n_experts}"),
            (cfg.n_hash_layers <= cfg.n_layers, "hash_layer_count", f"at most {cfg.n_layers} layers"),
        ):
            if not ok:
                raise keys.error(key, expected)
        return cfg

    def contradiction(self, metadata: Mapping[str, Any], prefix: str = PREFIX) -> str | None:
        """What the file of an MTP head or drafter says of another model, as key, what was found and what was expected.

        It need not have any of the keys. ``block_count`` is not compared: it counts the head or it does not. Keys with
        another `prefix` tell of the drafter's own blocks: of them, what a block of ratio 0 has is compared.
        """

        def stored(value: Any) -> Any:
            return np.float32(value) if type(value) is float else value

        left_out = re.compile("n_layers" if prefix == PREFIX else "n_layers|n_hash_layers|index_|yarn_|compress_")
        fields = {field: key for field, (key, *_) in (_INTS | _FLOATS).items() if not left_out.match(field)}
        own = {key: getattr(self, field) for field, key in fields.items()}
        for key, expected in (own | {"expert_weights_norm": self.route_norm}).items():
            found = metadata.get(prefix + key, expected)
            if type(found) not in (bool, int, float) or stored(found) != stored(expected):
                return f"key '{prefix}{key}': found {show(found)}, expected {show(expected)}, the main model's"
        return None

    def to_metadata(self) -> dict[str, Any]:
        """The GGUF keys `from_metadata` reads back, as values for `gguf.write_gguf`.

        ``block_count`` counts the main layers only: an MTP head, if written, goes under ``mtp.0.``.
        """
        own = {key: getattr(self, field) for field, (key, _, _) in _INTS.items()}
        own |= {key: float(getattr(self, field)) for field, (key, _) in _FLOATS.items()}
        own |= {key: allowed[0] for key, allowed in _VARIANTS.items()}
        own |= {
            "context_length": int(self.yarn_factor * self.yarn_original_ctx),
            "attention.head_count_kv": 1,
            "attention.value_length": self.head_dim,
            "attention.compress_ratios": list(self.compress_ratios),
            "expert_weights_norm": self.route_norm,
            "swiglu_clamp_exp": list(self.swiglu_clamp),
            "swiglu_clamp_shexp": list(self.swiglu_clamp),
        }
        return {"general.architecture": ARCHITECTURE} | {PREFIX + key: value for key, value in own.items()}

    @property
    def nope_dim(self) -> int:
        """The leading dims of a head that RoPE leaves alone: 448."""
        return self.head_dim - self.rope_dim

    def ratio(self, layer: int) -> int:
        """The compression ratio of a layer. The block of an MTP head and the stages of a drafter have 0."""
        return self.compress_ratios[layer] if layer < self.n_layers else 0

    def clamp(self, layer: int) -> float:
        """The clamp of a layer's SwiGLU. The block of an MTP head and the stages of a drafter have the last layer's."""
        return self.swiglu_clamp[min(layer, self.n_layers - 1)]

    @property
    def stages(self) -> range:
        """The numbers of the drafter's blocks: they follow the main layers and the block of the MTP head."""
        first = self.n_layers + self.n_mtp
        return range(first, first + (self.drafter.stages if self.drafter else 0))

    def layers_of_ratio(self, ratio: int) -> tuple[int, ...]:
        """Indices of the layers whose compression ratio is `ratio`."""
        return tuple(i for i, r in enumerate(self.compress_ratios) if r == ratio)


CSA_RATIO = 4  # compressed sparse attention: overlapping windows of 4 tokens, selected by the indexer
HCA_RATIO = 128  # heavily compressed attention: windows of 128 tokens, all of them visible


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """The DSpark drafter of a model, DeepSeek-V4-Flash-0731's. Its blocks have the model's own shapes, with ratio 0.

    The comments give that drafter's value, and the key in a file that ds4 or this project writes.
    """

    stages: int  # dspark.stage_count, blocks one after the other: 3
    block_size: int  # dspark.block_size, tokens that one pass drafts: 5
    markov_rank: int  # dspark.markov_rank, R of markov_w1 and markov_w2: 256
    noise_token: int  # dspark.noise_token_id, what stands at the places to be drafted: 128799
    target_layers: tuple[int, ...]  # dspark.target_layer_ids, counted from 0; their outputs are read: 40, 41, 42

    @classmethod
    def read(cls, values: Mapping[str, Any], spelled: Mapping[str, str], cfg: ModelConfig, failure=Ds4Error) -> Self:
        """The drafter of the model `cfg`, from values by field, as a file has them.

        spelled: each field's key in the file, for errors. failure: raised for what is missing, malformed, or of
        another model.
        """
        keys = _Keys(values, lambda field: spelled.get(field, field), failure)
        layers = keys.get("target_layers")
        if not isinstance(layers, list | tuple) or not layers or not all(type(layer) is int for layer in layers):
            raise keys.error("target_layers", "an array of layers")
        if list(layers) != sorted(set(layers) & set(range(cfg.n_layers))):
            raise keys.error("target_layers", f"rising numbers of the model's layers, from 0 to {cfg.n_layers - 1}")
        return cls(
            keys.integer("stages", 1, 16),
            keys.integer("block_size", 2, 64),
            keys.integer("markov_rank", 1, 2**16),
            keys.integer("noise_token", 0, cfg.vocab_size - 1),
            tuple(layers),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], stages: int, cfg: ModelConfig) -> Self:
        """The drafter of the model `cfg` that a ``config.json`` declares. stages: as the tensors show."""
        values = {field: config[key] for field, key in _HF_DRAFTER.items() if key in config}
        return cls.read(values | {"stages": stages}, _HF_DRAFTER, cfg)


# Field of `DrafterConfig` → its key in config.json.
_HF_DRAFTER = {
    "block_size": "dspark_block_size",
    "markov_rank": "dspark_markov_rank",
    "noise_token": "dspark_noise_token_id",
    "target_layers": "dspark_target_layer_ids",
}
