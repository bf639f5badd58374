"""Small models of real architectures: configuration and tensors as published checkpoints have them, derived by rule.

For tests that need an engine's own classes and loaders, not a model that answers well. A probe takes seconds, and every size
divides as engines split it over up to four ranks: the vocabulary leaves padding on the last one, FP8 blocks and quantization
groups of 128 end where a rank's part ends. `tests/unit/test_families.py` compares the unquantized catalogs with what
transformers would save.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from ..model.catalog import Catalog, TensorSpec
from ..tracing.dtypes import DTYPES
from . import rules
from .rules import Sizes

_SMALL: Final = Sizes()
#: Blocks of 128 x 128 and groups of 128 have to end where a fourth of a matrix ends.
_BLOCKS: Final = Sizes(head=128, wide=512, experts=4)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A model: `config` is its config.json, `tensors` are its checkpoint's, by name. `architecture` and `quantization` are
    the words for people; `experts` counts routed ones, 0 for a dense model."""

    name: str
    architecture: str
    config: Mapping[str, object]
    tensors: tuple[TensorSpec, ...]
    quantization: str = "bf16"
    experts: int = 0
    kv_heads: int = 4

    @property
    def catalog(self) -> Catalog:
        return Catalog.of(self.tensors)

    def __str__(self) -> str:
        return self.name


def write_family(directory: str | Path, family: Family, seed: int = 0, *, weights: bool = True, shards: int = 1) -> Path:
    """Write config.json, and with `weights` random tensors: the same for the same `seed`, finite, scales positive, so that the
    engine can also run the model. More than one shard comes with its index. The directory is made; its path is returned."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(family.config, indent=1))
    if not weights:
        return directory
    from safetensors.torch import save_file

    random, files = torch.Generator().manual_seed(seed), {}
    step = -(-len(family.tensors) // shards)
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {spec.name: values(spec, random) for spec in family.tensors[shard * step : (shard + 1) * step]}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
    if shards > 1:
        nbytes = sum(math.prod(spec.shape) * DTYPES[spec.dtype].itemsize for spec in family.tensors)
        index = {"metadata": {"total_size": nbytes}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def values(spec: TensorSpec, random: torch.Generator) -> torch.Tensor:
    """Norms near 1, small biases, unit-variance embeddings; quantized integers and floats use their whole range, and their
    scales are such that matrices about keep the variance of what they multiply, whatever their size."""
    name, dtype, shape = spec
    kind = DTYPES[dtype]
    noise: torch.Tensor = torch.randn(shape, generator=random)
    even = 0.5 + torch.rand(shape, generator=random)
    if name.endswith("g_idx"):
        return torch.arange(shape[0], dtype=kind) // 128
    if name.endswith("qzeros"):
        return torch.full(shape, 0x77777777, dtype=kind)  # zero is 8 in GPTQ, which stores one less, and 7 in AWQ
    if dtype == "I32":
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int64).to(kind)
    if dtype == "I8":
        return torch.randint(-127, 128, shape, generator=random, dtype=kind)
    if dtype == "F8_E4M3":
        return (noise * 100).clamp(-448, 448).to(kind)
    if name.endswith("input_scale"):
        return (0.02 * even).to(kind)
    if "scale" in name.rpartition(".")[2]:
        return (0.02 * even if name.endswith("scales") else 0.0015 * even).to(kind)
    if name.endswith("A_log"):
        return (even * 2).to(kind)
    if "norm" in name or ".ln_" in name:
        return ((0 if name.endswith("bias") else 1) + 0.1 * noise).to(kind)
    if len(shape) < 2 or name.endswith("_bias"):
        return (0.1 * noise).to(kind)
    if any(word in name for word in ("embed", "wte", "wpe")):
        return noise.to(kind)
    return (noise * (1.5 / math.sqrt(shape[-1]))).to(kind)


_TWO_NORMS: Final = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class _Shape:
    """A decoder: the tensors of each layer, relative to `prefix`, and those outside the layers."""

    layers: Sequence[Sequence[TensorSpec]]
    outside: Sequence[TensorSpec] = field(default=())
    prefix: str = "model.layers"

    def tensors(self) -> tuple[TensorSpec, ...]:
        inside = [t._replace(name=f"{self.prefix}.{i}.{t.name}") for i, layer in enumerate(self.layers) for t in layer]
        return tuple(sorted([*inside, *self.outside]))


def _decoder(s: Sizes, *layers: Iterable[TensorSpec], tied: bool = False, norms: Sequence[str] = _TWO_NORMS) -> _Shape:
    """With the names that most architectures share."""
    rows = [(*layer, *rules.norms(norms, s.hidden)) for layer in layers]
    embed, head = (
        rules.tensor("model.embed_tokens.weight", s.vocab, s.hidden),
        rules.tensor("lm_head.weight", s.vocab, s.hidden),
    )
    outside = [embed, *rules.norms(["model.norm"], s.hidden)]
    return _Shape(rows, outside if tied else [*outside, head])


def _config(s: Sizes, kind: str, architecture: str, **more: object) -> dict[str, object]:
    """A config.json with the keys that most architectures share."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": "bfloat16",
        "hidden_size": s.hidden,
        "intermediate_size": s.inter,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head,
        "vocab_size": s.vocab,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **more,
    }


