"""Hypothesis strategies: models, and instances that hold them in ways no engine ever would.

Everything an adapter or a planner may meet: boxes cut irregularly, held by several ranks or partly overlapping, stacked
and interleaved in buffers, with pitches, permuted axes and negative strides. Sizes stay small enough for `oracle.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from peerload.model.boxes import Box
from peerload.model.catalog import ITEMSIZE, Catalog, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces

#: One dtype of every size.
DTYPES = ("U8", "BF16", "F32", "I64")


def shapes(max_dims: int = 4, max_extent: int = 7) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of at most some hundred elements; scalars too."""
    extents = st.lists(st.integers(1, max_extent), max_size=max_dims)
    return extents.map(tuple).filter(lambda shape: math.prod(shape) <= 300)


@st.composite
def catalogs(draw: DrawFn, max_tensors: int = 4, max_dims: int = 4) -> Catalog:
    """Models of one to `max_tensors` tensors of mixed ranks and dtypes."""
    made = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes(max_dims)), min_size=1, max_size=max_tensors))
    return Catalog.of(TensorSpec(f"t{i}.weight", dtype, shape) for i, (dtype, shape) in enumerate(made))


@st.composite
def partitions(draw: DrawFn, box: Box, max_cuts: int = 5) -> list[Box]:
    """Disjoint boxes that together are `box`: each cut halves one of them anywhere, along any axis."""
    boxes = [box]
    for _ in range(draw(st.integers(0, max_cuts))):
        i = draw(st.integers(0, len(boxes) - 1))
        axes = [axis for axis, extent in enumerate(boxes[i].shape) if extent > 1]
        if axes:
            axis = draw(st.sampled_from(axes))
            one = boxes.pop(i)
            at = draw(st.integers(one.start[axis] + 1, one.stop[axis] - 1))
            boxes.append(Box(one.start, (*one.stop[:axis], at, *one.stop[axis + 1 :])))
            boxes.append(Box((*one.start[:axis], at, *one.start[axis + 1 :]), one.stop))
    return boxes


@st.composite
def packings(
    draw: DrawFn, catalog: Catalog, held: Sequence[tuple[int, Box]], rank: int = 0, parallel: Parallel | None = None
) -> Layout:
    """A layout of the boxes (tensor, box): some stacked along any axis in one region, regions dealt to buffers.

    Regions have permuted axes, reversed directions and pitches; bytes between are nobody's. Some regions are constants."""
    left = list(held)
    rows: list[Piece] = []
    constants: list[Constant] = []
    sizes = [0] * draw(st.integers(1, 3))
    while left:
        tensor, box = left.pop(draw(st.integers(0, len(left) - 1)))
        itemsize, ndim = ITEMSIZE[catalog.dtypes[tensor]], len(box.shape)
        axis = draw(st.integers(0, ndim - 1)) if ndim else 0
        stack = [(tensor, box)]
        for other in [o for o in left if ndim and _stackable((tensor, box), o, axis, catalog)]:
            if draw(st.booleans()):
                stack.append(other)
                left.remove(other)
        pad = draw(st.integers(0, 2)) if ndim else 0
        shape = list(box.shape)
        if ndim:
            shape[axis] = sum(b.shape[axis] for _, b in stack) + pad
        strides, span = draw(_strides(tuple(shape), itemsize))
        below = sum(-step * (n - 1) for step, n in zip(strides, shape, strict=True) if step < 0)
        buffer = draw(st.integers(0, len(sizes) - 1))
        first = sizes[buffer] + draw(st.sampled_from([0, 0, 0, 1, 5])) + below
        sizes[buffer] = first + span - below
        at = 0
        for one, part in stack:
            rows.append(Piece(one, part, buffer, first + (at * strides[axis] if ndim else 0), strides))
            at += part.shape[axis] if ndim else 1
        if pad:
            shape[axis] = pad
            constants.append(Constant(buffer, first + at * strides[axis], tuple(shape), strides, bytes(range(itemsize))))
    names = tuple(f"buffer{i}" for i in range(len(sizes)))
    nbytes = np.array([n + draw(st.integers(0, 3)) for n in sizes], np.int64)
    return Layout(
        catalog, names, nbytes, Pieces.of(rows, catalog.width), tuple(constants), parallel=parallel or Parallel(), rank=rank
    )


def _stackable(one: tuple[int, Box], other: tuple[int, Box], axis: int, catalog: Catalog) -> bool:
    """Same dtype, and the same shape but for the axis."""
    a, b = one[1].shape, other[1].shape
    same_dtype = catalog.dtypes[one[0]] == catalog.dtypes[other[0]]
    return same_dtype and len(a) == len(b) and a[:axis] + a[axis + 1 :] == b[:axis] + b[axis + 1 :]


@st.composite
def _strides(draw: DrawFn, shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], int]:
    """Byte strides of a region of this shape, and the bytes it spans."""
    strides, step = [0] * len(shape), itemsize
    for axis in draw(st.permutations(range(len(shape)))):
        step += draw(st.sampled_from([0, 0, 0, 1, itemsize]))
        strides[axis] = step
        step *= shape[axis]
    for axis in range(len(shape)):
        if draw(st.integers(0, 7)) == 0:
            strides[axis] = -strides[axis]
    return tuple(strides), itemsize + sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True))


@st.composite
def instances(draw: DrawFn, catalog: Catalog, max_ranks: int = 3, complete: bool = True) -> tuple[Layout, ...]:
    """The layouts of all ranks of an instance. Together they hold the whole model, some of it several times, unless
    `complete` is false. On one rank no element is held twice."""
    ranks = draw(st.integers(1, max_ranks))
    held: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    for tensor, spec in enumerate(catalog):
        whole = Box.whole(spec.shape)
        for box in draw(partitions(whole)):
            least = 1 if complete else 0
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=least, max_size=ranks)):
                held[rank].append((tensor, box))
        # A copy of another shape that overlaps what others hold, as two ranks share a row of block scales.
        if draw(st.integers(0, 3)) == 0:
            rank, extra = draw(st.integers(0, ranks - 1)), draw(st.sampled_from(draw(partitions(whole))))
            mine = [box for t, box in held[rank] if t == tensor]
            if all(extra.intersect(box) is None for box in mine):
                held[rank].append((tensor, extra))
    parallel = Parallel(ranks)
    return tuple(draw(packings(catalog, boxes, rank, parallel)) for rank, boxes in enumerate(held))
