"""A plan in the terms of one transport: batches of strided copies, or staged pulls where runs are too short.

Boxes stay N-D as long as the transport takes strided copies. For one that only knows contiguous runs, each copy is either
read run by run or, when that costs more than the bytes it saves, its whole source span is pulled once into a bounded
staging buffer and cut to size here. The overhead is reported (`Lowered.wire_nbytes` against `Lowered.nbytes`).

Pure: standard library and NumPy only. Columns throughout; a hundred thousand copies are arrays, never objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..model.boxes import IntArray, byte_extents
from .batch import LEVELS, Batch
from .plan import Plan


class Costs(Protocol):
    """What lowering needs to know of a transport; `transport.base.Limits` has the meanings."""

    @property
    def strided(self) -> bool: ...
    @property
    def operation_nbytes(self) -> int: ...
    @property
    def max_operations(self) -> int: ...
    @property
    def max_batch_nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One read from one source, and what to do with it here.

    wire: what the transport moves. scatter: None when `wire` writes its destinations itself; otherwise `wire.dst` and
    `scatter.src` count from the start of a staging buffer of `staging_nbytes`, and `scatter` moves the wanted part on.
    operations: what the transport issues for it. copies: rows of the plan that are complete once all steps that name them
    are done.
    """

    offer: int
    wire: Batch
    scatter: Batch | None
    staging_nbytes: int
    operations: int
    copies: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """Steps in order of source and source address, so that memory is walked once."""

    steps: tuple[Step, ...]
    nbytes: int
    wire_nbytes: int
    operations: int
    staging_nbytes: int


