"""Which region a byte range lies in: the check every read passes before anything moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import PlanError, SourceLost
from ..model.boxes import BoolArray, IntArray, byte_extents
from ..native.tables import locate
from ..planning.batch import Batch


class RegionTable:
    """Rows of (address, nbytes). Immutable. A range lies in a region only if it lies in one region as a whole."""

    __slots__ = ("_end", "_row", "_start")

    def __init__(self, address: Sequence[int] | IntArray, nbytes: Sequence[int] | IntArray) -> None:
        start, size = np.asarray(address, np.int64), np.asarray(nbytes, np.int64)
        order = np.lexsort((-size, start))
        end = (start + size)[order]
        reach = np.maximum.accumulate(end) if len(end) else end
        # A region inside an earlier one never decides; without those, both starts and ends ascend.
        own = np.append(True, end[1:] > reach[:-1]) if len(end) else np.zeros(0, np.bool_)
        self._row, self._start, self._end = order[own], start[order][own], end[own]

    def __len__(self) -> int:
        return len(self._row)

    def locate(self, batch: Batch) -> IntArray:
        """The region of each row's destination. Raises PlanError that names the first row outside: the regions are ours."""
        row, outside = locate(batch.dst, batch.run, batch.count, batch.dst_step, self._start, self._end)
        if outside >= 0:
            low, high = destination_extents(batch)
            raise PlanError(
                f"batch.dst[{outside}]: bytes {int(low[outside]):#x}..{int(high[outside]):#x} lie in no single region of this "
                "process; nothing was read",
                next_step="register the memory before reading into it",
            )
        found: IntArray = self._row[row]
        return found

    def locate_sources(self, batch: Batch, source: str) -> IntArray:
        """The region of each row's source. Raises SourceLost that names the first row outside: the regions are those that
        `source` described, and the addresses are those that it announced."""
        row, outside = locate(batch.src, batch.run, batch.count, batch.src_step, self._start, self._end)
        if outside >= 0:
            low, high = source_extents(batch)
            raise SourceLost(
                source,
                f"batch.src[{outside}]: bytes {int(low[outside]):#x}..{int(high[outside]):#x} lie in no single region that it "
                "described; nothing was read",
                next_step="plan the rest from other sources",
            )
        found: IntArray = self._row[row]
        return found

    def holds(self, address: IntArray) -> BoolArray:
        """Whether each byte lies in a region."""
        if len(self) == 0:
            return np.zeros(len(address), np.bool_)
        at = np.searchsorted(self._start, address, "right") - 1
        inside: BoolArray = (at >= 0) & (address < self._end[np.maximum(at, 0)])
        return inside


def source_extents(batch: Batch) -> tuple[IntArray, IntArray]:
    """Lowest source byte of each row and one past the highest."""
    if (batch.count == 1).all():
        return batch.src, batch.src + batch.run
    return byte_extents(batch.src, batch.count, batch.src_step, batch.run)


def destination_extents(batch: Batch) -> tuple[IntArray, IntArray]:
    if (batch.count == 1).all():
        return batch.dst, batch.dst + batch.run
    return byte_extents(batch.dst, batch.count, batch.dst_step, batch.run)
