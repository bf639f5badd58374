"""A transport that is made when it is first needed: files reach a GPU through pinned memory, and most ranks read none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..batch import Batch
from ..deadline import Deadline
from ..errors import HostError, SourceUnreachable
from .base import Limits, Region, Transport


class Deferred:
    """`open` makes the real transport, at the first `describe` or `connect`. Regions are remembered until then."""

    def __init__(self, name: str, limits: Limits, open: Callable[[], Transport]) -> None:  # noqa: A002 - what it does
        self.name, self.limits = name, limits
        self._make, self._lock = open, threading.Lock()
        self._real: Transport | None = None
        self._refused: HostError | None = None
        self._waiting: list[Region] = []
        self._closed = False

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            if self._real is None:
                self._waiting += regions
                return
        self._real.register(regions)

    def describe(self) -> bytes:
        return self._open().describe()

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        """Raises SourceUnreachable also when this host can't use the transport at all."""
        try:
            return self._open().connect(description, source, deadline)
        except HostError as error:
            raise SourceUnreachable(source, error.message, next_step=error.next_step) from error

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        self._open().read(peer, batch, deadline)

    def close(self) -> None:
        with self._lock:
            self._closed, real = True, self._real
        if real is not None:
            real.close()

    def _open(self) -> Transport:
        with self._lock:
            if self._closed:
                raise HostError("the transport is closed")
            if self._refused is not None:
                raise self._refused
            if self._real is None:
                try:
                    real = self._make()
                    try:
                        real.register(self._waiting)
                    except BaseException:
                        real.close()
                        raise
                except HostError as error:
                    self._refused = error
                    raise
                self._real = real
                self._waiting.clear()
            return self._real
