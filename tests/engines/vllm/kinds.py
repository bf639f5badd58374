"""Small checkpoints of models that are more than a decoder of text, made by transformers from random values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

TEXT: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
#: Tokens that stand for pictures, and their numbers in the model's configuration.
PICTURES: Final = {"<|image_pad|>": 500, "<|video_pad|>": 501, "<|vision_start|>": 502, "<|vision_end|>": 503}
#: What vLLM has to be told of each, beside the directory.
ARGUMENTS: Final[dict[str, dict[str, object]]] = {
    "Qwen2.5-VL": {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}, "skip_mm_profiling": True},
    "GraniteMoeHybrid": {},
    "Qwen3-classifier": {"runner": "pooling"},
}


def write_kind(directory: Path, kind: str) -> Path:
    """One of `ARGUMENTS`."""
    model = {"Qwen2.5-VL": vision, "GraniteMoeHybrid": hybrid, "Qwen3-classifier": classifier}[kind]()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05 + (parameter.dim() == 1))
    model.to(torch.bfloat16).save_pretrained(directory)
    if kind == "Qwen2.5-VL":
        processor().save_pretrained(directory)
    return directory


def vision() -> PreTrainedModel:
    """A vision tower before a decoder."""
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": TEXT["hidden_size"],
        "fullatt_block_indexes": [1],
    }
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope}, vision_config=tower, **dict(zip(names, PICTURES.values(), strict=True))
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def processor() -> Qwen2_5_VLProcessor:
    """vLLM asks for one before it loads a vision tower. No test shows it a picture."""
    vocabulary = {**{f"word{n}": n for n in range(500)}, **PICTURES, "<|endoftext|>": 504}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*PICTURES],
    )
    small = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**small), tokenizer, Qwen2VLVideoProcessor(**small))


def hybrid() -> PreTrainedModel:
    """A Mamba layer with experts, then one of attention with experts."""
    mamba = {
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "layer_types": ["mamba", "attention"],
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128}
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**TEXT, **mamba, **experts, position_embedding_type="rope"))


def classifier() -> PreTrainedModel:
    """A score in place of a head over the vocabulary."""
    return Qwen3ForSequenceClassification(Qwen3Config(**TEXT, head_dim=32, num_labels=3, pad_token_id=0))
