"""Decoders with routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...model.catalog import TensorSpec
from .. import rules
from ..rules import Sizes
from .decoder import SMALL, config_of, decoder, in_half, quantization_keys
from .family import Family


def qwen3_moe(name: str, s: Sizes = SMALL, *, quantization: str = "bf16") -> Family:
    quantize, asked = rules.quantizations(s, routed=True).get(quantization, (rules.bf16, None))
    config = config_of(
        s,
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        num_experts=s.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=s.wide,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        **quantization_keys(asked),
    )
    norms = list(rules.norms(["self_attn.q_norm", "self_attn.k_norm"], s.head))
    layers = [[*rules.attention(s, quantize), *norms, *rules.experts("mlp", s, quantize)] for _ in range(s.layers)]
    tensors = in_half(config, decoder(s, *layers).tensors())
    return Family(name, "Qwen3-MoE", config, tensors, quantization, s.experts, s.kv_heads)


def sparse(s: Sizes) -> Iterator[Family]:
    """Experts with tensors of their own."""
    yield _mixtral(s)
    yield _qwen2_moe(s)
    yield _olmoe(s)
    yield _qwen3_next(s)


def _routed(name: str, architecture: str, s: Sizes, config: dict[str, object], *layers: list[TensorSpec]) -> Family:
    return Family(name, architecture, config, decoder(s, *layers).tensors(), experts=s.experts, kv_heads=s.kv_heads)


def _mixtral(s: Sizes) -> Family:
    s = replace(s, experts=4)
    layer = [*rules.attention(s, rules.bf16), *rules.bf16("block_sparse_moe.gate", s.experts, s.hidden)]
    for expert in range(s.experts):
        for w, rows, cols in (("w1", s.inter, s.hidden), ("w2", s.hidden, s.inter), ("w3", s.inter, s.hidden)):
            layer += rules.bf16(f"block_sparse_moe.experts.{expert}.{w}", rows, cols)
    config = config_of(s, "mixtral", "MixtralForCausalLM", num_local_experts=s.experts, num_experts_per_tok=2)
    return _routed("mixtral", "Mixtral", s, config, *[layer] * s.layers)


def _qwen2_moe(s: Sizes) -> Family:
    shared = [*rules.mlp("mlp.shared_expert", s, 256, rules.bf16), *rules.bf16("mlp.shared_expert_gate", 1, s.hidden)]
    config = config_of(
        s,
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_experts=s.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=s.wide,
        shared_expert_intermediate_size=256,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=False,
    )
    layer = [*rules.attention(s, rules.bf16, qkv=rules.biased), *rules.experts("mlp", s, rules.bf16), *shared]
    return _routed("qwen2-moe", "Qwen2-MoE", s, config, *[layer] * s.layers)


def _olmoe(s: Sizes) -> Family:
    s = replace(s, wide=s.inter, experts=4)
    norms = [*rules.norms(["self_attn.q_norm"], s.heads * s.head), *rules.norms(["self_attn.k_norm"], s.kv_heads * s.head)]
    config = config_of(s, "olmoe", "OlmoeForCausalLM", num_experts=s.experts, num_experts_per_tok=2, norm_topk_prob=False)
    layer = [*rules.attention(s, rules.bf16), *norms, *rules.experts("mlp", s, rules.bf16)]
    return _routed("olmoe", "OLMoE", s, config, *[layer] * s.layers)


def _qwen3_next(s: Sizes) -> Family:
    s = replace(s, experts=4)
    config = config_of(
        s,
        "qwen3_next",
        "Qwen3NextForCausalLM",
        num_experts=s.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=s.wide,
        shared_expert_intermediate_size=s.wide,
        linear_num_value_heads=s.heads,
        linear_num_key_heads=s.heads // 2,
        linear_key_head_dim=s.head,
        linear_value_head_dim=s.head,
        linear_conv_kernel_dim=4,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        partial_rotary_factor=0.25,
        layer_types=["linear_attention", "full_attention"],
    )
    norms = list(rules.norms(["self_attn.q_norm", "self_attn.k_norm"], s.head))
    moe = [*rules.experts("mlp", s, rules.bf16), *rules.mlp("mlp.shared_expert", s, s.wide, rules.bf16)]
    moe += rules.bf16("mlp.shared_expert_gate", 1, s.hidden)
    full = [*rules.attention(s, rules.bf16, gated=True), *norms, *moe]
    return _routed("qwen3-next", "Qwen3-Next", s, config, [*rules.linear_attention(s), *moe], full)


def shared_experts(s: Sizes) -> Iterator[Family]:
    """DeepSeek and those after it: the first layer dense, then routed and shared experts."""
    routed = {
        "moe_intermediate_size": s.wide,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_layer_freq": 1}
    mlp = list(rules.mlp("mlp", s, s.inter, rules.bf16))
    moe = [*rules.experts("mlp", s, rules.bf16), *rules.mlp("mlp.shared_experts", s, s.wide, rules.bf16)]
    all_heads = replace(s, kv_heads=s.heads)

    config = config_of(
        all_heads,
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        **routed,
        **latent,
        q_lora_rank=None,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
    )
    del config["head_dim"]
    attention = list(rules.latent_attention(s))
    tensors = decoder(s, [*attention, *mlp], [*attention, *moe]).tensors()
    yield Family("deepseek-v2", "DeepSeek-V2", config, tensors, experts=s.experts, kv_heads=s.heads)

    config = config_of(
        all_heads,
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **routed,
        **latent,
        q_lora_rank=64,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
    )
    del config["head_dim"]
    attention = list(rules.latent_attention(s, q_lora=64))
    correction = [rules.tensor("mlp.gate.e_score_correction_bias", s.experts)]
    tensors = decoder(s, [*attention, *mlp], [*attention, *moe, *correction]).tensors()
    yield Family("deepseek-v3", "DeepSeek-V3", config, tensors, experts=s.experts, kv_heads=s.heads)

    config = config_of(s, "glm4_moe", "Glm4MoeForCausalLM", **routed, use_qk_norm=False, norm_topk_prob=True)
    attention = list(rules.attention(s, rules.bf16))
    correction = [rules.tensor("mlp.gate.e_score_correction_bias", s.experts, dtype="F32")]
    tensors = decoder(s, [*attention, *mlp], [*attention, *moe, *correction]).tensors()
    yield Family("glm4-moe", "GLM-4-MoE", config, tensors, experts=s.experts, kv_heads=s.kv_heads)


def stacked(s: Sizes) -> Iterator[Family]:
    """Architectures whose checkpoints hold all experts of a layer in one tensor."""
    s = replace(s, experts=4, wide=512)
    config = config_of(
        s,
        "gpt_oss",
        "GptOssForCausalLM",
        num_local_experts=s.experts,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
    )
    layer = [
        *rules.attention(s, rules.biased),
        rules.tensor("self_attn.sinks", s.heads),
        *rules.biased("mlp.router", s.experts, s.hidden),
    ]
    layer += rules.stacked_experts("mlp.experts", s)
    layer += [rules.tensor("mlp.experts.gate_up_proj_bias", s.experts, 2 * s.wide)]
    layer += [rules.tensor("mlp.experts.down_proj_bias", s.experts, s.hidden)]
    tensors = decoder(s, *[layer] * s.layers).tensors()
    yield Family("gpt-oss", "gpt-oss", config, tensors, experts=s.experts, kv_heads=s.kv_heads)

    config = config_of(
        s,
        "llama4_text",
        "Llama4ForCausalLM",
        num_local_experts=s.experts,
        num_experts_per_tok=1,
        intermediate_size_mlp=s.inter,
        interleave_moe_layer_step=1,
        use_qk_norm=False,
    )
    layer = [*rules.attention(s, rules.bf16), *rules.bf16("feed_forward.router", s.experts, s.hidden)]
    layer += [
        *rules.mlp("feed_forward.shared_expert", s, s.inter, rules.bf16),
        *rules.stacked_experts("feed_forward.experts", s),
    ]
    tensors = decoder(s, *[layer] * s.layers).tensors()
    yield Family("llama4", "Llama-4 text", config, tensors, experts=s.experts, kv_heads=s.kv_heads)