def llama(name: str, s: Sizes = _SMALL, *, quantization: str = "bf16", tied: bool = False) -> Family:
    quantize, asked = rules.quantizations(s, routed=False).get(quantization, (rules.bf16, None))
    config = _config(s, "llama", "LlamaForCausalLM", tie_word_embeddings=tied, **_asking(asked))
    layers = [[*rules.attention(s, quantize), *rules.mlp("mlp", s, s.inter, quantize)] for _ in range(s.layers)]
    tensors = _decoder(s, *layers, tied=tied).tensors()
    return Family(name, "Llama", config, _half(config, tensors), quantization, kv_heads=s.kv_heads)


def qwen3_moe(name: str, s: Sizes = _SMALL, *, quantization: str = "bf16") -> Family:
    quantize, asked = rules.quantizations(s, routed=True).get(quantization, (rules.bf16, None))
    config = _config(
        s,
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        num_experts=s.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=s.wide,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        **_asking(asked),
    )
    norms = list(rules.norms(["self_attn.q_norm", "self_attn.k_norm"], s.head))
    layers = [[*rules.attention(s, quantize), *norms, *rules.experts("mlp", s, quantize)] for _ in range(s.layers)]
    tensors = _half(config, _decoder(s, *layers).tensors())
    return Family(name, "Qwen3-MoE", config, tensors, quantization, s.experts, s.kv_heads)


def _asking(quantization: dict[str, object] | None) -> dict[str, object]:
    """GPTQ and AWQ kernels want their activations in FP16 like their scales."""
    if quantization is None:
        return {}
    half = quantization["quant_method"] in ("gptq", "awq")
    return {"quantization_config": quantization, **({"torch_dtype": "float16"} if half else {})}


