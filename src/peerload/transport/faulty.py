"""A transport that goes wrong on purpose: what every failover test stands on. Deterministic for a seed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..batch import Batch
from ..deadline import Deadline
from ..errors import SourceLost
from ..native.columns import Columns
from .base import Region, Transport


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong while reading from peers whose source name contains `source` ("" is all of them).

    lost_after_nbytes: the source is gone for ever once so many bytes were read from it; the read that would pass the mark
      writes up to the mark (truncation) when `truncate`, else nothing, and raises SourceLost.
    delay_s: seconds added to every read, cut short by its deadline.
    flip_one_in_nbytes: a bit is flipped, silently, in about one byte of so many; at most `flips` times, if that is not 0.
    Negative or zero: that fault doesn't happen."""

    source: str = ""
    lost_after_nbytes: int = -1
    truncate: bool = False
    delay_s: float = 0.0
    flip_one_in_nbytes: int = 0
    flips: int = 0
    seed: int = 0


class Faulty:
    """Passes everything on to `inner`, which stays the caller's to use but is closed with this."""

    def __init__(self, inner: Transport, faults: Faults = Faults(), sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = inner.name
        self.limits = inner.limits
        self._inner, self._faults, self._sleep = inner, faults, sleep
        self._random = random.Random(faults.seed)  # noqa: S311 (not a secret)
        self._lock = threading.Lock()
        self._source_of: dict[str, str] = {}
        self._nbytes_of: dict[str, int] = {}
        self.flipped: list[int] = []  # addresses here of bytes that were changed

    def register(self, regions: Sequence[Region]) -> None:
        self._inner.register(regions)

    def describe(self) -> bytes:
        return self._inner.describe()

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        handle = self._inner.connect(description, source, deadline)
        self._source_of[handle] = source
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        source, faults = self._source_of.get(peer, ""), self._faults
        if faults.source not in source:
            self._inner.read(peer, batch, deadline)
            return
        if faults.delay_s > 0:
            self._sleep(min(faults.delay_s, deadline.remaining_s))
            deadline.check(f"reading {batch.nbytes} bytes from {source}")
        with self._lock:
            before = self._nbytes_of.get(source, 0)
            self._nbytes_of[source] = before + batch.nbytes
        room = faults.lost_after_nbytes - before
        if faults.lost_after_nbytes >= 0 and room < batch.nbytes:
            if faults.truncate and room > 0:
                self._inner.read(peer, _head(batch, room), deadline)
            raise SourceLost(source, f"lost on purpose after {faults.lost_after_nbytes} bytes")
        self._inner.read(peer, batch, deadline)
        if faults.flip_one_in_nbytes > 0:
            self._flip(batch)

    def close(self) -> None:
        self._inner.close()

    def _flip(self, batch: Batch) -> None:
        _, dst, run = batch.runs()
        end = np.cumsum(run)
        with self._lock:
            at = self._random.randrange(2 * self._faults.flip_one_in_nbytes)
            while at < batch.nbytes and (self._faults.flips == 0 or len(self.flipped) < self._faults.flips):
                i = int(np.searchsorted(end, at, "right"))
                address = int(dst[i] + at - (end[i] - run[i]))
                _write(address, _read(address) ^ 1 << self._random.randrange(8))
                self.flipped.append(address)
                at += 1 + self._random.randrange(2 * self._faults.flip_one_in_nbytes)


def _head(batch: Batch, nbytes: int) -> Batch:
    """The first `nbytes` of a batch, run by run."""
    src, dst, run = batch.runs()
    before = np.cumsum(run) - run
    run = np.minimum(run, nbytes - before)
    return Batch.of_runs(src[run > 0], dst[run > 0], run[run > 0])


def _read(address: int) -> int:
    here = np.zeros(1, np.uint8)
    one = np.ones(1, np.int64)
    Columns(Batch.of_runs(one * address, one * here.ctypes.data, one)).copy(0, 1)
    return int(here[0])


def _write(address: int, value: int) -> None:
    here = np.array([value], np.uint8)
    one = np.ones(1, np.int64)
    Columns(Batch.of_runs(one * here.ctypes.data, one * address, one)).copy(0, 1)
