"""How serving engines hold whole model families, from the dimensions in their configurations.

Numbers are those of the published config.json files; the way of holding them is that of vLLM and SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .vocabulary import WHOLE, Blocks, Chunked, FirstRank, Heads, Model, Padded, Param, Part, Replicated, Split, Stack

#: bf16; FP8 with one scale per tensor, per output channel, or per block of 128 x 128 (`block` elements).
Quantization = Literal["bf16", "fp8_tensor", "fp8_channel", "fp8_block"]


@dataclass(frozen=True, slots=True)
class Storing:
    """How weights are stored, whatever the model: quantization, block edge, and the variants an engine may choose.

    transposed: quantized matrices lie [in, out] in memory. fused_experts: w13 and w2 of all local experts in one buffer
    each, instead of a buffer per expert. vocabulary: rows are padded to a multiple of this per rank.
    """

    quantization: Quantization = "bf16"
    block: int = 128
    transposed: bool = False
    fused_experts: bool = True
    vocabulary: int = 64


@dataclass(frozen=True, slots=True)
class Matrix:
    """One logical matrix `[rows, cols]` of a linear layer that may fuse several, stacked along their rows."""

    name: str
    rows: int
    cols: int
    split: Split = WHOLE


def linear(name: str, members: tuple[Matrix, ...], held: Storing, experts: int = 0) -> tuple[Param, ...]:
    """A linear layer's parameters: its weight, and the scales its quantization asks for."""
    form = held.quantization

    def param(suffix: str, dtype: str, shapes: list[tuple[int, ...]], splits: list[Split], transposed: bool = False) -> Param:
        parts = tuple(Part(m.name + suffix, dtype, shape, split) for m, shape, split in zip(members, shapes, splits, strict=True))
        return Param(name + suffix, parts, experts, transposed)

    def blocks(rows: int) -> int:
        return -(-rows // held.block)

    splits = [m.split for m in members]
    dtype = "BF16" if form == "bf16" else "F8_E4M3"
    weight = param(".weight", dtype, [(m.rows, m.cols) for m in members], splits, held.transposed and form != "bf16")
    if form == "fp8_tensor":
        return weight, param(".weight_scale", "F32", [()] * len(members), [WHOLE] * len(members))
    if form == "fp8_channel":
        channels: list[Split] = [s if s.axis == 0 else WHOLE for s in splits]
        return weight, param(".weight_scale", "F32", [(m.rows, 1) for m in members], channels)
    if form == "fp8_block":
        scales: list[Split] = [
            s if isinstance(s, Replicated) else Blocks(s.axis, s, (m.rows, m.cols)[s.axis], held.block)
            for s, m in zip(splits, members, strict=True)
        ]
        return weight, param(".weight_scale_inv", "F32", [(blocks(m.rows), blocks(m.cols)) for m in members], scales)
    return (weight,)


def alone(name: str, shape: tuple[int, ...], split: Split = WHOLE, dtype: str = "BF16") -> Param:
    """A parameter that holds one tensor of the same name: a norm, a bias, a router."""
    return Param(name, (Part(name, dtype, shape, split),))


def mlp(prefix: str, hidden: int, inter: int, held: Storing) -> tuple[Param, ...]:
    """gate_up_proj (column parallel, fused) and down_proj (row parallel)."""
    gate_up = (Matrix(f"{prefix}.gate_proj", inter, hidden, Chunked(0)), Matrix(f"{prefix}.up_proj", inter, hidden, Chunked(0)))
    down = (Matrix(f"{prefix}.down_proj", hidden, inter, Chunked(1)),)
    return *linear(f"{prefix}.gate_up_proj", gate_up, held), *linear(f"{prefix}.down_proj", down, held)


def experts(prefix: str, count: int, hidden: int, inter: int, held: Storing) -> tuple[Param, ...]:
    """w13 and w2 of routed experts; the checkpoint has a tensor per expert and matrix."""
    one = f"{prefix}.{{e}}"
    where = prefix if held.fused_experts else one
    w13 = (Matrix(f"{one}.gate_proj", inter, hidden, Chunked(0)), Matrix(f"{one}.up_proj", inter, hidden, Chunked(0)))
    w2 = (Matrix(f"{one}.down_proj", hidden, inter, Chunked(1)),)
    return *linear(f"{where}.w13", w13, held, count), *linear(f"{where}.w2", w2, held, count)


def stacked_experts(prefix: str, count: int, hidden: int, inter: int) -> tuple[Param, ...]:
    """w13 and w2 whose checkpoint tensors are 3-D, gate and up fused in one: `[experts, 2 * inter, hidden]`."""
    name, shape = f"{prefix}.gate_up_proj", (2 * inter, hidden)
    halves = tuple(Part(name, "BF16", shape, Chunked(0), (k * inter, (k + 1) * inter)) for k in (0, 1))
    w2 = Part(f"{prefix}.down_proj", "BF16", (hidden, inter), Chunked(1))
    return Param(f"{prefix}.w13", halves, count), Param(f"{prefix}.w2", (w2,), count)


def grouped_query_attention(
    hidden: int, heads: int, kv_heads: int, head: int, held: Storing, *, bias: bool = False, norms: bool = False
) -> tuple[Param, ...]:
    """Fused qkv_proj with key and value heads replicated where there are too few, and o_proj cut by heads."""
    q, kv = Chunked(0, head), Heads(0, kv_heads)
    at, rows = "self_attn", {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    splits: dict[str, Split] = {"q": q, "k": kv, "v": kv}
    members = tuple(Matrix(f"{at}.{x}_proj", rows[x], hidden, splits[x]) for x in rows)
    params = linear(f"{at}.qkv_proj", members, held)
    params += linear(f"{at}.o_proj", (Matrix(f"{at}.o_proj", hidden, heads * head, Chunked(1, head)),), held)
    if bias:
        params += (Param(f"{at}.qkv_proj.bias", tuple(Part(f"{at}.{x}_proj.bias", "BF16", (rows[x],), splits[x]) for x in rows)),)
        params += (alone(f"{at}.o_proj.bias", (hidden,), FirstRank()),)
    if norms:
        params += (alone(f"{at}.q_norm.weight", (head,)), alone(f"{at}.k_norm.weight", (head,)))
    return params


def latent_attention(
    hidden: int, heads: int, q_lora: int, kv_lora: int, nope: int, rope: int, value: int, held: Storing
) -> tuple[Param, ...]:
    """DeepSeek's MLA: the down projections replicated and fused, the up projections and o_proj cut by heads."""
    at = "self_attn"
    down = (Matrix(f"{at}.q_a_proj", q_lora, hidden), Matrix(f"{at}.kv_a_proj_with_mqa", kv_lora + rope, hidden))
    q_up = Matrix(f"{at}.q_b_proj", heads * (nope + rope), q_lora, Chunked(0, nope + rope))
    kv_up = Matrix(f"{at}.kv_b_proj", heads * (nope + value), kv_lora, Chunked(0, nope + value))
    out = Matrix(f"{at}.o_proj", hidden, heads * value, Chunked(1, value))
    norms = alone(f"{at}.q_a_layernorm.weight", (q_lora,)), alone(f"{at}.kv_a_layernorm.weight", (kv_lora,))
    return (
        *linear(f"{at}.fused_qkv_a_proj", down, held),
        *norms,
        *(param for member in (q_up, kv_up, out) for param in linear(member.name, (member,), held)),
    )


def decoder(name: str, hidden: int, vocabulary: int, layers: tuple[Stack, ...], held: Storing, *, tied: bool = False) -> Model:
    """Embedding, layers (each gets its two norms), final norm and head. A tied head stays in the catalog as an alias."""
    rows = Padded(0, held.vocabulary)

    def matrix(param: str, tensor: str) -> Param:
        return Param(param, (Part(tensor, "BF16", (vocabulary, hidden), rows),))

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    norms = alone("input_layernorm.weight", (hidden,)), alone("post_attention_layernorm.weight", (hidden,))
    stacks = tuple(Stack(s.params + norms, s.prefix, s.first, s.count) for s in layers)
    final = (alone("model.norm.weight", (hidden,)),)
    if tied:
        return Model(name, (matrix(embed, embed),), stacks, final, ((head, embed),), (matrix(head, embed),))
    return Model(name, (matrix(embed, embed),), stacks, (*final, matrix(head, head)))
