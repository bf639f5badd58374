"""Who holds which box of which logical tensor, at which byte: the values that everything else speaks in.

Two halves with different lifetimes. A `Layout` says where boxes of logical tensors lie in a rank's buffers; a thousand
replicas share one. A `Binding` says where one process has put those buffers and how to reach them; it lives as long as
a lease. Together they are an `Offer`.

Thousands are objects, millions are arrays: tensors, buffers and pieces are columns. Arrays are read-only int64; a row's
box is padded on the left to the catalog's `width` dimensions with `[0, 1)` and stride 0.
Pure: standard library and NumPy only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError, printable
from .boxes import IntArray

#: Bytes per element, by safetensors dtype name (https://github.com/huggingface/safetensors, `Dtype`).
ITEMSIZE: Final[Mapping[str, int]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


MAX_DIMENSIONS: Final = 8


def _refuse_unprintable(field: str, name: str) -> None:
    """Names are printed and logged by everybody who hears of them."""
    if printable(name) != name or "\n" in name or "\t" in name:
        raise ManifestError(field, f"{name!r:.100} has a control character")


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """What two instances must agree on before they may exchange weights. Parallelism is no part of it."""

    name: str
    revision: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ManifestError("model.name", "is empty")
        _refuse_unprintable("model.name", self.name)
        _refuse_unprintable("model.revision", self.revision)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """Sizes of the parallel dimensions of an instance: tensor, pipeline and expert."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise ManifestError(f"parallel.{name}", f"is {getattr(self, name)}, must be at least 1")

    def __str__(self) -> str:
        extra = "".join(f",{n}={v}" for n, v in (("pp", self.pp), ("ep", self.ep)) if v > 1)
        return f"tp={self.tp}{extra}"


class TensorSpec(NamedTuple):
    """A logical tensor, named as the checkpoint names it. `dtype` is a safetensors name, a key of `ITEMSIZE`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def frozen(values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[np.int64]:
    """A read-only contiguous array; copies only when it must."""
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.flags.writeable:
        array = array.copy() if array is values else array
        array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Catalog:
    """All logical tensors of a model, whoever holds them. The list both sides of a plan are checked against."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ManifestError("catalog", "names, dtypes and shapes differ in length")
        if len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ManifestError("catalog.names", f"{twice!r} appears more than once")
        unknown = set(self.dtypes) - ITEMSIZE.keys()
        if unknown:
            row = next(i for i, d in enumerate(self.dtypes) if d in unknown)
            raise ManifestError(f"catalog[{self.names[row]}].dtype", f"{self.dtypes[row]!r} is none of {', '.join(ITEMSIZE)}")
        if self.shapes and (min(map(min, filter(None, self.shapes)), default=1) < 1):
            row = next(i for i, s in enumerate(self.shapes) if s and min(s) < 1)
            raise ManifestError(f"catalog[{self.names[row]}].shape", f"{self.shapes[row]} has an extent below 1")
        if self.width > MAX_DIMENSIONS:
            raise ManifestError("catalog.shapes", f"a tensor has {self.width} dimensions, at most {MAX_DIMENSIONS} are allowed")

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Catalog:
        rows = list(specs)
        return cls(tuple(r.name for r in rows), tuple(r.dtype for r in rows), tuple(tuple(r.shape) for r in rows))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> TensorSpec:
        return TensorSpec(self.names[row], self.dtypes[row], self.shapes[row])

    def __iter__(self) -> Iterator[TensorSpec]:
        return map(TensorSpec, self.names, self.dtypes, self.shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Catalog):
            return NotImplemented
        return self is other or (self.names, self.dtypes, self.shapes) == (other.names, other.dtypes, other.shapes)

    __hash__ = object.__hash__

    @cached_property
    def row(self) -> Mapping[str, int]:
        """Row by name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def width(self) -> int:
        """The widest tensor's number of dimensions, at least 1."""
        return max(map(len, self.shapes), default=1) or 1

    @cached_property
    def shape(self) -> IntArray:
        """[n, width], padded on the left with 1."""
        width = self.width
        padded = [(1,) * (width - len(s)) + s for s in self.shapes]
        return frozen(np.array(padded, np.int64).reshape(len(self.shapes), width))

    @cached_property
    def itemsize(self) -> IntArray:
        """[n], bytes."""
        return frozen(np.fromiter((ITEMSIZE[d] for d in self.dtypes), np.int64, len(self.dtypes)))

    @cached_property
    def nbytes(self) -> int:
        return int((self.shape.prod(axis=1) * self.itemsize).sum())


def is_derived(name: str) -> bool:
    """Is it a logical tensor that no checkpoint holds, made of one by an engine's loader (`x.weight as F32`)? Its name has a
    space, as no checkpoint's has."""
    return " " in name
