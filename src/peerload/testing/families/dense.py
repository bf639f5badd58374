"""Decoders without experts, with the names that Llama gave them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ...model.catalog import TensorSpec
from .. import rules
from ..rules import Sizes
from .decoder import SMALL, TWO_NORMS, config_of, decoder, in_half, quantization_keys
from .family import Family


def llama(name: str, s: Sizes = SMALL, *, quantization: str = "bf16", tied: bool = False) -> Family:
    quantize, asked = rules.quantizations(s, routed=False).get(quantization, (rules.bf16, None))
    config = config_of(s, "llama", "LlamaForCausalLM", tie_word_embeddings=tied, **quantization_keys(asked))
    layers = [[*rules.attention(s, quantize), *rules.mlp("mlp", s, s.inter, quantize)] for _ in range(s.layers)]
    tensors = decoder(s, *layers, tied=tied).tensors()
    return Family(name, "Llama", config, in_half(config, tensors), quantization, kv_heads=s.kv_heads)


def dense(s: Sizes) -> Iterator[Family]:
    """Decoders without experts, with the names that most share."""
    qk_norms = list(rules.norms(["self_attn.q_norm", "self_attn.k_norm"], s.head))
    mlp, plain = list(rules.mlp("mlp", s, s.inter, rules.bf16)), list(rules.attention(s, rules.bf16))
    four = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

    def family(name: str, architecture: str, kind: str, layer: list[TensorSpec], norms: Sequence[str] = TWO_NORMS) -> Family:
        tied = kind.startswith("gemma")
        more = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": s.head} if tied else {}
        config = config_of(s, kind, _CLASSES[kind], tie_word_embeddings=tied, **more)
        tensors = decoder(s, *[layer] * s.layers, tied=tied, norms=norms).tensors()
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
