"""Layouts as serving engines hold them, generated from model dimensions: for tests, benchmarks and adapter authors.

    vocabulary.py   the words: splits, parts, parameters, stacks, models; how ranks are arranged
    families.py     what engines say with them: fused qkv_proj, w13, MLA, quantization scales
    presets.py      named models, real and tiny
    place.py        words -> Layout

`layout(deepseek_v3(), Parallel(tp=8, ep=8), rank)` is all most callers need.
"""

from .families import Quantization, Storing
from .place import catalog, checkpoint, layout, layouts
from .presets import (
    BF16,
    FP8_BLOCK,
    TINY,
    deepseek,
    deepseek_v3,
    kimi_k2,
    llama,
    llama_70b,
    qwen3_235b,
    qwen3_moe,
    tiny_deepseek,
    tiny_llama,
    tiny_qwen3_moe,
)
from .vocabulary import WHOLE, Blocks, Chunked, FirstRank, Heads, Model, Padded, Param, Part, Replicated, Split, Stack

__all__ = [
    "BF16",
    "FP8_BLOCK",
    "TINY",
    "WHOLE",
    "Blocks",
    "Chunked",
    "FirstRank",
    "Heads",
    "Model",
    "Padded",
    "Param",
    "Part",
    "Quantization",
    "Replicated",
    "Split",
    "Stack",
    "Storing",
    "catalog",
    "checkpoint",
    "deepseek",
    "deepseek_v3",
    "kimi_k2",
    "layout",
    "layouts",
    "llama",
    "llama_70b",
    "qwen3_235b",
    "qwen3_moe",
    "tiny_deepseek",
    "tiny_llama",
    "tiny_qwen3_moe",
]
