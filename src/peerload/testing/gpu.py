"""GPU memory for tests, with no framework: what `peerload.memory.arena.Arena` is for host memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..errors import HostError
from ..memory.cuda import driver
from ..memory.cuda.driver import Device, Stream
from ..memory.region import Region


def why_not(gpus: int = 1) -> str:
    """Why tests that need so many GPUs can't run here; empty if they can."""
    try:
        here = driver.count()
    except HostError as error:
        return error.message
    return "" if here >= gpus else f"needs {gpus} GPUs, this host has {here}"


class DeviceArena:
    """One allocation of at least `nbytes` on GPU `device`, zeroed, handed out front to back. Owned by whoever made it."""

    def __init__(self, device: str, nbytes: int) -> None:
        self._device = Device(device)
        self._stream = Stream(self._device)
        self._capacity: Final = nbytes + 8192
        self.address = self._device.allocate(self._capacity)
        self._used = 0
        self._stream.clear(self.address, self._capacity)
        self._stream.wait()

    @property
    def used_nbytes(self) -> int:
        return self._used

    def allocate(self, nbytes: int, align: int = 64) -> int:
        begin = -(-(self.address + self._used) // align) * align
        self._used = begin + nbytes - self.address
        if self._used > self._capacity:
            raise HostError(f"the arena is full, {nbytes} bytes are wanted")
        return begin

    def region(self) -> Region:
        """All that is handed out."""
        return Region(self.address, max(1, self._used), self._device.name)

    def read(self, address: int, nbytes: int) -> bytes:
        found = np.empty(nbytes, np.uint8)
        if nbytes:
            self._stream.download(found.ctypes.data, address, nbytes)
            self._stream.wait()
        return found.tobytes()

    def write(self, address: int, data: bytes) -> None:
        if data:
            self._stream.upload(address, np.frombuffer(data, np.uint8))
            self._stream.wait()

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        if self.address:
            self._stream.close()
            self._device.free(self.address)
            self._device.close()
            self.address = 0
