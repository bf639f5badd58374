"""A batch: many strided copies from one source's memory into ours, as columns. What a transport is asked to move.

Pure: standard library and NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..model.boxes import IntArray

#: Outer dimensions a copy can have around its contiguous run.
LEVELS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Copy i moves, for every index (a, b, c) below `count[i]`, the `run[i]` bytes at
    `src[i] + (a, b, c) . src_step[i]` of the source to `dst[i] + (a, b, c) . dst_step[i]` here.

    src, dst: [n] absolute addresses (int64) in the source's and in our address space; run: [n] bytes;
    count, src_step, dst_step: [n, LEVELS], outermost first, count 1 where unused; steps are bytes, any sign.
    Destinations of one batch never overlap. A batch owns no memory.
    """

    src: IntArray
    dst: IntArray
    run: IntArray
    count: IntArray
    src_step: IntArray
    dst_step: IntArray

    def __len__(self) -> int:
        return len(self.src)

    @property
    def sizes(self) -> IntArray:
        """Bytes of each copy: [n]."""
        sizes: IntArray = (
            self.run * self.count[:, 0] * self.count[:, 1] * self.count[:, 2]
        )  # NumPy's product is ten times as slow
        return sizes

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def operations(self) -> int:
        """Number of contiguous runs."""
        return int(self.count.prod(axis=1).sum())

    @classmethod
    def of_runs(cls, src: IntArray, dst: IntArray, run: IntArray) -> Batch:
        """Plain contiguous copies; all three [n] int64."""
        n = len(src)
        zero = np.zeros((n, LEVELS), np.int64)
        return cls(src, dst, run, np.ones((n, LEVELS), np.int64), zero, zero)

    @classmethod
    def joined(cls, *parts: Batch) -> Batch:
        """The copies of all parts, in order."""
        columns = ("src", "dst", "run", "count", "src_step", "dst_step")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))

    def take(self, rows: slice | IntArray) -> Batch:
        return Batch(self.src[rows], self.dst[rows], self.run[rows], self.count[rows], self.src_step[rows], self.dst_step[rows])

    def runs(self) -> tuple[IntArray, IntArray, IntArray]:
        """The contiguous runs one by one, in order: (src[m], dst[m], nbytes[m])."""
        src, dst, run = self.src, self.dst, self.run
        for level in range(LEVELS):
            count = self.count[:, level]
            if (count == 1).all():
                continue
            # Rows so far are grouped by copy; expand each copy's rows by this level's count.
            owner = np.repeat(np.arange(len(self)), self.count[:, :level].prod(axis=1))
            times = count[owner]
            index = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
            src = np.repeat(src, times) + index * np.repeat(self.src_step[owner, level], times)
            dst = np.repeat(dst, times) + index * np.repeat(self.dst_step[owner, level], times)
            run = np.repeat(run, times)
        return src, dst, run

    def cut(self, nbytes: int | IntArray) -> tuple[Batch, IntArray]:
        """The same bytes with no copy larger than `nbytes` (one for all, or one for each copy), and for each copy of the
        result the row it was cut from. Cuts the outermost dimension first and inside a run last."""
        batch, owner = self, np.arange(len(self))
        limit = np.maximum(1, np.broadcast_to(np.asarray(nbytes, np.int64), (len(self),)))
        if ((self.sizes > 0) & (self.sizes <= limit)).all():
            return batch, owner
        for level in (*range(LEVELS), None):
            total = batch.run if level is None else batch.count[:, level]
            inner = 1 if level is None else np.maximum(1, batch.run * batch.count[:, level + 1 :].prod(axis=1))
            batch, parent = batch._divide(total, np.maximum(1, limit[owner] // inner), level)
            owner = owner[parent]
        return batch, owner

    def cut_spans(self, nbytes: int) -> tuple[Batch, IntArray]:
        """The same bytes with no copy whose source bytes lie more than `nbytes` apart, first to last, and for each copy of
        the result the row it was cut from. Dimensions come in order of their source steps, the widest outermost."""
        order = np.argsort(np.where(self.count > 1, -np.abs(self.src_step), 0), axis=1, kind="stable")
        count, src_step, dst_step = (np.take_along_axis(a, order, axis=1) for a in (self.count, self.src_step, self.dst_step))
        batch, owner = Batch(self.src, self.dst, self.run, count, src_step, dst_step), np.arange(len(self))
        for level in (*range(LEVELS), None):
            if level is None:
                total, per = batch.run, np.full(len(batch), max(1, nbytes))
            else:
                total, step = batch.count[:, level], np.abs(batch.src_step[:, level])
                reach = (batch.count[:, level + 1 :] - 1) * np.abs(batch.src_step[:, level + 1 :])
                per = np.maximum(0, nbytes - batch.run - reach.sum(axis=1)) // np.maximum(1, step) + 1
            batch, parent = batch._divide(total, per, level)
            owner = owner[parent]
        return batch, owner

    def _divide(self, total: IntArray, per: IntArray, level: int | None) -> tuple[Batch, IntArray]:
        parts = -(-total // per)
        if (parts == 1).all():
            return self, np.arange(len(self))
        owner = np.repeat(np.arange(len(self)), parts)
        index = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        first = index * per[owner]
        size = np.minimum(per[owner], total[owner] - first)
        out = self.take(owner)
        if level is None:
            return Batch(out.src + first, out.dst + first, size, out.count, out.src_step, out.dst_step), owner
        count = out.count.copy()
        count[:, level] = size
        src, dst = out.src + first * out.src_step[:, level], out.dst + first * out.dst_step[:, level]
        return Batch(src, dst, out.run, count, out.src_step, out.dst_step), owner
