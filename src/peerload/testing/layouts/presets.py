"""Named models: published dimensions, and tiny ones of the same structure that an oracle can hold byte by byte."""

from __future__ import annotations

from functools import cache

from .families import Storing, alone, decoder, experts, grouped_query_attention, latent_attention, mlp, stacked_experts
from .vocabulary import Model, Stack

BF16 = Storing()
FP8_BLOCK = Storing("fp8_block")
#: Tiny models cut scales into blocks of 4 and pad vocabularies to a multiple of 4 rows per rank.
TINY = Storing(block=4, vocabulary=4)


@cache
def llama(
    held: Storing = BF16,
    *,
    name: str = "llama",
    hidden: int,
    inter: int,
    heads: int,
    kv_heads: int,
    head: int,
    layers: int,
    vocabulary: int,
    bias: bool = False,
    norms: bool = False,
    tied: bool = False,
) -> Model:
    """Llama, Qwen2 (bias) and Qwen3 (norms): grouped-query attention and a dense MLP."""
    attention = grouped_query_attention(hidden, heads, kv_heads, head, held, bias=bias, norms=norms)
    stack = Stack(attention + mlp("mlp", hidden, inter, held), "model.layers", 0, layers)
    return decoder(name, hidden, vocabulary, (stack,), held, tied=tied)


@cache
def qwen3_moe(
    held: Storing = BF16,
    *,
    name: str = "qwen3-moe",
    hidden: int,
    inter: int,
    heads: int,
    kv_heads: int,
    head: int,
    layers: int,
    vocabulary: int,
    expert_count: int,
    stacked: bool = False,
) -> Model:
    """Grouped-query attention and routed experts in every layer; `stacked` when the checkpoint's experts are 3-D."""
    routed = (
        stacked_experts("mlp.experts", expert_count, hidden, inter)
        if stacked
        else experts("mlp.experts", expert_count, hidden, inter, held)
    )
    router = alone("mlp.gate.weight", (expert_count, hidden))
    attention = grouped_query_attention(hidden, heads, kv_heads, head, held, norms=True)
    return decoder(name, hidden, vocabulary, (Stack((*attention, router, *routed), "model.layers", 0, layers),), held)


@cache
def deepseek(
    held: Storing = FP8_BLOCK,
    *,
    name: str = "deepseek",
    hidden: int,
    inter: int,
    expert_inter: int,
    expert_count: int,
    shared: int,
    heads: int,
    q_lora: int,
    kv_lora: int,
    nope: int,
    rope: int,
    value: int,
    layers: int,
    dense: int,
    vocabulary: int,
) -> Model:
    """DeepSeek-V3 and Kimi-K2: MLA, some dense layers, then routed and shared experts. Without the MTP layer."""
    attention = latent_attention(hidden, heads, q_lora, kv_lora, nope, rope, value, held)
    gate = alone("mlp.gate.weight", (expert_count, hidden))
    correction = alone("mlp.gate.e_score_correction_bias", (expert_count,), dtype="F32")
    routed = experts("mlp.experts", expert_count, hidden, expert_inter, held)
    both = (gate, correction, *routed, *mlp("mlp.shared_experts", hidden, shared * expert_inter, held))
    stacks = (
        Stack(attention + mlp("mlp", hidden, inter, held), "model.layers", 0, dense),
        Stack((*attention, *both), "model.layers", dense, layers - dense),
    )
    return decoder(name, hidden, vocabulary, stacks, held)


def llama_70b(held: Storing = BF16) -> Model:
    """meta-llama/Llama-3.3-70B-Instruct."""
    return llama(
        held, name="llama-3.3-70b", hidden=8192, inter=28672, heads=64, kv_heads=8, head=128, layers=80, vocabulary=128256
    )


def qwen3_235b(held: Storing = FP8_BLOCK) -> Model:
    """Qwen/Qwen3-235B-A22B(-FP8). At TP8 an expert's 192 rows end inside a block of scales."""
    return qwen3_moe(
        held,
        name="qwen3-235b",
        hidden=4096,
        inter=1536,
        heads=64,
        kv_heads=4,
        head=128,
        layers=94,
        vocabulary=151936,
        expert_count=128,
    )


def deepseek_v3(held: Storing = FP8_BLOCK) -> Model:
    """deepseek-ai/DeepSeek-V3."""
    return deepseek(
        held,
        name="deepseek-v3",
        hidden=7168,
        inter=18432,
        expert_inter=2048,
        expert_count=256,
        shared=1,
        heads=128,
        q_lora=1536,
        kv_lora=512,
        nope=128,
        rope=64,
        value=128,
        layers=61,
        dense=3,
        vocabulary=129280,
    )


def kimi_k2(held: Storing = FP8_BLOCK) -> Model:
    """moonshotai/Kimi-K2-Instruct."""
    return deepseek(
        held,
        name="kimi-k2",
        hidden=7168,
        inter=18432,
        expert_inter=2048,
        expert_count=384,
        shared=1,
        heads=64,
        q_lora=1536,
        kv_lora=512,
        nope=128,
        rope=64,
        value=128,
        layers=61,
        dense=1,
        vocabulary=163840,
    )


def tiny_llama(held: Storing = TINY, *, kv_heads: int = 8, heads: int = 16, tied: bool = False, bias: bool = False) -> Model:
    """Two layers; 16 query heads of 2 unless said otherwise; 23 rows of vocabulary."""
    return llama(
        held,
        name=f"tiny-llama-{heads}x{kv_heads}",
        hidden=12,
        inter=24,
        heads=heads,
        kv_heads=kv_heads,
        head=2,
        layers=2,
        vocabulary=23,
        tied=tied,
        bias=bias,
    )


def tiny_qwen3_moe(held: Storing = TINY, *, stacked: bool = False) -> Model:
    """Three layers of 8 experts, 2 key and value heads."""
    return qwen3_moe(
        held,
        name="tiny-qwen3-moe",
        hidden=8,
        inter=18,
        heads=6,
        kv_heads=2,
        head=2,
        layers=3,
        vocabulary=17,
        expert_count=8,
        stacked=stacked,
    )


def tiny_deepseek(held: Storing = TINY) -> Model:
    """Four layers, the first dense; 12 experts, 1 shared; 16 heads."""
    return deepseek(
        held,
        name="tiny-deepseek",
        hidden=12,
        inter=24,
        expert_inter=10,
        expert_count=12,
        shared=1,
        heads=16,
        q_lora=6,
        kv_lora=5,
        nope=2,
        rope=1,
        value=3,
        layers=4,
        dense=1,
        vocabulary=19,
    )
