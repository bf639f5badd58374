"""Small models in formats that vLLM serves on GPUs only: configurations and names of tensors as published ones have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from peerload.model.catalog import TensorSpec
from peerload.testing import families
from peerload.testing.families import FAMILIES, Family
from peerload.testing.rules import Sizes, tensor

SIZES: Final = Sizes(head=128, wide=512, experts=4)


def _nvfp4(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield from _nvfp4a16(name, rows, cols)
    yield tensor(f"{name}.input_global_scale", 1, dtype="F32")


def _nvfp4a16(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight_packed", rows, cols // 2, dtype="U8")
    yield tensor(f"{name}.weight_scale", rows, cols // 16, dtype="F8_E4M3")
    yield tensor(f"{name}.weight_global_scale", 1, dtype="F32")


def _mxfp4(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
    yield tensor(f"{name}.weight_packed", rows, cols // 2, dtype="U8")
    yield tensor(f"{name}.weight_scale", rows, cols // 32, dtype="U8")


def _packed(bits: int) -> Callable[[str, int, int], Iterator[TensorSpec]]:
    def rule(name: str, rows: int, cols: int) -> Iterator[TensorSpec]:
        yield tensor(f"{name}.weight_packed", rows, cols * bits // 32, dtype="I32")
        yield tensor(f"{name}.weight_scale", rows, cols // 128)
        yield tensor(f"{name}.weight_shape", 2, dtype="I64")

    return rule


def _group(kind: str, bits: int, strategy: str, size: int, **activations: object) -> dict[str, object]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": size, "dynamic": False}
    return {"targets": ["Linear"], "weights": weights, "input_activations": {**weights, **activations} if activations else None}


#: By word: the rule, the name that compressed-tensors has for the format, and its group of layers.
_FORMATS: Final[Mapping[str, tuple[Callable[[str, int, int], Iterator[TensorSpec]], str, dict[str, object]]]] = {
    "nvfp4": (_nvfp4, "nvfp4-pack-quantized", _group("float", 4, "tensor_group", 16, dynamic="local")),
    "nvfp4a16": (_nvfp4a16, "nvfp4-pack-quantized", _group("float", 4, "tensor_group", 16)),
    "mxfp4": (_mxfp4, "mxfp4-pack-quantized", _group("float", 4, "group", 32)),
    "w8a16": (_packed(8), "pack-quantized", _group("int", 8, "group", 128)),
    "w4a16": (_packed(4), "pack-quantized", _group("int", 4, "group", 128)),
}


def compressed(kind: str, word: str) -> Family:
    """`kind`: llama or qwen3_moe; its linear layers quantized by compressed-tensors."""
    rule, name, group = _FORMATS[word]
    plain: Family = getattr(families, kind)(f"{kind}-{word}", SIZES)
    asked = {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    tensors: list[TensorSpec] = []
    for spec in plain.tensors:
        if spec.name.endswith("_proj.weight"):
            tensors += rule(spec.name.removesuffix(".weight"), *spec.shape)
        else:
            tensors.append(spec)
    return replace(
        plain, config={**plain.config, "quantization_config": asked}, tensors=tuple(sorted(tensors)), quantization=word
    )


def deepseek_v32() -> Family:
    """DeepSeek-V3 whose attention is sparse: an indexer in each layer chooses 64 tokens."""
    plain = FAMILIES["deepseek-v3"]
    hidden, q_lora = int(str(plain.config["hidden_size"])), int(str(plain.config["q_lora_rank"]))
    config = {
        **plain.config,
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 64,
    }
    more = [
        tensor(f"model.layers.{layer}.self_attn.indexer.{name}", *shape)
        for layer in range(int(str(config["num_hidden_layers"])))
        for name, *shape in (
            ("wq_b.weight", 4 * 64, q_lora),
            ("wk.weight", 64, hidden),
            ("k_norm.weight", 64),
            ("k_norm.bias", 64),
            ("weights_proj.weight", 4, hidden),
        )
    ]
    return replace(plain, name="deepseek-v32", config=config, tensors=tuple(sorted([*plain.tensors, *more])))
