"""Element types: their names in safetensors files and in torch, and which casts lose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

#: torch dtype by safetensors name.
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

#: What each dtype's values can be cast to and back without change (NaN payloads aside).
WIDER: Final[Mapping[torch.dtype, frozenset[torch.dtype]]] = {
    torch.float8_e4m3fn: frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    torch.float8_e5m2: frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    torch.bfloat16: frozenset((torch.float32, torch.float64)),
    torch.float16: frozenset((torch.float32, torch.float64)),
    torch.float32: frozenset((torch.float64,)),
}
