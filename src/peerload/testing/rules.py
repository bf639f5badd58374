"""How layers name their weights in published checkpoints, plain or quantized. Names are relative to the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ..model.catalog import TensorSpec

#: The tensors of a linear layer's weight: (layer's name, output rows, input columns).
Quantize: TypeAlias = Callable[[str, int, int], Iterator[TensorSpec]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the architectures have in common. `inter` is the width of a dense MLP, `wide` that of one expert."""

    hidden: int = 256
    inter: int = 512
    heads: int = 8
    kv_heads: int = 4
    head: int = 32
    vocab: int = 1000
    layers: int = 2
    experts: int = 8
    wide: int = 128


def tensor(name: str, *shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def bf16(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight", rows, cols)


def _fp8_tensor(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight", rows, cols, dtype="F8_E4M3")
    yield tensor(f"{name}.weight_scale", dtype="F32")
    yield tensor(f"{name}.input_scale", dtype="F32")


def _fp8_channel(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight", rows, cols, dtype="F8_E4M3")
    yield tensor(f"{name}.weight_scale", rows, 1)


def _fp8_block(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight", rows, cols, dtype="F8_E4M3")
    yield tensor(f"{name}.weight_scale_inv", -(-rows // 128), -(-cols // 128), dtype="F32")


def _w8a8(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight", rows, cols, dtype="I8")
    yield tensor(f"{name}.weight_scale", rows, 1)


def _gptq(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.qweight", cols // 8, rows, dtype="I32")
    yield tensor(f"{name}.qzeros", cols // 128, rows // 8, dtype="I32")
    yield tensor(f"{name}.scales", cols // 128, rows, dtype="F16")
    yield tensor(f"{name}.g_idx", cols, dtype="I32")


def _awq(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.qweight", cols, rows // 8, dtype="I32")
    yield tensor(f"{name}.qzeros", cols // 128, rows // 8, dtype="I32")
    yield tensor(f"{name}.scales", cols // 128, rows, dtype="F16")


def _compressed(kind: str, routed: bool) -> dict[str, object]:
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(["re:.*mlp.gate$"] if routed else [])],
    }


def quantizations(s: Sizes, *, routed: bool) -> dict[str, tuple[Quantize, dict[str, object]]]:
    """By word: the rule, and config.json's `quantization_config`. Routers of experts are not quantized."""
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(s.layers)] if routed else []
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head", *routers]}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return {
        "fp8-tensor": (_fp8_tensor, {**fp8, "activation_scheme": "static"}),
        "fp8-channel": (_fp8_channel, _compressed("float", routed)),
        "fp8-block": (_fp8_block, {**fp8, "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
        "w8a8": (_w8a8, _compressed("int", routed)),
        "gptq": (_gptq, {**gptq, **({"dynamic": {r"-:.*mlp\.gate$": {}}} if routed else {})}),
        "awq": (_awq, {**awq, **({"modules_to_not_convert": ["mlp.gate"]} if routed else {})}),
    }


def biased(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield from bf16(name, rows, cols)
    yield tensor(f"{name}.bias", rows)


def norms(names: Iterable[str], width: int, *, bias: bool = False) -> Iterator[TensorSpec]:
    for name in names:
        yield tensor(f"{name}.weight", width)
        if bias:
            yield tensor(f"{name}.bias", width)


def attention(s: Sizes, quantize: Quantize, *, qkv: Quantize | None = None, gated: bool = False) -> Iterator[TensorSpec]:
    """Grouped-query attention of a layer; `gated`: the query projection makes a gate as well."""
    first, rows = qkv or quantize, s.heads * s.head
    yield from first("self_attn.q_proj", rows * (1 + gated), s.hidden)
    yield from first("self_attn.k_proj", s.kv_heads * s.head, s.hidden)
    yield from first("self_attn.v_proj", s.kv_heads * s.head, s.hidden)
    yield from quantize("self_attn.o_proj", s.hidden, rows)


def latent_attention(s: Sizes, *, q_lora: int = 0) -> Iterator[TensorSpec]:
    """DeepSeek's MLA: heads of 32 + 32 query and 32 value elements out of a latent of 64."""
    if q_lora:
        yield from bf16("self_attn.q_a_proj", q_lora, s.hidden)
        yield from norms(["self_attn.q_a_layernorm"], q_lora)
    yield from bf16("self_attn.q_b_proj" if q_lora else "self_attn.q_proj", s.heads * 64, q_lora or s.hidden)
    yield from bf16("self_attn.kv_a_proj_with_mqa", 64 + 32, s.hidden)
    yield from norms(["self_attn.kv_a_layernorm"], 64)
    yield from bf16("self_attn.kv_b_proj", s.heads * 64, 64)
    yield from bf16("self_attn.o_proj", s.hidden, s.heads * 32)


def linear_attention(s: Sizes) -> Iterator[TensorSpec]:
    """Qwen3-Next's gated delta net: half as many key heads as value heads, a convolution over queries, keys and values."""
    keys, rows = s.heads // 2 * s.head, s.heads * s.head
    yield from bf16("linear_attn.in_proj_qkvz", 2 * keys + 2 * rows, s.hidden)
    yield from bf16("linear_attn.in_proj_ba", 2 * s.heads, s.hidden)
    yield tensor("linear_attn.conv1d.weight", 2 * keys + rows, 1, 4)
    yield from (tensor(f"linear_attn.{name}", s.heads) for name in ("A_log", "dt_bias"))
    yield from norms(["linear_attn.norm"], s.head)
    yield from bf16("linear_attn.out_proj", s.hidden, rows)


def mlp(name: str, s: Sizes, wide: int, quantize: Quantize) -> Iterator[TensorSpec]:
    yield from quantize(f"{name}.gate_proj", wide, s.hidden)
    yield from quantize(f"{name}.up_proj", wide, s.hidden)
    yield from quantize(f"{name}.down_proj", s.hidden, wide)


def experts(name: str, s: Sizes, quantize: Quantize) -> Iterator[TensorSpec]:
    """A router and its experts, one by one."""
    yield from bf16(f"{name}.gate", s.experts, s.hidden)
    for expert in range(s.experts):
        yield from mlp(f"{name}.experts.{expert}", s, s.wide, quantize)


def stacked_experts(name: str, s: Sizes) -> Iterator[TensorSpec]:
    """All experts in one tensor, gate and up side by side, matrices as [in, out]."""
    yield tensor(f"{name}.gate_up_proj", s.experts, s.hidden, 2 * s.wide)
    yield tensor(f"{name}.down_proj", s.experts, s.wide, s.hidden)
