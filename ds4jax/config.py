"""ModelConfig: the architecture, every number of it read from the model file."""

from __future__ import annotations

import dataclasses


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

    @property
    def nope_dim(self) -> int:
        """The leading dims of a head that RoPE leaves alone: 448."""
        return self.head_dim - self.rope_dim

    def layers_of_ratio(self, ratio: int) -> tuple[int, ...]:
        """Indices of the layers whose compression ratio is `ratio`."""
        return tuple(i for i, r in enumerate(self.compress_ratios) if r == ratio)


CSA_RATIO = 4  # compressed sparse attention: overlapping windows of 4 tokens, selected by the indexer
HCA_RATIO = 128  # heavily compressed attention: windows of 128 tokens, all of them visible
