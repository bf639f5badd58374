"""A transport that starts when it is first needed: NIXL takes 0.4 s of a core, and a rank on its seed's host never needs it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from ..batch import Batch
from ..deadline import Deadline
from ..errors import HostError, SourceUnreachable
from .base import Limits, Region, Transport


class Deferred:
    """`open` makes the real transport, at the first `describe` or `connect`. Regions are remembered until then; those whose
    descriptor has been closed or used again meanwhile are forgotten."""

    def __init__(self, name: str, limits: Limits, open: Callable[[], Transport]) -> None:  # noqa: A002 - what it does
        self.name, self.limits = name, limits
        self._make, self._lock = open, threading.Lock()
        self._real: Transport | None = None
        self._refused: HostError | None = None
        self._waiting: list[tuple[Region, tuple[int, int] | None]] = []
        self._closed = False

    @property
    def started(self) -> bool:
        return self._real is not None

    def register(self, regions: Sequence[Region]) -> None:
        with self._lock:
            if self._real is None:
                self._waiting += [(region, _identity(region.fd)) for region in regions]
                return
        self._real.register(regions)

    def describe(self) -> bytes:
        return self._open().describe()

    def connect(self, description: bytes, source: str) -> str:
        """Raises SourceUnreachable also when this host can't use the transport at all."""
        try:
            return self._open().connect(description, source)
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
                        real.register([region for region, known in self._waiting if _identity(region.fd) == known])
                    except BaseException:
                        real.close()
                        raise
                except HostError as error:
                    self._refused = error
                    raise
                self._real = real
                self._waiting.clear()
            return self._real


def _identity(fd: int) -> tuple[int, int] | None:
    """What a descriptor stands for, None when it is closed or there is none."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
