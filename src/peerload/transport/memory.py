"""A transport within one process, by address."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..deadline import Deadline
from ..errors import HostError, PlanError, SourceLost, SourceUnreachable
from ..memory.region import Region
from ..native.columns import Columns
from ..planning.batch import Batch
from .base import Limits
from .regions import RegionTable


class MemoryTransport:
    """Transports that are to reach each other share one `hall`, a dictionary that the caller makes."""

    name = "memory"
    limits = Limits(strided=True, operation_nbytes=4096)

    def __init__(self, hall: dict[str, MemoryTransport]) -> None:
        self._hall = hall
        self._regions: list[Region] = []
        self._table = RegionTable([], [])
        self._peers: dict[str, tuple[str, MemoryTransport]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            if self._closed:
                raise HostError("the transport is closed")
            self._regions += regions
            self._table = RegionTable([r.address for r in self._regions], [r.nbytes for r in self._regions])

    def describe(self) -> bytes:
        self._hall[f"{id(self):x}"] = self
        return f"{id(self):x}".encode()

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        del deadline  # nothing to wait for
        there = self._hall.get(description.decode(errors="replace"))
        if there is None or there._closed:
            raise SourceUnreachable(source, "is not in this process, or closed")
        with self._lock:
            handle = f"{source}#{len(self._peers)}"
            self._peers[handle] = source, there
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Before anything moves, raises PlanError for destinations outside our regions and SourceLost for sources outside those
        of the peer."""
        if self._closed:
            raise HostError("the transport is closed")
        if peer not in self._peers:
            raise PlanError(f"there is no peer {peer!r}")
        source, there = self._peers[peer]
        self._table.locate(batch)
        there._table.locate_sources(batch, source)
        deadline.check(f"reading {batch.nbytes} bytes from {source}")
        if there._closed:
            raise SourceLost(source, "it closed its transport")
        Columns(batch).copy(0, len(batch))

    def close(self) -> None:
        self._closed = True
        self._hall.pop(f"{id(self):x}", None)
