"""Device memory filled through host memory, where the device is a make-believe one: host memory under another name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peerload.batch import Batch
from peerload.deadline import Deadline
from peerload.errors import DeadlineExceeded, HostError, PlanError
from peerload.memory import Arena, copy
from peerload.testing.source_process import content
from peerload.testing.transport_conformance import Source, TransportConformance, strided
from peerload.transport.base import Region, Transport
from peerload.transport.files import FileSet, FilesTransport
from peerload.transport.memory import MemoryTransport
from peerload.transport.through_host import ThroughHost

DEVICE = "cuda:0"


class HostLanding:
    """A landing whose device is host memory too. `copied`: bytes of each copy on to the device."""

    device = DEVICE

    def __init__(self, nbytes: int) -> None:
        self._arena = Arena(nbytes)
        self.nbytes = nbytes
        self.address = self._arena.allocate(nbytes, 4096)
        self.copied: list[int] = []

    def copy(self, batch: Batch, deadline: Deadline, doing: str) -> None:
        deadline.check(doing)
        low, high = batch.src.min(), batch.src.max()
        assert self.address <= low <= high < self.address + self.nbytes
        copy(batch)
        self.copied.append(batch.nbytes)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._arena.close()


class OnDevice(ThroughHost):
    """Whatever is registered counts as device memory."""

    def register(self, regions: Sequence[Region]) -> None:
        super().register([replace(region, device=DEVICE, fd=-1) for region in regions])


class InProcess:
    def __init__(self, transport: MemoryTransport, nbytes: Sequence[int]) -> None:
        self._transport, self._buffers = transport, [content(i, n) for i, n in enumerate(nbytes)]
        self.address: list[int] = []
        self._register(self._buffers)

    def register_more(self, nbytes: int) -> int:
        self._buffers.append(content(len(self._buffers), nbytes))
        self._register(self._buffers[-1:])
        return len(self._buffers) - 1

    def _register(self, buffers: Sequence[np.ndarray]) -> None:
        self._transport.register([Region(int(b.ctypes.data), b.nbytes) for b in buffers])
        self.address += [int(b.ctypes.data) for b in buffers]
        self.description = self._transport.describe()

    def kill(self) -> None:
        self._transport.close()


class TestThroughHost(TransportConformance):
    """All that a transport must do, every byte through a landing far smaller than the reads."""

    @pytest.fixture(autouse=True)
    def hall(self) -> None:
        self._hall: dict[str, MemoryTransport] = {}

    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        yield InProcess(MemoryTransport(self._hall), nbytes)

    def reader(self) -> Transport:
        return OnDevice(MemoryTransport(self._hall), HostLanding(256 << 10))


def test_a_file_lands_on_the_device_in_bounded_pieces(tmp_path: Path) -> None:
    nbytes = 3_000_001
    (tmp_path / "weights").write_bytes(content(0, nbytes).tobytes())
    files = FileSet.of([tmp_path / "weights"])
    landing = HostLanding(1 << 20)
    through = ThroughHost(FilesTransport(threads=1), landing)
    with Arena(nbytes) as arena:
        here = arena.allocate(nbytes)
        through.register([replace(arena.region(), device=DEVICE, fd=-1)])
        peer = through.connect(files.encode(), "disk", Deadline.after(20))
        through.read(peer, strided(files.base[0], here, nbytes, [], [], []), Deadline.after(20))
        assert arena.read(here, nbytes) == content(0, nbytes).tobytes()
        assert sum(landing.copied) == nbytes
        assert max(landing.copied) <= 1 << 19
        through.close()


def test_destinations_on_host_and_device_in_one_batch() -> None:
    hall: dict[str, MemoryTransport] = {}
    source = InProcess(MemoryTransport(hall), [4096])
    landing = HostLanding(64 << 10)
    through = ThroughHost(MemoryTransport(hall), landing)
    with Arena(8192) as near, Arena(8192) as far:
        a, b = near.allocate(100), far.allocate(100)
        through.register([near.region(), replace(far.region(), device=DEVICE, fd=-1)])
        peer = through.connect(source.description, "source", Deadline.after(20))
        src = source.address[0]
        through.read(
            peer, Batch.joined(strided(src, b, 100, [], [], []), strided(src + 100, a, 100, [], [], [])), Deadline.after(5)
        )
        assert far.read(b, 100) == content(0, 4096)[:100].tobytes()
        assert near.read(a, 100) == content(0, 4096)[100:200].tobytes()
        assert landing.copied == [100]
        beyond = strided(src, far.address + far.used_nbytes - 9, 10, [], [], [])
        with pytest.raises(PlanError, match=r"dst\["):
            through.read(peer, Batch.joined(strided(src, a, 1, [], [], []), beyond), Deadline.after(5))
        assert near.read(a, 1) == content(0, 4096)[100:101].tobytes(), "something moved"
        through.close()


def test_who_waits_for_room_waits_no_longer_than_the_deadline() -> None:
    hall: dict[str, MemoryTransport] = {}
    source = InProcess(MemoryTransport(hall), [4096])
    entered, leave = threading.Barrier(3), threading.Event()

    class Slow(HostLanding):
        def copy(self, batch: Batch, deadline: Deadline, doing: str) -> None:
            entered.wait(20)
            leave.wait(20)
            super().copy(batch, deadline, doing)

    through = ThroughHost(MemoryTransport(hall), Slow(64 << 10))
    with Arena(8192) as far:
        at = far.allocate(4096)
        through.register([replace(far.region(), device=DEVICE, fd=-1)])
        peer = through.connect(source.description, "source", Deadline.after(20))
        batch = strided(source.address[0], at, 16, [], [], [])
        readers = [threading.Thread(target=through.read, args=(peer, batch, Deadline.after(20))) for _ in range(2)]
        for reader in readers:
            reader.start()
        entered.wait(20)  # both halves of the landing are taken
        with pytest.raises(DeadlineExceeded):
            through.read(peer, batch, Deadline.after(0.05))
        leave.set()
        for reader in readers:
            reader.join(20)
        through.close()
        with pytest.raises(HostError):
            through.read(peer, batch, Deadline.after(1))


def test_a_landing_without_room_is_refused() -> None:
    with pytest.raises(HostError, match="too few"):
        ThroughHost(MemoryTransport({}), HostLanding(100))
