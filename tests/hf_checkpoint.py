"""A small random DeepSeek-V4 checkpoint as Hugging Face has it, in DeepSeek's or transformers' naming; and its values.

Written by hand, from the description of the formats: neither ds4jax nor the safetensors package takes part.
"""

import dataclasses
import json
import struct
from typing import Any

import numpy as np

from ds4jax.io.synthetic import synthetic_config
from ds4jax.io.tokenizer import byte_tokenizer

CFG = synthetic_config(
    {
        "n_layers": 3,
        "vocab_size": 390,  # a few more than the tokenizer has
        "n_heads": 4,
        "head_dim": 64,
        "rope_dim": 32,
        "q_lora_rank": 160,  # not a multiple of the blocks of 128
        "o_lora_rank": 64,
        "compress_ratios": (0, 4, 128),
        "index_heads": 4,
        "index_head_dim": 32,
        "n_experts": 3,
        "n_experts_used": 2,
        "n_hash_layers": 1,
        "swiglu_clamp": (10.0,) * 3,
        "n_streams": 2,
    }
)
TARGETS, RANK = [0, 1, 2], 32  # of the drafter
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """float32 values of E4M3 codes: sign, 4 bits of exponent (bias 7), 3 bits of mantissa; no infinities."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(sign == 1, -magnitude, magnitude).astype(np.float32)


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """E8M0 bytes, one per block → float32 of `shape`."""
    powers = 2.0 ** (scale.astype(np.float64) - 127)
    return np.repeat(np.repeat(powers, block[0], 0), block[1], 1)[: shape[0], : shape[1]].astype(np.float32)


class Builder:
    """Collects tensors: `stored` name → (dtype, shape, bytes), and `values` name → what it stands for."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.stored: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        self.values: dict[str, np.ndarray] = {}

    def bf16(self, name: str, *shape: int, mean=0.0, std=1.0) -> None:
        words = (self.rng.normal(mean, std, shape).astype("<f4").view("<u4") >> 16).astype("<u2")
        self.stored[name] = "BF16", shape, words.tobytes()
        self.values[name] = (words.astype("<u4") << 16).view("<f4")

    def f32(self, name: str, *shape: int, mean=0.0, std=1.0) -> None:
        self.values[name] = self.rng.normal(mean, std, shape).astype("<f4")
        self.stored[name] = "F32", shape, self.values[name].tobytes()

    def fp8(self, name: str, rows: int, columns: int) -> None:
        codes = self.rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        codes[(codes & 127) == 127] = 0  # NaN
        scale = self.rng.integers(112, 116, (-(-rows // 128), -(-columns // 128))).astype(np.uint8)
        self.stored[f"{name}.weight"] = "F8_E4M3", codes.shape, codes.tobytes()
        self.stored[f"{name}.scale"] = "F8_E8M0", scale.shape, scale.tobytes()
        self.values[f"{name}.weight"] = e4m3(codes) * spread(scale, (128, 128), codes.shape)

    def fp4(self, name: str, rows: int, columns: int) -> None:
        packed = self.rng.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
        scale = self.rng.integers(117, 121, (rows, columns // 32)).astype(np.uint8)
        self.stored[f"{name}.weight"] = "I8", packed.shape, packed.tobytes()
        self.stored[f"{name}.scale"] = "F8_E8M0", scale.shape, scale.tobytes()
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, columns)
        self.values[f"{name}.weight"] = E2M1[codes] * spread(scale, (1, 32), codes.shape)

    def hyper(self, prefix: str, rows: int, scales: int) -> None:
        self.f32(f"{prefix}_fn", rows, CFG.n_streams * CFG.embed_dim, std=0.05)
        self.f32(f"{prefix}_base", rows, std=0.5)
        self.f32(f"{prefix}_scale", scales, mean=1.0, std=0.1)

    def compressor(self, prefix: str, ratio: int, width: int, dim: int) -> None:
        self.bf16(f"{prefix}.wkv.weight", width, CFG.embed_dim, std=0.06)
        self.bf16(f"{prefix}.wgate.weight", width, CFG.embed_dim, std=0.06)
        self.f32(f"{prefix}.ape", ratio, width)
        self.bf16(f"{prefix}.norm.weight", dim, mean=1.0, std=0.1)

    def block(self, prefix: str, ratio: int, hashed: bool) -> None:
        c = CFG
        for sub in ("attn", "ffn"):
            self.hyper(f"{prefix}.hc_{sub}", 2 * c.n_streams + c.n_streams**2, 3)
            self.bf16(f"{prefix}.{sub}_norm.weight", c.embed_dim, mean=1.0, std=0.1)
        heads, groups = c.n_heads * c.head_dim, c.o_groups * c.o_lora_rank
        self.fp8(f"{prefix}.attn.wq_a", c.q_lora_rank, c.embed_dim)
        self.bf16(f"{prefix}.attn.q_norm.weight", c.q_lora_rank, mean=1.0, std=0.1)
        self.fp8(f"{prefix}.attn.wq_b", heads, c.q_lora_rank)
        self.fp8(f"{prefix}.attn.wkv", c.head_dim, c.embed_dim)
        self.bf16(f"{prefix}.attn.kv_norm.weight", c.head_dim, mean=1.0, std=0.1)
        self.f32(f"{prefix}.attn.attn_sink", c.n_heads)
        self.fp8(f"{prefix}.attn.wo_a", groups, heads // c.o_groups)
        self.fp8(f"{prefix}.attn.wo_b", c.embed_dim, groups)
        if ratio:
            self.compressor(f"{prefix}.attn.compressor", ratio, (2 if ratio == 4 else 1) * c.head_dim, c.head_dim)
        if ratio == 4:
            self.fp8(f"{prefix}.attn.indexer.wq_b", c.index_heads * c.index_head_dim, c.q_lora_rank)
            self.bf16(f"{prefix}.attn.indexer.weights_proj.weight", c.index_heads, c.embed_dim)
            self.compressor(f"{prefix}.attn.indexer.compressor", 4, 2 * c.index_head_dim, c.index_head_dim)
        self.bf16(f"{prefix}.ffn.gate.weight", c.n_experts, c.embed_dim, std=0.06)
        if hashed:
            ids = np.stack([self.rng.permutation(c.n_experts)[: c.n_experts_used] for _ in range(c.vocab_size)])
            self.stored[f"{prefix}.ffn.gate.tid2eid"] = "I64", ids.shape, ids.astype("<i8").tobytes()
            self.values[f"{prefix}.ffn.gate.tid2eid"] = ids.astype(np.int32)
        else:
            self.f32(f"{prefix}.ffn.gate.bias", c.n_experts, std=0.1)
        for e in range(c.n_experts):
            for w, rows, columns in (
                ("w1", c.expert_dim, c.embed_dim),
                ("w2", c.embed_dim, c.expert_dim),
                ("w3", c.expert_dim, c.embed_dim),
            ):
                self.fp4(f"{prefix}.ffn.experts.{e}.{w}", rows, columns)
        self.fp8(f"{prefix}.ffn.shared_experts.w1", c.expert_dim, c.embed_dim)
        self.fp8(f"{prefix}.ffn.shared_experts.w2", c.embed_dim, c.expert_dim)
        self.fp8(f"{prefix}.ffn.shared_experts.w3", c.expert_dim, c.embed_dim)

    def drafter(self) -> None:
        """A DSpark drafter of three stages: 81 tensors of the file to be made."""
        c = CFG
        for stage in range(3):
            self.block(f"mtp.{stage}", 0, False)
        self.fp8("mtp.0.main_proj", c.embed_dim, len(TARGETS) * c.embed_dim)
        for name in ("mtp.0.main_norm", "mtp.2.norm"):
            self.bf16(f"{name}.weight", c.embed_dim, mean=1.0, std=0.1)
        self.hyper("mtp.2.hc_head", c.n_streams, 1)
        for name in ("markov_w1", "markov_w2"):
            self.bf16(f"mtp.2.markov_head.{name}.weight", c.vocab_size, RANK)
        self.bf16("mtp.2.confidence_head.proj.weight", 1, c.embed_dim + RANK)

    def model(self, mtp: bool) -> None:
        c = CFG
        self.bf16("embed.weight", c.vocab_size, c.embed_dim)
        for i, ratio in enumerate(c.compress_ratios):
            self.block(f"layers.{i}", ratio, i < c.n_hash_layers)
        self.hyper("hc_head", c.n_streams, 1)
        self.bf16("norm.weight", c.embed_dim, mean=1.0, std=0.1)
        self.bf16("head.weight", c.vocab_size, c.embed_dim, std=0.06)
        if mtp:
            self.block("mtp.0", 0, False)
            self.fp8("mtp.0.e_proj", c.embed_dim, c.embed_dim)
            self.fp8("mtp.0.h_proj", c.embed_dim, c.embed_dim)
            for name in ("enorm", "hnorm", "norm"):
                self.bf16(f"mtp.0.{name}.weight", c.embed_dim, mean=1.0, std=0.1)
            self.hyper("mtp.0.hc_head", c.n_streams, 1)


def official(mtp: bool = False, drafter: bool = False) -> Builder:
    """The checkpoint in DeepSeek's naming and types."""
    builder = Builder(0)
    builder.model(mtp)
    if drafter:
        builder.drafter()
    return builder


# Parts of DeepSeek's names → transformers', from its model's state dict.
RENAMES = (
    (".attn.compressor.wkv.", ".self_attn.compressor.kv_proj."),
    (".attn.compressor.wgate.", ".self_attn.compressor.gate_proj."),
    (".attn.compressor.ape", ".self_attn.compressor.position_bias"),
    (".attn.compressor.norm.", ".self_attn.compressor.kv_norm."),
    (".attn.indexer.compressor.wkv.", ".self_attn.compressor.indexer.kv_proj."),
    (".attn.indexer.compressor.wgate.", ".self_attn.compressor.indexer.gate_proj."),
    (".attn.indexer.compressor.ape", ".self_attn.compressor.indexer.position_bias"),
    (".attn.indexer.compressor.norm.", ".self_attn.compressor.indexer.kv_norm."),
    (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
    (".attn.wq_a.", ".self_attn.q_a_proj."),
    (".attn.wq_b.", ".self_attn.q_b_proj."),
    (".attn.wkv.", ".self_attn.kv_proj."),
    (".attn.wo_a.", ".self_attn.o_a_proj."),
    (".attn.wo_b.", ".self_attn.o_b_proj."),
    (".attn.q_norm.", ".self_attn.q_a_norm."),
    (".attn.kv_norm.", ".self_attn.kv_norm."),
    (".attn.attn_sink", ".self_attn.sinks"),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    (".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"),
    (".ffn.shared_experts.w1.", ".mlp.shared_experts.gate_proj."),
    (".ffn.shared_experts.w2.", ".mlp.shared_experts.down_proj."),
    (".ffn.shared_experts.w3.", ".mlp.shared_experts.up_proj."),
    (".ffn.", ".mlp."),
    ("hc_head_", "model.hc_head.hc_"),
)


def transformers_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    name = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)
    for old, new in RENAMES:
        name = name.replace(old, new)
    return f"model.{name}" if name.startswith("layers.") else name


def transformers(dequantized: bool) -> Builder:
    """The same in transformers' naming: experts fused; in bfloat16 (rounded, `dequantized`) or with its own scales."""
    own, out = official(), Builder(0)
    for name, stored in own.stored.items():
        if ".experts." in name:
            continue
        weight = name.removesuffix(".scale") + ".weight"
        if dequantized and weight in own.stored and weight != name:
            continue
        if dequantized and stored[0] == "F8_E4M3":
            words = (own.values[name].view("<u4") >> 16).astype("<u2")  # E4M3 times a power of two fits bfloat16
            stored = "BF16", words.shape, words.tobytes()
        theirs = transformers_name(name)
        is_scale = weight in own.stored and weight != name
        out.stored[theirs.removesuffix(".scale") + ".weight_scale_inv" if is_scale else theirs] = stored
    for i in range(CFG.n_layers):
        for fused, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            names = [[f"layers.{i}.ffn.experts.{e}.{w}" for w in parts] for e in range(CFG.n_experts)]

            def joined(of, end, names=names):
                return np.stack([np.concatenate([of(f"{n}.{end}") for n in expert]) for expert in names])

            def plain(name):
                dtype, shape, data = own.stored[name]
                return np.frombuffer(data, np.uint8).reshape(shape)

            name = f"model.layers.{i}.mlp.experts.{fused}"
            if dequantized:
                words = (joined(own.values.__getitem__, "weight").view("<u4") >> 16).astype("<u2")
                out.stored[name] = "BF16", words.shape, words.tobytes()
            else:
                weight, scale = joined(plain, "weight"), joined(plain, "scale")
                out.stored[name] = "I8", weight.shape, weight.tobytes()
                out.stored[f"{name}_scale_inv"] = "F8_E8M0", scale.shape, scale.tobytes()
    out.values = own.values
    return out


def saved() -> Builder:
    """As transformers 5 saves a model by default: most names as DeepSeek has them, some not; all in bfloat16."""
    theirs, out = transformers(dequantized=True), Builder(0)
    own = official()
    for name in own.values:
        if name.endswith(".weight") and ".experts." in name:
            words = (own.values[name].view("<u4") >> 16).astype("<u2")
            out.stored[f"model.{name}"] = "BF16", words.shape, words.tobytes()
        else:
            top = not name.startswith("layers.") and name != "head.weight"
            new = transformers_name(name) if top else f"model.{name}" if name.startswith("layers.") else name
            out.stored[new.replace(".attn.kv_norm.", ".attn.norm.")] = theirs.stored[transformers_name(name)]
    return out


def official_config() -> dict:
    """config.json in DeepSeek's keys."""
    c = CFG
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.n_layers,
        "vocab_size": c.vocab_size,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": 1,
        "head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_dim,
        "q_lora_rank": c.q_lora_rank,
        "o_lora_rank": c.o_lora_rank,
        "o_groups": c.o_groups,
        "sliding_window": c.window,
        "compress_ratios": [*c.compress_ratios, 0],
        "index_n_heads": c.index_heads,
        "index_head_dim": c.index_head_dim,
        "index_topk": c.index_top_k,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": c.yarn_original_ctx,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "n_routed_experts": c.n_experts,
        "num_experts_per_tok": c.n_experts_used,
        "n_shared_experts": 1,
        "moe_intermediate_size": c.expert_dim,
        "routed_scaling_factor": c.route_scale,
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "num_hash_layers": c.n_hash_layers,
        "num_nextn_predict_layers": 1,
        "swiglu_limit": 10.0,
        "hc_mult": c.n_streams,
        "hc_sinkhorn_iters": c.sinkhorn_iters,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }


def drafter_config() -> dict:
    """config.json of a checkpoint with a drafter, as 0731's."""
    return official_config() | {
        "compress_ratios": [*CFG.compress_ratios, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 389,
        "dspark_target_layer_ids": TARGETS,
        "dspark_markov_rank": RANK,
    }


def transformers_config() -> dict:
    """config.json in transformers' keys."""
    config = official_config()
    yarn = config.pop("rope_scaling")
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    n_hash = config.pop("num_hash_layers")
    return config | {
        "compress_ratios": None,
        "layer_types": [kinds[ratio] for ratio in CFG.compress_ratios],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "mlp_layer_types": ["hash_moe"] * n_hash + ["moe"] * (CFG.n_layers - n_hash),
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "compress": {"rope_type": yarn.pop("type"), "rope_theta": 160000.0, "attention_factor": 1.0, **yarn},
        },
    }


def tokenizer_files() -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of `byte_tokenizer`."""
    ours = byte_tokenizer()
    contents = json.loads(ours._bpe.to_str())
    text = contents["model"]["vocab"]
    contents["added_tokens"] = [
        {"id": i, "content": token, "special": False, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, token in enumerate(ours.tokens) if token not in text
    ]  # fmt: skip
    options = {
        "bos_token": {"__type": "AddedToken", "content": ours.tokens[ours.bos_id]},
        "eos_token": ours.tokens[ours.eos_id],
        "add_bos_token": False,
    }
    return {"tokenizer.json": contents, "tokenizer_config.json": options}


def safetensors(stored: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in stored.values())


@dataclasses.dataclass
class Files:
    """A checkpoint before it is written, for tests to change."""

    stored: dict[str, tuple[str, tuple[int, ...], bytes]]
    json: dict[str, dict]
    shards: int

    def write(self, folder) -> None:
        """Writes all files; tensors go to the shards in turn. With one shard there is no index."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in self.json.items():
            (folder / name).write_text(json.dumps(contents), "utf-8")
        names = [f"model-{i + 1:05}-of-{self.shards:05}.safetensors" for i in range(self.shards)]
        parts = [dict(list(self.stored.items())[i :: self.shards]) for i in range(self.shards)]
        for name, part in zip(names, parts, strict=True):
            (folder / name).write_bytes(safetensors(part))
        if self.shards > 1:
            weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def files(kind: str = "official", mtp: bool = False) -> Files:
    """kind: ``official``, ``drafter``, ``transformers`` (quantized), ``transformers-bf16`` or ``saved``."""
    if kind == "drafter":
        return Files(official(drafter=True).stored, {"config.json": drafter_config(), **tokenizer_files()}, 3)
    if kind == "official":
        return Files(official(mtp).stored, {"config.json": official_config(), **tokenizer_files()}, 3)
    builder = saved() if kind == "saved" else transformers(kind == "transformers-bf16")
    return Files(builder.stored, {"config.json": transformers_config(), **tokenizer_files()}, 1)
