"""What a load has cost so far: seconds by phase, and what was asked of transports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .reader import Outcome


class Tally:
    """Of one load, from when it is made. Not thread-safe."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.wire_nbytes = self.attached_nbytes = self.operations = self.staging_nbytes = self.reread_nbytes = 0

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._begun_s

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def add(self, outcome: Outcome) -> None:
        self.wire_nbytes += outcome.wire_nbytes
        self.attached_nbytes += outcome.attached_nbytes
        self.operations += outcome.operations
        self.staging_nbytes = max(self.staging_nbytes, outcome.staging_nbytes)
