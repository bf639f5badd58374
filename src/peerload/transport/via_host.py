"""Device memory filled by a transport that knows host memory only: every byte lands in a bounded buffer of host memory first.

The way by which a GPU target reads a checkpoint on disk, for what no seed supplies.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..deadline import Deadline
from ..errors import HostError
from ..memory.cuda.mover import packed, portions
from ..memory.region import Region
from ..planning.batch import Batch
from .base import Limits, Transport
from .regions import RegionTable, destination_extents


class HostMemory(Protocol):
    """Host memory that a transport may write to, `nbytes` from `address`, and the way from there to `device`."""

    @property
    def device(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def copy(self, batch: Batch, deadline: Deadline, doing: str) -> None:
        """From addresses in the landing to addresses on the device. Raises DeadlineExceeded, nothing being written any more."""

    def synchronize(self) -> None:
        """Wait for what this process has already asked of the device."""

    def close(self) -> None:
        """Free the memory. Safe to call twice."""


class ThroughHost:
    """`inner`, whose destinations may also lie on `landing.device`. Both are closed with this. Sources are as `inner` has them:
    regions on the device aren't readable by peers this way.

    Reads of several threads take the landing in halves by turns, so that one half is filled while the other is emptied."""

    def __init__(self, inner: Transport, landing: HostMemory) -> None:
        self.name = inner.name
        self.limits: Limits = inner.limits
        self._inner, self._landing = inner, landing
        half = landing.nbytes // 2 // 4096 * 4096
        if half == 0:
            raise HostError(f"{landing.nbytes} bytes are too few to read through", next_step="raise staging_bytes")
        self._half_nbytes = half
        self._free = [landing.address, landing.address + half]
        self._turn = threading.Condition()
        self._regions: dict[tuple[int, int], Region] = {}
        self._table = RegionTable([], [])
        self._reads = 0
        self._closed = False
        inner.register([Region(landing.address, landing.nbytes)])

    def register(self, regions: Sequence[Region]) -> None:
        ours = [region for region in regions if region.device == self._landing.device]
        self._inner.register([region for region in regions if region.device != self._landing.device])
        if ours:
            self._landing.synchronize()
        with self._turn:
            self._regions.update({(r.address, r.nbytes): r for r in ours})
            self._table = RegionTable([a for a, _ in self._regions], [n for _, n in self._regions])

    def describe(self) -> bytes:
        return self._inner.describe()

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        return self._inner.connect(description, source, deadline)

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Raises what `inner` raises, and PlanError, before anything moves on the device, for destinations that lie in no
        region."""
        low, _ = destination_extents(batch)
        far = self._table.holds(low)
        rows = np.flatnonzero(far)
        self._table.locate(batch.take(rows))
        if len(rows) < len(batch) or len(batch) == 0:
            self._inner.read(peer, batch.take(np.flatnonzero(~far)), deadline)
        if len(rows) == 0:
            return
        doing = f"moving {batch.nbytes} bytes from {peer} on to {self._landing.device}"
        for part in portions(batch.take(rows), self._half_nbytes):
            at = self._take(deadline, doing)
            try:
                arriving, leaving, _ = packed(part, at)
                self._inner.read(peer, arriving, deadline)
                self._landing.copy(leaving, deadline, doing)
            finally:
                self._give(at)

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._reads == 0)
        self._inner.close()
        self._landing.close()

    def _take(self, deadline: Deadline, doing: str) -> int:
        """A half of the landing, waiting for one."""
        with self._turn:
            while not self._free and not self._closed:
                deadline.check(doing)
                self._turn.wait(deadline.remaining_s)
            if self._closed:
                raise HostError("the transport is closed")
            self._reads += 1
            return self._free.pop()

    def _give(self, half: int) -> None:
        with self._turn:
            self._free.append(half)
            self._reads -= 1
            self._turn.notify_all()
