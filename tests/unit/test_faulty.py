"""Faults happen as told, and only those."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from peerload.batch import Batch
from peerload.deadline import Deadline
from peerload.errors import DeadlineExceeded, SourceLost
from peerload.transport.base import Region
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.memory import MemoryTransport

NBYTES = 100_000
SOON = Deadline.after(3600)


class Bench:
    """Two sources, a and b, in this process, and a reader with faults."""

    def __init__(self, faults: Faults) -> None:
        hall: dict[str, MemoryTransport] = {}
        self.there = np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8)
        self.here = np.zeros(NBYTES, np.uint8)
        self.slept: list[float] = []
        sources = {name: MemoryTransport(hall) for name in "ab"}
        self.transport = Faulty(MemoryTransport(hall), faults, self.slept.append)
        self.transport.register([Region(int(self.here.ctypes.data), NBYTES)])
        self.peers = {}
        for name, source in sources.items():
            source.register([Region(int(self.there.ctypes.data), NBYTES)])
            self.peers[name] = self.transport.connect(source.describe(), name, SOON)

    def read(self, name: str, begin: int, end: int, deadline: Deadline = SOON) -> npt.NDArray[np.uint8]:
        run = np.full((end - begin) // 1000, 1000, np.int64)
        at = begin + np.cumsum(run) - run
        batch = Batch.of_runs(at + self.there.ctypes.data, at + self.here.ctypes.data, run)
        self.transport.read(self.peers[name], batch, deadline)
        return self.here[begin:end]


@pytest.fixture
def right() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_source_is_lost_after_so_many_bytes_and_for_ever(truncate: bool, right: npt.NDArray[np.uint8]) -> None:
    bench = Bench(Faults("a", lost_after_nbytes=2500, truncate=truncate))
    assert np.array_equal(bench.read("a", 0, 2000), right[:2000])
    for begin in (2000, 50_000):
        with pytest.raises(SourceLost, match="source a: lost on purpose"):
            bench.read("a", begin, begin + 2000)
    written = np.flatnonzero(bench.here)
    assert written.max() == (np.flatnonzero(right[:2500]).max() if truncate else np.flatnonzero(right[:2000]).max())
    assert np.array_equal(bench.read("b", 0, NBYTES), right)


def test_flipped_bits_are_few_known_and_the_same_each_time(right: npt.NDArray[np.uint8]) -> None:
    results = []
    for _ in range(2):
        bench = Bench(Faults(flip_one_in_nbytes=5000, seed=3))
        got = bench.read("a", 0, NBYTES)
        wrong = np.flatnonzero(got != right)
        assert sorted(set(bench.transport.flipped)) == (wrong + bench.here.ctypes.data).tolist()
        assert 5 <= len(wrong) <= 60
        assert all(int(x).bit_count() == 1 for x in got[wrong] ^ right[wrong])
        results.append(got.copy())
    assert np.array_equal(*results)
    other = Bench(Faults(flip_one_in_nbytes=5000, seed=4)).read("a", 0, NBYTES)
    assert not np.array_equal(results[0], other)


def test_flips_can_be_counted(right: npt.NDArray[np.uint8]) -> None:
    bench = Bench(Faults(flip_one_in_nbytes=5000, flips=1))
    assert int((bench.read("a", 0, NBYTES) != right).sum()) == 1
    assert np.array_equal(bench.read("a", 0, NBYTES), right)


def test_delays_respect_the_deadline() -> None:
    bench = Bench(Faults(delay_s=2.0))
    bench.read("a", 0, 1000)
    assert bench.slept == [2.0]
    now = iter([0.0, 5.0])
    with pytest.raises(DeadlineExceeded, match="from a"):
        bench.read("a", 0, 1000, Deadline(0.5, lambda: next(now)))
    assert bench.slept == [2.0, 0.5]
