"""Tables of rows in device memory, sent piece by piece through one bounded buffer, and the stream that works on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from .driver import Device, Stream

#: A table goes in parts of at most so many rows: 5 MB of the widest.
ROWS: Final = 1 << 15
#: A launch takes about so many tiles at most, so that their number fits 32 bits with room to spare.
TILES: Final = 1 << 30


class TableRows(Protocol):
    """What `peerload.native.tables` makes tables of."""

    @property
    def row_nbytes(self) -> int: ...

    def fill(self, address: int, room: int, most: int) -> tuple[int, int, int]: ...


class Lane:
    """A stream, and memory for tables and results. For one thread at a time."""

    def __init__(self, device: Device) -> None:
        self.device: Final = device
        self.stream: Final = Stream(device)
        self._host = np.empty(0, np.uint8)
        self._table = Scratch(self)
        self.results: Final = Scratch(self)

    def run(self, rows: TableRows, launch: Callable[[int, int, int], None]) -> None:
        """launch(table, rows, tiles) for one table after the other, until there are no more rows."""
        room = ROWS * rows.row_nbytes
        if self._host.size < room:
            self._host = np.empty(room, np.uint8)
        while True:
            nbytes, count, tiles = rows.fill(self._host.ctypes.data, ROWS, TILES)
            if count == 0:
                return
            table = self._table.of(nbytes)
            self.stream.upload(table, self._host[:nbytes])
            launch(table, count, tiles)

    def close(self) -> None:
        self.stream.wait()
        for scratch in (self._table, self.results):
            scratch.close()
        self.stream.close()


class Scratch:
    """Device memory of a lane, kept between uses: allocating takes a millisecond."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._address = self._nbytes = 0

    def of(self, nbytes: int) -> int:
        """Where `nbytes` are. What was there before is no longer used by anybody, or was put there by the lane's stream."""
        if nbytes > self._nbytes:
            self._lane.stream.wait()
            self.close()
            room = max(1 << 16, 1 << (nbytes - 1).bit_length())
            self._address, self._nbytes = self._lane.device.allocate(room), room
        return self._address

    def close(self) -> None:
        if self._address:
            self._lane.device.free(self._address)
        self._address = self._nbytes = 0
