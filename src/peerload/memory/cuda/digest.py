"""Boxes for the digest kernel: how each is laid out in memory and in its tensor, with as few dimensions as can be."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ...model.boxes import IntArray
from .tables import Table, alignment, as_table

#: As `digest_row` in kernels.cu.
ROW: Final = np.dtype(
    [
        ("address", np.uint64),
        ("byte", np.uint64),
        ("key", np.uint64),
        ("run", np.uint64),
        ("memory", np.int64, 4),
        ("global", np.int64, 4),
        ("extent", np.uint32, 4),
        ("slot", np.uint32),
        ("dense", np.uint32),
        ("parts", np.uint32),
        ("element", np.uint32),
        ("unit", np.uint32),
        ("tile_f", np.uint32),
        ("tile_y", np.uint32),
        ("tiles_f", np.uint32),
    ]
)
AXES: Final = 4
#: As in kernels.cu: bytes of a segment, and segments of a tile of dense runs.
SEGMENT_NBYTES: Final = 4096
DENSE_SEGMENTS: Final = 8
#: Runs of at least this in whole units are dense: a segment at a time by one warp.
DENSE_NBYTES: Final = 512
WIDEST: Final = 16
#: Tiles of short runs: units side by side; and of scattered elements: side by side in memory, and along the tensor's rows.
TILE_UNITS: Final = 256
TILE_ELEMENTS: Final = (32, 64)
#: No box may be larger, so that its elements are counted in 32 bits.
LARGEST_NBYTES: Final = 1 << 30


def rows_of(
    slot: IntArray,
    key: npt.NDArray[np.uint64],
    itemsize: IntArray,
    shape: IntArray,
    start: IntArray,
    stop: IntArray,
    address: IntArray,
    stride: IntArray,
) -> tuple[Table, IntArray]:
    """The kernel's table for n boxes of at most LARGEST_NBYTES each, and the tiles of each of its rows (at least one).

    slot: [n] where a box's digest is added; key, itemsize: [n] of its tensor; shape, start, stop, stride: [n, width]; address:
    [n] of its first element. As `peerload.integrity.digest.digest_boxes` has them."""
    size = np.ones_like(shape)  # bytes from one index to the next in the tensor
    size[:, :-1] = np.cumprod(shape[:, :0:-1], axis=1)[:, ::-1]
    size *= itemsize[:, None]
    byte = (start * size).sum(axis=1)
    run, extent, step, memory = _normal_form(itemsize, stop - start, size, stride)
    scattered = (run == itemsize) & (extent[:, 0] > 1)
    extent, step, memory = _placed(scattered, extent, step, memory)
    row, ahead, further, extent, step, memory = _unrolled(extent, step, memory)
    run, key, itemsize, slot, scattered = run[row], key[row], itemsize[row], slot[row], scattered[row]
    byte, address = byte[row] + ahead, address[row] + further
    used = extent > 1
    steps = [np.where(used, column, 0)[:, axis] for column in (step, memory) for axis in range(AXES)]
    unit = 1 << alignment(address, byte, run, *steps)
    dense = ~scattered & (unit == WIDEST) & (run >= DENSE_NBYTES)
    short = ~scattered & ~dense
    extent[:, 0] = np.where(short, run // unit, extent[:, 0])
    for column in (step, memory):
        column[:, 0] = np.where(short, unit, column[:, 0])
    whole = (np.where(used, step, 0) % SEGMENT_NBYTES == 0).all(axis=1)
    segments = np.where(whole, byte % SEGMENT_NBYTES + run + SEGMENT_NBYTES - 1, run + 2 * SEGMENT_NBYTES - 2) // SEGMENT_NBYTES
    parts = np.where(dense, -(-segments // DENSE_SEGMENTS), 1)
    tile_f, tile_y = np.where(scattered, TILE_ELEMENTS[0], TILE_UNITS), np.where(scattered, TILE_ELEMENTS[1], 1)
    tiles_f, tiles_y = -(-extent[:, :3].prod(axis=1) // tile_f), -(-extent[:, 3] // tile_y)
    table = as_table(
        ROW,
        len(run),
        address=address,
        byte=byte,
        key=key,
        run=run,
        memory=memory,
        extent=extent,
        slot=slot,
        dense=dense,
        parts=parts,
        element=np.where(scattered, itemsize, unit),
        unit=unit,
        tile_f=tile_f,
        tile_y=tile_y,
        tiles_f=tiles_f,
        **{"global": step},
    )
    return table, np.where(dense, parts * extent[:, 1:].prod(axis=1), tiles_f * tiles_y)


Axes = tuple[IntArray, IntArray, IntArray]


def _normal_form(itemsize: IntArray, shape: IntArray, size: IntArray, stride: IntArray) -> tuple[IntArray, *Axes]:
    """Bytes of each box's runs that are contiguous in the tensor and in memory, and what is around them as axes [n, AXES or
    more], innermost first: extent, step in the tensor, step in memory. Extent 1 (and steps 0) where unused."""
    n, width = shape.shape
    run, depth, every = itemsize.copy(), np.zeros(n, np.int64), np.arange(n)
    extent, step, memory = np.ones((n, width + AXES), np.int64), *np.zeros((2, n, width + AXES), np.int64)
    for axis in range(width - 1, -1, -1):
        count, s, m = shape[:, axis], size[:, axis], stride[:, axis]
        real = count > 1
        grow = real & (depth == 0) & (s == run) & (m == run)
        top = np.maximum(depth - 1, 0)
        fits = (s == step[every, top] * extent[every, top]) & (m == memory[every, top] * extent[every, top])
        merge = real & (depth > 0) & fits
        run = np.where(grow, run * count, run)
        rows = np.flatnonzero(merge)
        extent[rows, top[rows]] *= count[rows]
        push = np.flatnonzero(real & ~grow & ~merge)
        extent[push, depth[push]], step[push, depth[push]], memory[push, depth[push]] = count[push], s[push], m[push]
        depth[push] += 1
    slots = max(AXES, int(depth.max(initial=0)) + 1)
    return run, extent[:, :slots], step[:, :slots], memory[:, :slots]


def _placed(scattered: npt.NDArray[np.bool_], extent: IntArray, step: IntArray, memory: IntArray) -> Axes:
    """Axes where the kernel wants them. Around runs: after the run's own, which is axis 0. Of scattered elements: the
    closest in memory is axis 0, so that a warp's loads meet, and the closest in the tensor axis 3, so that one lane's
    elements share a segment."""
    n, slots = extent.shape
    last = slots - 1
    rows = np.flatnonzero(scattered)
    if len(rows) == 0:
        return np.roll(extent, 1, axis=1), np.roll(step, 1, axis=1), np.roll(memory, 1, axis=1)
    order = np.tile(np.append(last, np.arange(last)), (n, 1))  # around runs: an unused axis, then all others as they are
    near = np.argmin(np.where(extent[rows] > 1, np.abs(memory[rows]), np.iinfo(np.int64).max), axis=1)
    row = np.where(near == 0, 1, 0)  # axes are in order of their steps in the tensor
    rest = np.tile(np.arange(slots), (len(rows), 1))
    rest = rest[(rest != near[:, None]) & (rest != row[:, None])].reshape(len(rows), slots - 2)
    order[rows] = np.column_stack([near, rest[:, :2], row, rest[:, 2:]])
    return tuple(np.take_along_axis(column, order, axis=1) for column in (extent, step, memory))  # type: ignore[return-value]


def _unrolled(extent: IntArray, step: IntArray, memory: IntArray) -> tuple[IntArray, IntArray, IntArray, *Axes]:
    """Boxes with more axes than the kernel knows, once for each index of those: the row each was made of, how far it begins from
    there in the tensor and in memory, and the axes that are left."""
    n, slots = extent.shape
    row, ahead, further = np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for axis in range(slots - 1, AXES - 1, -1):
        times = extent[row, axis]
        if (times == 1).all():
            continue
        again = np.repeat(np.arange(len(row)), times)
        index = np.arange(len(again)) - np.repeat(np.cumsum(times) - times, times)
        row = row[again]
        ahead, further = ahead[again] + index * step[row, axis], further[again] + index * memory[row, axis]
    extent, step, memory = (np.ascontiguousarray(column[row, :AXES]) for column in (extent, step, memory))
    return row, ahead, further, extent, step, memory
