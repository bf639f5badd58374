"""What decoders share: names of tensors and keys of config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...model.catalog import TensorSpec
from .. import rules
from ..rules import Sizes

SMALL: Final = Sizes()
TWO_NORMS: Final = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Layers:
    """A decoder: the tensors of each layer, relative to `prefix`, and those outside the layers."""

    layers: Sequence[Sequence[TensorSpec]]
    outside: Sequence[TensorSpec] = field(default=())
    prefix: str = "model.layers"

    def tensors(self) -> tuple[TensorSpec, ...]:
        inside = [t._replace(name=f"{self.prefix}.{i}.{t.name}") for i, layer in enumerate(self.layers) for t in layer]
        return tuple(sorted([*inside, *self.outside]))


def decoder(s: Sizes, *layers: Iterable[TensorSpec], tied: bool = False, norms: Sequence[str] = TWO_NORMS) -> Layers:
    """With the names that most architectures share."""
    rows = [(*layer, *rules.norms(norms, s.hidden)) for layer in layers]
    embed, head = (
        rules.tensor("model.embed_tokens.weight", s.vocab, s.hidden),
        rules.tensor("lm_head.weight", s.vocab, s.hidden),
    )
    outside = [embed, *rules.norms(["model.norm"], s.hidden)]
    return Layers(rows, outside if tied else [*outside, head])


def config_of(s: Sizes, kind: str, architecture: str, **more: object) -> dict[str, object]:
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


def quantization_keys(quantization: dict[str, object] | None) -> dict[str, object]:
    """What config.json says of a quantization. GPTQ and AWQ kernels want their activations in FP16 like their scales."""
    if quantization is None:
        return {}
    half = quantization["quant_method"] in ("gptq", "awq")
    return {"quantization_config": quantization, **({"torch_dtype": "float16"} if half else {})}


def in_half(config: Mapping[str, object], tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """A model in FP16 has no tensors in BF16."""
    if config["torch_dtype"] == "bfloat16":
        return tensors
    return tuple(t._replace(dtype="F16") if t.dtype == "BF16" else t for t in tensors)