def _half(config: Mapping[str, object], tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """A model in FP16 has no tensors in BF16."""
    if config["torch_dtype"] == "bfloat16":
        return tensors
    return tuple(t._replace(dtype="F16") if t.dtype == "BF16" else t for t in tensors)


def _dense(s: Sizes) -> Iterator[Family]:
    """Decoders without experts, with the names that most share."""
    qk_norms = list(rules.norms(["self_attn.q_norm", "self_attn.k_norm"], s.head))
    mlp, plain = list(rules.mlp("mlp", s, s.inter, rules.bf16)), list(rules.attention(s, rules.bf16))
    four = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

    def family(name: str, architecture: str, kind: str, layer: list[TensorSpec], norms: Sequence[str] = _TWO_NORMS) -> Family:
        tied = kind.startswith("gemma")
        more = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": s.head} if tied else {}
        config = _config(s, kind, _CLASSES[kind], tie_word_embeddings=tied, **more)
        tensors = _decoder(s, *[layer] * s.layers, tied=tied, norms=norms).tensors()
        return Family(name, architecture, config, tensors, kv_heads=s.kv_heads)

    yield family("qwen2", "Qwen2", "qwen2", [*rules.attention(s, rules.bf16, qkv=rules.biased), *mlp])
    yield family("qwen3", "Qwen3", "qwen3", [*plain, *qk_norms, *mlp])
    fused = (s.heads + 2 * s.kv_heads) * s.head
    phi3 = [*rules.bf16("self_attn.qkv_proj", fused, s.hidden), *rules.bf16("self_attn.o_proj", s.hidden, s.heads * s.head)]
    phi3 += [*rules.bf16("mlp.gate_up_proj", 2 * s.inter, s.hidden), *rules.bf16("mlp.down_proj", s.hidden, s.inter)]
    yield family("phi3", "Phi-3", "phi3", phi3)
    yield family("gemma2", "Gemma-2", "gemma2", [*plain, *mlp], four)
    yield family("gemma3", "Gemma-3", "gemma3_text", [*plain, *qk_norms, *mlp], four)


_CLASSES: Final = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _older(s: Sizes) -> Iterator[Family]:
    """Architectures from before Llama, each with names of its own."""
    common = {"torch_dtype": "bfloat16", "vocab_size": s.vocab, "bos_token_id": 0, "eos_token_id": 1}
    config: dict[str, object] = {
        **common,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "n_positions": 512,
    }
    layer = list(rules.norms(["ln_1", "ln_2"], s.hidden, bias=True))
    for name, rows, cols in (
        ("attn.c_attn", s.hidden, 3 * s.hidden),
        ("attn.c_proj", s.hidden, s.hidden),
        ("mlp.c_fc", s.hidden, 4 * s.hidden),
        ("mlp.c_proj", 4 * s.hidden, s.hidden),
    ):
        layer += [rules.tensor(f"{name}.weight", rows, cols), rules.tensor(f"{name}.bias", cols)]
    outside = [rules.tensor("transformer.wte.weight", s.vocab, s.hidden), rules.tensor("transformer.wpe.weight", 512, s.hidden)]
    outside += rules.norms(["transformer.ln_f"], s.hidden, bias=True)
    yield Family("gpt2", "GPT-2", config, _Shape([layer] * s.layers, outside, "transformer.h").tensors(), kv_heads=s.heads)

    config = {
        **common,
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": s.hidden,
        "ffn_dim": s.inter,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "word_embed_proj_dim": s.hidden,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
    }
    layer = [t for x in ("q", "k", "v", "out") for t in rules.biased(f"self_attn.{x}_proj", s.hidden, s.hidden)]
    layer += [*rules.biased("fc1", s.inter, s.hidden), *rules.biased("fc2", s.hidden, s.inter)]
    layer += rules.norms(["self_attn_layer_norm", "final_layer_norm"], s.hidden, bias=True)
    outside = [rules.tensor("model.decoder.embed_tokens.weight", s.vocab, s.hidden)]
    outside += [rules.tensor("model.decoder.embed_positions.weight", 514, s.hidden)]
    outside += rules.norms(["model.decoder.final_layer_norm"], s.hidden, bias=True)
    yield Family("opt", "OPT", config, _Shape([layer] * s.layers, outside, "model.decoder.layers").tensors(), kv_heads=s.heads)

    config = {
        **common,
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": s.hidden,
        "intermediate_size": s.inter,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    layer = [
        *rules.biased("attention.query_key_value", 3 * s.hidden, s.hidden),
        *rules.biased("attention.dense", s.hidden, s.hidden),
    ]
    layer += [*rules.biased("mlp.dense_h_to_4h", s.inter, s.hidden), *rules.biased("mlp.dense_4h_to_h", s.hidden, s.inter)]
    layer += rules.norms(_TWO_NORMS, s.hidden, bias=True)
    outside = [rules.tensor(name, s.vocab, s.hidden) for name in ("gpt_neox.embed_in.weight", "embed_out.weight")]
    outside += rules.norms(["gpt_neox.final_layer_norm"], s.hidden, bias=True)
    tensors = _Shape([layer] * s.layers, outside, "gpt_neox.layers").tensors()
    yield Family("gpt-neox", "GPT-NeoX", config, tensors, kv_heads=s.heads)

    config = {
        **common,
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_kv_heads": s.kv_heads,
        "new_decoder_architecture": True,
        "bias": False,
        "parallel_attn": True,
        "multi_query": True,
        "alibi": False,
    }
    layer = [*rules.bf16("self_attention.query_key_value", (s.heads + 2 * s.kv_heads) * s.head, s.hidden)]
    layer += rules.bf16("self_attention.dense", s.hidden, s.hidden)
    layer += [
        *rules.bf16("mlp.dense_h_to_4h", 4 * s.hidden, s.hidden),
        *rules.bf16("mlp.dense_4h_to_h", s.hidden, 4 * s.hidden),
    ]
    layer += rules.norms(["ln_attn", "ln_mlp"], s.hidden, bias=True)
    outside = [rules.tensor("transformer.word_embeddings.weight", s.vocab, s.hidden)]
    outside += rules.norms(["transformer.ln_f"], s.hidden, bias=True)
    tensors = _Shape([layer] * s.layers, outside, "transformer.h").tensors()
    yield Family("falcon", "Falcon", config, tensors, kv_heads=s.kv_heads)


def _sparse(s: Sizes) -> Iterator[Family]:
    """Decoders with experts."""
    attention, counts = list(rules.attention(s, rules.bf16)), {"num_experts": s.experts, "num_experts_per_tok": 2}

    def family(name: str, architecture: str, config: dict[str, object], *layers: list[TensorSpec], experts: int = 8) -> Family:
        return Family(name, architecture, config, _decoder(s, *layers).tensors(), experts=experts, kv_heads=s.kv_heads)

    wide = replace(s, wide=s.inter, experts=4)
    mixtral = [*attention, *rules.bf16("block_sparse_moe.gate", wide.experts, s.hidden)]
    for expert in range(wide.experts):
        for w, rows, cols in (("w1", s.inter, s.hidden), ("w2", s.hidden, s.inter), ("w3", s.inter, s.hidden)):
            mixtral += rules.bf16(f"block_sparse_moe.experts.{expert}.{w}", rows, cols)
    config = _config(s, "mixtral", "MixtralForCausalLM", num_local_experts=wide.experts, num_experts_per_tok=2)
    yield family("mixtral", "Mixtral", config, *[mixtral] * s.layers, experts=wide.experts)

    shared = [*rules.mlp("mlp.shared_expert", s, 256, rules.bf16), *rules.bf16("mlp.shared_expert_gate", 1, s.hidden)]
    experts = list(rules.experts("mlp", s, rules.bf16))
    config = _config(
        s,
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        **counts,
        moe_intermediate_size=s.wide,
        shared_expert_intermediate_size=256,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=False,
    )
    layer = [*rules.attention(s, rules.bf16, qkv=rules.biased), *experts, *shared]
    yield family("qwen2-moe", "Qwen2-MoE", config, *[layer] * s.layers)

    norms = [*rules.norms(["self_attn.q_norm"], s.heads * s.head), *rules.norms(["self_attn.k_norm"], s.kv_heads * s.head)]
    config = _config(s, "olmoe", "OlmoeForCausalLM", **{**counts, "num_experts": wide.experts}, norm_topk_prob=False)
    layer = [*attention, *norms, *rules.experts("mlp", wide, rules.bf16)]
    yield family("olmoe", "OLMoE", config, *[layer] * s.layers, experts=wide.experts)

    half = replace(s, experts=4)
    config = _config(
        half,
        "qwen3_next",
        "Qwen3NextForCausalLM",
        **{**counts, "num_experts": 4},
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
    moe = [*rules.experts("mlp", half, rules.bf16), *rules.mlp("mlp.shared_expert", s, s.wide, rules.bf16)]
    moe += rules.bf16("mlp.shared_expert_gate", 1, s.hidden)
    full = [*rules.attention(s, rules.bf16, gated=True), *norms, *moe]
    tensors = _decoder(half, [*rules.linear_attention(s), *moe], full).tensors()
    yield Family("qwen3-next", "Qwen3-Next", config, tensors, experts=4, kv_heads=s.kv_heads)


def _shared_experts(s: Sizes) -> Iterator[Family]:
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

    config = _config(
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
    tensors = _decoder(s, [*attention, *mlp], [*attention, *moe]).tensors()
    yield Family("deepseek-v2", "DeepSeek-V2", config, tensors, experts=s.experts, kv_heads=s.heads)

    config = _config(
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
    tensors = _decoder(s, [*attention, *mlp], [*attention, *moe, *correction]).tensors()
    yield Family("deepseek-v3", "DeepSeek-V3", config, tensors, experts=s.experts, kv_heads=s.heads)

    config = _config(s, "glm4_moe", "Glm4MoeForCausalLM", **routed, use_qk_norm=False, norm_topk_prob=True)
    attention = list(rules.attention(s, rules.bf16))
    correction = [rules.tensor("mlp.gate.e_score_correction_bias", s.experts, dtype="F32")]
    tensors = _decoder(s, [*attention, *mlp], [*attention, *moe, *correction]).tensors()
    yield Family("glm4-moe", "GLM-4-MoE", config, tensors, experts=s.experts, kv_heads=s.kv_heads)


def _stacked(s: Sizes) -> Iterator[Family]:
    """Architectures whose checkpoints hold all experts of a layer in one tensor."""
    s = replace(s, experts=4, wide=512)
    config = _config(
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
    tensors = _decoder(s, *[layer] * s.layers).tensors()
    yield Family("gpt-oss", "gpt-oss", config, tensors, experts=s.experts, kv_heads=s.kv_heads)

    config = _config(
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
    tensors = _decoder(s, *[layer] * s.layers).tensors()
    yield Family("llama4", "Llama-4 text", config, tensors, experts=s.experts, kv_heads=s.kv_heads)


def _all() -> Iterator[Family]:
    s, two = Sizes(), Sizes(kv_heads=2)
    yield llama("llama")
    yield llama("llama-tied", tied=True)
    yield llama("llama-kv2", two)
    yield from _dense(s)
    yield from _older(s)
    yield qwen3_moe("qwen3-moe")
    yield qwen3_moe("qwen3-moe-kv2", two)
    yield from _sparse(s)
    yield from _shared_experts(s)
    yield from _stacked(s)
    for word in rules.quantizations(s, routed=True):
        yield llama(f"llama-{word}", _BLOCKS, quantization=word)
        yield qwen3_moe(f"qwen3-moe-{word}", _BLOCKS, quantization=word)
    yield llama("llama-kv2-fp8-block", replace(_BLOCKS, kv_heads=2), quantization="fp8-block")


#: By name.
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({family.name: family for family in _all()})
