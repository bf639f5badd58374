"""Boxes: half-open N-D index ranges of a tensor, one at a time (`Box`) or as columns (`intersect_rows`, ...).

Pure: standard library and NumPy only. Columns are int64 arrays `start[n, D]` and `stop[n, D]`; tensors of fewer than D
dimensions are padded on the left with `[0, 1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError

#: Runs of bytes that are compared one by one, where nothing better is known: half a second and 200 MB.
MAX_RUNS = 1 << 22

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
    product = np.ones(len(start), np.int64)
    for axis in range(start.shape[1]):  # ten times as fast as NumPy's product over short rows
        product *= stop[:, axis] - start[:, axis]
    return product


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


def disjoint_bytes(offset: IntArray, shape: IntArray, stride: IntArray, itemsize: IntArray) -> tuple[int, int] | None:
    """Two rows that share a byte of one buffer, or None when it is proven that no two do.

    offset[n], shape[n, D], stride[n, D], itemsize[n] in bytes; each row must be `injective` itself. Rows whose extents
    are apart cost a sort; interleaved ones (row-parallel halves side by side) are compared as boxes of the lattice that
    their strides span, and run by run where no such lattice exists. Raises ManifestError where those are more than MAX_RUNS.
    """
    low, high = byte_extents(offset, shape, stride, itemsize)
    order = np.argsort(low, kind="stable")
    top = np.maximum.accumulate(high[order])
    tangled = np.flatnonzero(low[order][1:] < top[:-1]) + 1
    if len(tangled) == 0:
        return None
    # Clusters of rows whose extents overlap: a new one begins wherever a row starts past everything before it.
    begins = np.concatenate([[True], low[order][1:] >= top[:-1]])
    cluster = np.cumsum(begins) - 1
    for which in np.unique(cluster[tangled]):
        rows = order[cluster == which]
        clash = _clash(offset[rows] - low[rows].min(), shape[rows], stride[rows], itemsize[rows])
        if clash is not None:
            return int(rows[clash[0]]), int(rows[clash[1]])
    return None


def _clash(offset: IntArray, shape: IntArray, stride: IntArray, itemsize: IntArray) -> tuple[int, int] | None:
    shape = np.concatenate([shape, itemsize[:, None]], axis=1)  # the bytes of an element are one more dimension
    stride = np.concatenate([np.where(shape[:, :-1] > 1, stride, 0), np.ones((len(shape), 1), np.int64)], axis=1)
    offset = offset + (np.minimum(stride, 0) * (shape - 1)).sum(axis=1)
    stride = np.abs(stride)
    steps = np.unique(stride[stride > 0])[::-1]
    if (steps[:-1] % steps[1:] == 0).all():
        start = np.stack([offset // s if i == 0 else offset % steps[i - 1] // s for i, s in enumerate(steps)], axis=1)
        size = np.ones_like(start)
        for i, s in enumerate(steps):
            size[:, i] = np.where(stride == s, shape, 1).prod(axis=1)
        whole = np.concatenate([[np.iinfo(np.int64).max], steps[:-1] // steps[1:]])
        if (start + size <= whole).all():
            return first_overlap(np.zeros(len(start), np.int64), start, start + size)
    return _clash_of_runs(offset, shape, stride)


def _clash_of_runs(offset: IntArray, shape: IntArray, stride: IntArray) -> tuple[int, int] | None:
    """`_clash`, for rows of single bytes with strides of any kind: every contiguous run of each row is looked at."""
    dims: list[list[tuple[int, int]]] = []  # of each row, from the smallest stride up, what remains when runs are cut off
    runs: list[int] = []
    for steps, extents in zip(stride.tolist(), shape.tolist(), strict=True):
        run, left = 1, sorted((step, n) for step, n in zip(steps, extents, strict=True) if n > 1)
        while left and left[0][0] == run:
            run *= left.pop(0)[1]
        dims.append(left)
        runs.append(run)
    total = sum(math.prod(n for _, n in left) for left in dims)
    if total > MAX_RUNS:
        raise ManifestError(
            "layout.pieces",
            f"{len(dims)} of them are interleaved in one buffer with strides that aren't multiples of each other, in {total} "
            f"runs of bytes; at most {MAX_RUNS} can be compared",
        )
    at = []
    for row, left in enumerate(dims):
        begin = offset[row : row + 1]
        for step, n in left:
            begin = (begin[:, None] + np.arange(n) * step).ravel()
        at.append(begin)
    owner = np.repeat(np.arange(len(at)), [len(begin) for begin in at])
    begin = np.concatenate(at)
    order = np.argsort(begin, kind="stable")
    begin, owner = begin[order], owner[order]
    end = begin + np.array(runs)[owner]
    reach = np.maximum.accumulate(end)
    hit = np.flatnonzero(begin[1:] < reach[:-1])
    if len(hit) == 0:
        return None
    first = int(hit[0])  # nothing overlapped before: the run just before it reaches furthest
    return int(owner[first]), int(owner[first + 1])


def first_overlap(group: IntArray, start: IntArray, stop: IntArray) -> tuple[int, int] | None:
    """Two rows of the same group whose boxes intersect, or None. group[n], start[n, D], stop[n, D].

    Rows are compared with those that follow them along the axis on which the group is cut most finely; tilings along
    one axis cost a sort."""
    if len(group) < 2:
        return None
    axis = max(range(start.shape[1]), key=lambda a: len(np.unique(start[:, a])))
    order = np.lexsort((start[:, axis], group))
    g, a, b = group[order], start[order], stop[order]
    for ahead in range(1, len(order)):
        # Sorted by start: a row that its follower starts past is past all later ones too.
        near = (g[ahead:] == g[:-ahead]) & (a[ahead:, axis] < b[:-ahead, axis])
        if not near.any():
            return None
        hit = near & ((a[ahead:] < b[:-ahead]) & (a[:-ahead] < b[ahead:])).all(axis=1)
        if hit.any():
            i = int(np.argmax(hit))
            return int(order[i]), int(order[i + ahead])
    return None
