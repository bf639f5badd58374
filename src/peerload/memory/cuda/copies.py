"""Batches of strided copies for a kernel: tens of thousands of copies of any shape in one launch.

A kernel, because a copy engine takes one shape at a time: 4 KiB pieces issued one by one move at 0.25 GB/s between GPUs.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ...model.boxes import IntArray
from ...planning.batch import LEVELS, Batch
from .tables import Table, alignment, as_table

#: As `copy_row` in kernels.cu.
ROW: Final = np.dtype(
    [
        ("src", np.uint64),
        ("dst", np.uint64),
        ("src_step", np.int64, 3),
        ("dst_step", np.int64, 3),
        ("run", np.uint32),
        ("count1", np.uint32),
        ("count2", np.uint32),
        ("total", np.uint32),
        ("shift", np.uint32),
        ("unused", np.uint32),
    ]
)
#: Units a warp moves at a time; as in kernels.cu.
TILE: Final = 1024
#: The widest unit, bytes.
WIDEST: Final = 16
#: Copies are cut to at most this, so that units are counted in 32 bits.
LARGEST_NBYTES: Final = 1 << 30
#: Plain runs of at least this are given whole units where their two ends are equally far from one.
PEELED_NBYTES: Final = 256


def rows_of(batch: Batch) -> tuple[Table, IntArray]:
    """The kernel's table for `batch`, and the tiles of each of its rows (at least one)."""
    assert LEVELS == 3, "kernels.cu counts three levels"
    size = batch.run * batch.count.prod(axis=1)
    if len(batch) and int(size.min()) == 0:
        batch = batch.take(np.flatnonzero(size))
    if len(batch) and int(size.max()) > LARGEST_NBYTES:
        batch, _ = batch.cut(LARGEST_NBYTES)
    batch = _peeled(batch)
    many = batch.count > 1
    columns = {"src": batch.src, "dst": batch.dst, "count1": batch.count[:, 1], "count2": batch.count[:, 2]}
    divided = [batch.src, batch.dst, batch.run]
    if many.any():
        columns["src_step"], columns["dst_step"] = (np.where(many, step, 0) for step in (batch.src_step, batch.dst_step))
        divided += [columns[name][:, level] for name in ("src_step", "dst_step") for level in range(LEVELS)]
    shift = alignment(*divided)
    columns["run"] = batch.run >> shift
    columns["total"] = total = columns["run"] * batch.count.prod(axis=1)
    return as_table(ROW, len(batch), shift=shift, **columns), -(-total // TILE)


def _peeled(batch: Batch) -> Batch:
    """Plain runs that begin or end inside a unit, in up to three parts, so that the middle one is whole units."""
    ends = (batch.src | batch.run) % WIDEST != 0
    odd = np.flatnonzero(ends & (batch.run >= PEELED_NBYTES) & ((batch.src - batch.dst) % WIDEST == 0))
    odd = odd[(batch.count[odd] == 1).all(axis=1)]
    if len(odd) == 0:
        return batch
    src, dst, run = batch.src[odd], batch.dst[odd], batch.run[odd]
    head = -src % WIDEST
    body = (run - head) // WIDEST * WIDEST
    parts = [(np.zeros_like(head), head), (head, body), (head + body, run - head - body)]
    peeled = [Batch.of_runs((src + at)[size > 0], (dst + at)[size > 0], size[size > 0]) for at, size in parts]
    return Batch.joined(batch.take(np.setdiff1d(np.arange(len(batch)), odd)), *peeled)
