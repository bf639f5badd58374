"""A place in host memory where bytes for a GPU land, and the way on from there."""

from __future__ import annotations

from typing import Final

from ...deadline import Deadline
from ...planning.batch import Batch
from .driver import Device
from .mover import Mover, Pinned


class Landing:
    """`nbytes` of pinned memory at `address`, and copies from there to memory of GPU `name`. Owns all it needs."""

    def __init__(self, name: str, nbytes: int) -> None:
        self.device: Final = name
        self.nbytes: Final = nbytes
        self._device = Device(name)
        try:
            self._mover = Mover(self._device)
            self._pinned = Pinned(self._device, nbytes)
        except BaseException:
            self._device.close()
            raise
        self.address: Final = self._pinned.address

    def copy(self, batch: Batch, deadline: Deadline, doing: str) -> None:
        """From addresses in the landing to addresses on the GPU. Raises DeadlineExceeded, once nothing is written any more."""
        with self._mover.lane() as lane:
            self._mover.copy(lane, batch, deadline, doing)

    def synchronize(self) -> None:
        """Wait for what the process has already asked of the GPU."""
        self._device.synchronize()

    def close(self) -> None:
        """The caller vouches that no copy is under way. Safe to call twice."""
        self._mover.close()
        self._pinned.close()
        self._device.close()
