"""Every family by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from .. import rules
from ..rules import Sizes
from .dense import dense, llama
from .family import Family
from .older import older
from .sparse import qwen3_moe, shared_experts, sparse, stacked

#: Blocks of 128 x 128 and groups of 128 have to end where a fourth of a matrix ends.
_BLOCKS: Final = Sizes(head=128, wide=512, experts=4)


def _all() -> Iterator[Family]:
    s, two = Sizes(), Sizes(kv_heads=2)
    yield llama("llama")
    yield llama("llama-tied", tied=True)
    yield llama("llama-kv2", two)
    yield from dense(s)
    yield from older(s)
    yield qwen3_moe("qwen3-moe")
    yield qwen3_moe("qwen3-moe-kv2", two)
    yield from sparse(s)
    yield from shared_experts(s)
    yield from stacked(s)
    for word in rules.quantizations(s, routed=True):
        yield llama(f"llama-{word}", _BLOCKS, quantization=word)
        yield qwen3_moe(f"qwen3-moe-{word}", _BLOCKS, quantization=word)
    yield llama("llama-kv2-fp8-block", replace(_BLOCKS, kv_heads=2), quantization="fp8-block")


#: By name.
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({family.name: family for family in _all()})
