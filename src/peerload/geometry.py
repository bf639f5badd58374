"""Boxes: half-open N-D index ranges of a tensor, one at a time (`Box`) or as columns (`intersect_rows`, ...).

Pure: standard library and NumPy only. Columns are int64 arrays `start[n, D]` and `stop[n, D]`; tensors of fewer than D
dimensions are padded on the left with `[0, 1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A non-empty half-open range per dimension. A scalar is the box with no dimensions."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start has {len(self.start)} dimensions, stop has {len(self.stop)}")
        if any(a < 0 or a >= b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"empty or negative range in {self}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return None if any(a >= b for a, b in zip(start, stop, strict=True)) else Box(start, stop)

    def contains(self, other: Box) -> bool:
        return all(a <= c for a, c in zip(self.start, other.start, strict=True)) and all(
            d <= b for b, d in zip(self.stop, other.stop, strict=True)
        )

    def subtract(self, other: Box) -> list[Box]:
        """What is left of this box without `other`: at most 2 boxes per dimension, disjoint."""
        common = self.intersect(other)
        if common is None:
            return [self]
        left: list[Box] = []
        start, stop = list(self.start), list(self.stop)
        for axis in range(len(start)):
            if start[axis] < common.start[axis]:
                left.append(Box(tuple(start), (*stop[:axis], common.start[axis], *stop[axis + 1 :])))
            if common.stop[axis] < stop[axis]:
                left.append(Box((*start[:axis], common.stop[axis], *start[axis + 1 :]), tuple(stop)))
            start[axis], stop[axis] = common.start[axis], common.stop[axis]
        return left

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def pad_left(columns: IntArray, ndim: int, fill: int) -> IntArray:
    """`columns[n, d]` widened to `[n, ndim]` by columns of `fill` on the left (ndim >= d)."""
    n, have = columns.shape
    if have == ndim:
        return columns
    return np.concatenate([np.full((n, ndim - have), fill, np.int64), columns], axis=1)


def volumes(start: IntArray, stop: IntArray) -> IntArray:
    """Number of elements of each row's box, shape [n]."""
    return np.prod(stop - start, axis=1, dtype=np.int64)


def byte_extents(offset: IntArray, shape: IntArray, stride: IntArray, itemsize: IntArray) -> tuple[IntArray, IntArray]:
    """Lowest byte touched and one past the highest, per row: offset[n], shape[n, D], stride[n, D] (bytes, any sign)."""
    reach = (shape - 1) * stride
    low = offset + np.minimum(reach, 0).sum(axis=1)
    high = offset + np.maximum(reach, 0).sum(axis=1) + itemsize
    return low, high


def injective(shape: IntArray, stride: IntArray, itemsize: IntArray) -> BoolArray:
    """Per row: do distinct indices certainly lie at disjoint bytes? True when, from the smallest stride up, each
    stride steps over all that the smaller ones span (the condition every dense or sliced view meets)."""
    step = np.where(shape > 1, np.abs(stride), np.iinfo(np.int64).max)
    order = np.argsort(step, axis=1, kind="stable")
    step = np.take_along_axis(step, order, axis=1)
    size = np.take_along_axis(shape, order, axis=1)
    span = itemsize.copy()
    good = np.ones(len(shape), np.bool_)
    for axis in range(shape.shape[1]):
        used = size[:, axis] > 1
        good &= ~used | (step[:, axis] >= span)
        span = np.where(used, step[:, axis] * (size[:, axis] - 1) + span, span)
    return good