def lower(plan: Plan, limits: Costs, address: IntArray, staging_nbytes: int, only: int | None = None) -> Lowered:
    """Batches for `plan` when the wanting layout's buffers begin at `address[buffer]` here.

    staging_nbytes bounds temporary memory of one step, bytes. only: the one offer to read (default: all)."""
    copies, offer, owner, buffers = _strided(plan, address, only)
    low, high = byte_extents(copies.src, copies.count, copies.src_step, copies.run)
    direct = np.ones(len(copies), np.bool_)
    if not limits.strided:
        runs = copies.count.prod(axis=1)
        cost = copies.run * runs + limits.operation_nbytes * runs
        rows_that_fit = np.maximum(1, (high - low) // max(1, min(staging_nbytes, limits.max_batch_nbytes)))
        staged = (high - low) + limits.operation_nbytes * rows_that_fit
        direct = (cost <= staged) | (staging_nbytes == 0)
    steps: list[Step] = []
    for which in np.unique(offer).tolist():
        mine = np.flatnonzero(offer == which)
        mine = mine[np.argsort(copies.src[mine], kind="stable")]
        steps += _direct_steps(which, copies, owner, buffers, mine[direct[mine]], limits)
        steps += _staged_steps(which, copies, owner, mine[~direct[mine]], limits, staging_nbytes)
    wire = sum(s.wire.nbytes for s in steps)
    useful = int((copies.run * copies.count.prod(axis=1)).sum())
    operations = sum(s.operations for s in steps)
    return Lowered(tuple(steps), useful, wire, operations, max((s.staging_nbytes for s in steps), default=0))


def _strided(plan: Plan, address: IntArray, only: int | None) -> tuple[Batch, IntArray, IntArray, IntArray]:
    """All copies (of offer `only`) as one batch of normal form; of each row the offer, the plan's row, and a
    number that is equal where source buffer (of the same offer) and destination buffer are."""
    layout, width = plan.wants.layout, plan.start.shape[1]
    mine = np.arange(len(plan)) if only is None else np.flatnonzero(plan.offer == only)
    offer_of, piece, start, stop = plan.offer[mine], plan.piece[mine], plan.start[mine], plan.stop[mine]
    want_piece = plan.wants.piece[plan.want[mine]]
    pieces = layout.pieces
    src, src_stride = np.zeros(len(mine), np.int64), np.zeros((len(mine), width), np.int64)
    here, buffers = len(layout.buffer_names), pieces.buffer[want_piece]
    for i in np.unique(offer_of).tolist():
        offer = plan.offers[i]
        rows = np.flatnonzero(offer_of == i)
        theirs, at = offer.layout.pieces, piece[rows]
        common = min(width, theirs.start.shape[1])
        stride = np.zeros((len(rows), width), np.int64)
        stride[:, width - common :] = theirs.stride[at, -common:]
        begin = np.zeros((len(rows), width), np.int64)
        begin[:, width - common :] = theirs.start[at, -common:]
        src[rows] = offer.binding.address[theirs.buffer[at]] + theirs.offset[at] + ((start[rows] - begin) * stride).sum(axis=1)
        src_stride[rows] = stride
        buffers[rows] += here * theirs.buffer[at]
    dst_stride = pieces.stride[want_piece]
    dst = address[pieces.buffer[want_piece]] + pieces.offset[want_piece]
    dst = dst + ((start - pieces.start[want_piece]) * dst_stride).sum(axis=1)
    batch, owner = _normal_form(
        src, dst, stop - start, src_stride, dst_stride, layout.catalog.itemsize[pieces.tensor[want_piece]]
    )
    return batch, offer_of[owner], mine[owner], buffers[owner]


def _normal_form(
    src: IntArray, dst: IntArray, shape: IntArray, src_stride: IntArray, dst_stride: IntArray, itemsize: IntArray
) -> tuple[Batch, IntArray]:
    """Strided copies with the fewest dimensions: ordered by destination stride, contiguous dimensions merged into the run,
    the rest into at most LEVELS counts (copies that need more are repeated). Also each result's original row."""
    n, width = shape.shape
    order = np.argsort(np.where(shape > 1, -np.abs(dst_stride), np.iinfo(np.int64).min), axis=1, kind="stable")
    shape, src_stride, dst_stride = (np.take_along_axis(a, order, axis=1) for a in (shape, src_stride, dst_stride))
    run, depth = itemsize.astype(np.int64), np.zeros(n, np.int64)
    slots = max(width, LEVELS)  # level 0 is the innermost while building
    count, s_step, d_step = np.ones((n, slots), np.int64), np.zeros((n, slots), np.int64), np.zeros((n, slots), np.int64)
    every = np.arange(n)
    for axis in range(width - 1, -1, -1):
        size, s, d = shape[:, axis], src_stride[:, axis], dst_stride[:, axis]
        real = size > 1
        grow = real & (depth == 0) & (s == run) & (d == run)
        top = np.maximum(depth - 1, 0)
        fits = (s == s_step[every, top] * count[every, top]) & (d == d_step[every, top] * count[every, top])
        merge = real & (depth > 0) & fits
        push = np.flatnonzero(real & ~grow & ~merge)
        run = np.where(grow, run * size, run)
        rows = np.flatnonzero(merge)
        count[rows, top[rows]] *= size[rows]
        count[push, depth[push]], s_step[push, depth[push]], d_step[push, depth[push]] = size[push], s[push], d[push]
        depth[push] += 1
    owner = every
    for level in range(slots - 1, LEVELS - 1, -1):
        times = count[:, level]
        if (times == 1).all():
            continue
        again = np.repeat(np.arange(len(owner)), times)
        index = np.arange(len(again)) - np.repeat(np.cumsum(times) - times, times)
        src, dst = src[again] + index * s_step[again, level], dst[again] + index * d_step[again, level]
        run, owner, count, s_step, d_step = run[again], owner[again], count[again], s_step[again], d_step[again]
    outermost_first = slice(LEVELS - 1, None, -1)
    return Batch(src, dst, run, *(np.ascontiguousarray(a[:, outermost_first]) for a in (count, s_step, d_step))), owner


def _direct_steps(offer: int, copies: Batch, owner: IntArray, buffers: IntArray, rows: IntArray, limits: Costs) -> Iterator[Step]:
    """Rows of one offer by ascending source address: neighbours joined, large copies cut, grouped into batches."""
    if len(rows) == 0:
        return
    batch, first = _joined(copies.take(rows), buffers[rows])
    whole, plain = batch.src, (batch.count == 1).all(axis=1)
    # A group is what begins within half a batch, and no copy is larger than the other half.
    half_nbytes, half_operations = max(1, limits.max_batch_nbytes // 2), max(1, limits.max_operations // 2)
    limit = np.full(len(batch), half_nbytes)
    if limits.max_operations and not limits.strided:
        limit = np.minimum(limit, batch.run * half_operations)
    batch, parent = batch.cut(limit)
    runs = batch.count.prod(axis=1)
    group = _cumulated(batch.run * runs) // half_nbytes
    if limits.max_operations:
        operations = np.ones_like(runs) if limits.strided else runs
        group += _cumulated(operations) // half_operations  # both grow: the sum changes where either does
    # The copies that each part of a joined row is of, from low to high: a lost source must not take back the others.
    begin = _cumulated(copies.run[rows])
    at = begin[first[parent]] + np.where(plain[parent], batch.src - whole[parent], 0)
    low = np.searchsorted(begin, at, "right") - 1
    high = np.maximum(low, np.searchsorted(begin, at + batch.run, "left") - 1)
    edges = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        covered = owner[rows[low[a] : high[b - 1] + 1]]
        part = batch.take(slice(a, b))
        yield Step(offer, part, None, 0, len(part) if limits.strided else part.operations, np.unique(covered))


def _cumulated(size: IntArray) -> IntArray:
    """Sum of all rows before each row."""
    return np.cumsum(size) - size


def _joined(batch: Batch, buffers: IntArray) -> tuple[Batch, IntArray]:
    """Plain runs that continue each other on both sides, inside the same two buffers, become one (buffers that happen to
    touch may be registered apart); and the first original row of each result."""
    plain = (batch.count == 1).all(axis=1)
    follows = np.zeros(len(batch), np.bool_)
    follows[1:] = (
        plain[1:]
        & plain[:-1]
        & (buffers[1:] == buffers[:-1])
        & (batch.src[1:] == batch.src[:-1] + batch.run[:-1])
        & (batch.dst[1:] == batch.dst[:-1] + batch.run[:-1])
    )
    first = np.flatnonzero(~follows)
    out = batch.take(first)
    return Batch(out.src, out.dst, np.add.reduceat(batch.run, first), out.count, out.src_step, out.dst_step), first


def _staged_steps(
    offer: int, copies: Batch, owner: IntArray, rows: IntArray, limits: Costs, staging_nbytes: int
) -> Iterator[Step]:
    """Each copy cut so that its span fits the staging buffer, then as many spans as fit are pulled together."""
    if len(rows) == 0:
        return
    room = min(staging_nbytes, limits.max_batch_nbytes)
    batch = copies.take(rows)
    batch, parent = batch.cut_spans(room)
    low, high = byte_extents(batch.src, batch.count, batch.src_step, batch.run)
    span = high - low
    at = 0
    begin = 0
    place = np.zeros(len(batch), np.int64)
    for i, size in enumerate([*span.tolist(), room + 1]):
        full = at + size > room or (limits.max_operations and i - begin >= limits.max_operations)
        if full and i > begin:
            part = slice(begin, i)
            pulled = Batch.of_runs(low[part], place[part], span[part])
            mine = batch.take(part)
            scatter = Batch(mine.src - low[part] + place[part], mine.dst, mine.run, mine.count, mine.src_step, mine.dst_step)
            yield Step(offer, pulled, scatter, at, len(pulled), np.unique(owner[rows[parent[part]]]))
            begin, at = i, 0
        if i < len(batch):
            place[i] = at
            at += size
