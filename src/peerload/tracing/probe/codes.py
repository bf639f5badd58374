"""Values that say where they come from: what a probe feeds to an engine's loader, one code for each dtype.

Every *unit* of a checkpoint has a number (`Numbering`). In a digit pass k the unit's value is digit k of its number, written
in the code's alphabet (254 whole numbers for the wide floats, 126 bit patterns for E4M3, ...). Two more passes are random:
hashes of the number as positive bit patterns, then the same in reverse order, so that neither arithmetic nor a maximum can
pass for a copy. A value depends on (unit, pass) alone: nothing has to be kept to check what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...model.boxes import BoolArray, IntArray
from ...model.catalog import ITEMSIZE, Catalog
from ..dtypes import DTYPES

#: Bit patterns of elements, or of units of fewer bits, as unsigned numbers.
Patterns: TypeAlias = npt.NDArray[np.uint64]

_SIGNED: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Lowest and highest random bit pattern by dtype: positive, finite, and an even number of them, so that none is its own reverse.
_RANDOM: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "BF16": (0x3000, 0x4FFF),
        "F16": (0x0400, 0x7BFF),
        "F32": (0x30000000, 0x4FFFFFFF),
        "F64": (0x3E00 << 48, (0x4200 << 48) - 1),
        "F8_E4M3": (1, 126),
        "F8_E5M2": (1, 122),
        "F8_E8M0": (64, 191),
        "U8": (1, 254),
        "I8": (1, 126),
        "U16": (1, 32766),
        "I16": (1, 32766),
        "U32": (1, 32766),
        "I32": (1, 32766),
        "U64": (1, 32766),
        "I64": (1, 32766),
    }
)
_WIDE: Final = ("BF16", "F16", "F32", "F64")
RANDOM_PASSES: Final = 2


@dataclass(frozen=True, eq=False)
class Numbering:
    """Numbers for all units of a checkpoint: tensors in the catalog's order, each row-major, elements low bits first.

    bits: integers that don't index anything (packed weights) count in units of so many bits. None: a unit is an element.
    fixed: rows of the catalog whose values are given; their units have numbers, but no code.
    """

    catalog: Catalog
    bits: int | None = None
    fixed: frozenset[int] = frozenset()

    @cached_property
    def split(self) -> IntArray:
        """[tensors]: units in an element."""
        rows = zip(self.catalog.dtypes, self.catalog.itemsize.tolist(), strict=True)
        return np.array([size * 8 // self.bits if self.bits and is_integer(dtype) else 1 for dtype, size in rows], np.int64)

    @cached_property
    def start(self) -> IntArray:
        """[tensors + 1]: each tensor's first unit, and one past the last."""
        sizes = np.array([math.prod(shape) for shape in self.catalog.shapes], np.int64) * self.split
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def tensor_of(self, units: IntArray) -> IntArray:
        """Catalog rows of units that exist."""
        return np.searchsorted(self.start, units, "right") - 1

    def name(self, unit: int) -> str:
        """For people: `model.norm.weight[3]`, or `w.qweight[0, 5] bits 4:8`."""
        row = int(self.tensor_of(np.array([unit]))[0])
        spec, split = self.catalog[row], int(self.split[row])
        element, part = divmod(unit - int(self.start[row]), split)
        index = ", ".join(map(str, map(int, np.unravel_index(element, spec.shape)))) if spec.shape else ""
        bits = f" bits {part * (self.bits or 0)}:{(part + 1) * (self.bits or 0)}" if split > 1 else ""
        return f"{spec.name}[{index}]{bits}"


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """How units of one dtype are written. digits: [base] patterns, distinct. low, high: range of random patterns.

    dtype is None for units of a few bits."""

    dtype: torch.dtype | None
    digits: Patterns
    low: int
    high: int

    def patterns(self, units: IntArray, number: int, digit_passes: int) -> Patterns:
        """The units' bit patterns in pass `number` of digit_passes + RANDOM_PASSES."""
        if number < digit_passes:
            base, place = len(self.digits), len(self.digits) ** number
            if place > np.iinfo(np.int64).max:
                return np.full(len(units), self.digits[0])
            digits: Patterns = self.digits[units // place % base]
            return digits
        value = _hash(units) % np.uint64(self.high - self.low + 1) + np.uint64(self.low)
        return value if number == digit_passes else np.uint64(self.low + self.high) - value


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One way to read what an engine holds: units of `code`, copied as they are or cast to `dtype`."""

    code: Code
    cast_to: torch.dtype | None = None

    def _seen(self, patterns: Patterns) -> Patterns:
        if self.cast_to is None:
            return patterns
        assert self.code.dtype is not None  # units of a few bits are never cast
        return patterns_of(tensor_of(patterns, self.code.dtype).to(self.cast_to))

    def decode(self, passes: list[Patterns], units: int) -> IntArray:
        """The number that digits spell, for each place; -1 where they spell none below `units`. passes: the digit passes."""
        alphabet = self._seen(self.code.digits)
        order = np.argsort(alphabet)
        alphabet, base = alphabet[order], len(alphabet)
        if (alphabet[1:] == alphabet[:-1]).any():
            return np.full(len(passes[0]), -1, np.int64)  # a cast that blurs digits can't be followed
        number, place = np.zeros(len(passes[0]), np.int64), 1
        good = np.ones(len(passes[0]), np.bool_)
        for seen in passes:
            at = np.minimum(np.searchsorted(alphabet, seen), base - 1)
            good &= alphabet[at] == seen
            if place <= units:
                number += order[at] * place
            place *= base
        return np.where(good & (number < units), number, -1)

    def confirms(self, units: IntArray, seen: Patterns, number: int, digit_passes: int) -> BoolArray:
        """Is `seen` what these units look like in that pass?"""
        agree: BoolArray = self._seen(self.code.patterns(units, number, digit_passes)) == seen
        return agree


def is_integer(dtype: str) -> bool:
    return dtype[0] in "IU"


def code_of(dtype: str) -> Code:
    """The code of elements of a safetensors dtype. Raises KeyError for BOOL, which has room for no code."""
    low, high = _RANDOM[dtype]
    if dtype in _WIDE or (is_integer(dtype) and high > 254):  # whole numbers that survive a cast to any of _WIDE
        digits = patterns_of(torch.arange(1, 255).to(DTYPES[dtype]))
    else:
        digits = np.arange(1 if dtype == "F8_E8M0" else low, 255 if dtype == "F8_E8M0" else high + 1, dtype=np.uint64)
    return Code(DTYPES[dtype], digits, low, high)


def code_of_bits(bits: int) -> Code:
    """The code of units of 2, 4 or 8 bits."""
    return Code(None, np.arange(1 << bits, dtype=np.uint64), 0, (1 << bits) - 1)


def readings(dtype: torch.dtype, codes: Mapping[str, Code]) -> dict[str, list[Reading]]:
    """How elements of `dtype` may be read as elements of the checkpoint's dtypes, the likeliest first."""
    found: dict[str, list[Reading]] = {}
    for name, code in codes.items():
        if code.dtype is None:
            continue
        ways = [Reading(code)] if code.dtype.itemsize == dtype.itemsize else []
        lossless = code.dtype.is_floating_point <= dtype.is_floating_point  # a float as an integer depends on the hardware
        if code.dtype != dtype and lossless and dtype != torch.bool:
            ways.insert(0, Reading(code, dtype))
        found[name] = ways
    return dict(sorted(found.items(), key=lambda item: codes[item[0]].dtype != dtype))


def digit_passes(units: int, codes: Mapping[str, Code]) -> int:
    """How many digits every number below `units` has in all codes."""
    most = 1
    for code in codes.values():
        digits, reach = 1, len(code.digits)
        while reach < units:
            digits, reach = digits + 1, reach * len(code.digits)
        most = max(most, digits)
    return most


def patterns_of(tensor: Tensor) -> Patterns:
    """Bit patterns of all elements in logical order."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    size = flat.element_size()
    unsigned = flat.view(_SIGNED[size]).numpy().view(f"u{size}")
    return unsigned.astype(np.uint64)


def tensor_of(patterns: Patterns, dtype: torch.dtype) -> Tensor:
    """A vector of elements with these bit patterns."""
    size = dtype.itemsize
    return torch.from_numpy(patterns.astype(f"u{size}").view(f"i{size}")).view(dtype)


def fill_patterns(tensor: Tensor, pattern: int) -> None:
    """Every element of a tensor, whatever its strides, becomes `pattern`."""
    bits = 8 * tensor.element_size()
    tensor.view(_SIGNED[tensor.element_size()]).fill_(pattern - (1 << bits) if pattern >> (bits - 1) else pattern)


def sentinels(dtype: torch.dtype) -> tuple[int, int]:
    """Two patterns that no code writes, for even and odd passes: what still holds them was never written."""
    top = (1 << 8 * dtype.itemsize) - 1
    if dtype.is_floating_point and dtype != torch.float8_e8m0fnu:
        first, second = patterns_of(torch.tensor([-1.0, -2.0]).to(dtype)).tolist()
        return first, second
    return (1, 0) if dtype == torch.bool else (top, 0)


def split_patterns(patterns: Patterns, itemsize: int, bits: int) -> Patterns:
    """Elements taken apart into units of `bits`, the low ones first."""
    shifts = np.arange(0, 8 * itemsize, bits, dtype=np.uint64)
    units: Patterns = (patterns[:, None] >> shifts & np.uint64((1 << bits) - 1)).ravel()
    return units


def join_patterns(units: Patterns, itemsize: int, bits: int) -> Patterns:
    """The reverse of `split_patterns`."""
    shifts = np.arange(0, 8 * itemsize, bits, dtype=np.uint64)
    patterns: Patterns = np.bitwise_or.reduce(units.reshape(-1, len(shifts)) << shifts, axis=1)
    return patterns


def coded(numbering: Numbering, row: int, code: Code, number: int, digits: int) -> Tensor:
    """The checkpoint tensor `row` in pass `number`."""
    spec, split = numbering.catalog[row], int(numbering.split[row])
    units = np.arange(numbering.start[row], numbering.start[row + 1], dtype=np.int64)
    patterns = code.patterns(units, number, digits)
    if split > 1 or code.dtype is None:
        patterns = join_patterns(patterns, ITEMSIZE[spec.dtype], 8 * ITEMSIZE[spec.dtype] // split)
    return tensor_of(patterns, DTYPES[spec.dtype]).reshape(spec.shape)


def _hash(units: IntArray) -> Patterns:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), on numbers from 1."""
    z = (units.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
