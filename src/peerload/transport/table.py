"""Which region a byte range lies in: the check every read passes before anything moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..batch import Batch
from ..errors import PlanError
from ..geometry import BoolArray, IntArray, byte_extents


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

    def locate(self, low: IntArray, high: IntArray, column: str, owner: str) -> IntArray:
        """The region of each byte range low[n]..high[n], by its row. Raises PlanError that names the first outsider as
        `column` of a batch, and `owner`, whose regions these are."""
        at = np.searchsorted(self._start, low, "right") - 1
        inside = at >= 0
        if inside.any():
            inside &= high <= self._end[np.maximum(at, 0)]
        if not inside.all():
            i = int(np.argmin(inside))
            raise PlanError(
                f"batch.{column}[{i}]: bytes {int(low[i]):#x}..{int(high[i]):#x} lie in no single region of {owner}; "
                "nothing was read",
                next_step="register the memory before describing it, and plan against the current description",
            )
        row: IntArray = self._row[at]
        return row

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
