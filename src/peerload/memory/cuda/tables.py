"""Tables of rows in device memory, sent piece by piece through one bounded buffer, and the stream that works on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .driver import Device, Stream

#: A table goes in parts of at most so many rows: 9 MB of the widest.
ROWS: Final = 1 << 16
#: A launch takes at most so many tiles, so that their number fits 32 bits with room to spare.
TILES: Final = 1 << 30

Table = npt.NDArray[np.void]


class Lane:
    """A stream and device memory for tables of `row_nbytes` bytes a row. For one thread at a time."""

    def __init__(self, device: Device, row_nbytes: int) -> None:
        self.device: Final = device
        self.stream: Final = Stream(device)
        self._capacity = 0
        self._row_nbytes = row_nbytes
        self._table = self._first = 0

    def run(self, table: Table, tiles: npt.NDArray[np.int64], launch: Callable[[int, int, int, int], None]) -> None:
        """launch(table, first, rows, tiles) for part after part of `table` [n], whose row i has tiles[i] > 0."""
        begin = 0
        while begin < len(table):
            ends = np.cumsum(tiles[begin : begin + ROWS])
            size = max(1, int(np.searchsorted(ends, TILES, "right")))
            first = np.zeros(size + 1, np.uint32)
            first[1:] = ends[:size]
            self._room(size)
            self.stream.upload(self._table, table[begin : begin + size])
            self.stream.upload(self._first, first)
            launch(self._table, self._first, size, int(ends[size - 1]))
            begin += size

    def _room(self, rows: int) -> None:
        """Memory for a part. Grows seldom: 1,024 rows, then all there can be."""
        if rows > self._capacity:
            self.stream.wait()
            self._free()
            capacity = 1024 if rows <= 1024 else ROWS
            self._table = self.device.allocate(capacity * self._row_nbytes)
            self._first = self.device.allocate((capacity + 1) * 4)
            self._capacity = capacity

    def _free(self) -> None:
        for address in (self._table, self._first):
            if address:
                self.device.free(address)
        self._table = self._first = self._capacity = 0

    def close(self) -> None:
        self.stream.wait()
        self._free()
        self.stream.close()


def alignment(*columns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row by row, 0..4: the exponent of the largest power of two, up to 16, that divides all columns."""
    joined = columns[0] & 15
    for column in columns[1:]:
        joined |= column & 15
    found: npt.NDArray[np.int64] = _TRAILING_ZEROS[joined]
    return found


_TRAILING_ZEROS: Final = np.array([4, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0])


def as_table(kind: npt.DTypeLike, rows: int, **columns: npt.NDArray[Any]) -> Table:
    table = np.zeros(rows, kind)
    for name, values in columns.items():
        table[name] = values
    return table
