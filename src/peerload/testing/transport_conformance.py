"""What every transport must do. Inherit `TransportConformance` and say how a source and a reader are made.

    class TestMine(TransportConformance):
        @contextmanager
        def source(self, nbytes, registration):
            with SourceProcess("mine", nbytes, registration=registration) as process:
                yield process

        def reader(self):
            return MyTransport()

A source holds buffers of the sizes asked for, buffer i filled with `content(i, nbytes[i])`. It should live in another
process wherever the transport can reach one.
"""

from __future__ import annotations

import abc
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pytest

from ..deadline import Deadline
from ..errors import DeadlineExceeded, HostError, PlanError, SourceError, SourceLost, SourceUnreachable
from ..memory.arena import Arena
from ..memory.region import Region
from ..model.boxes import IntArray
from ..planning.batch import LEVELS, Batch
from ..transport.base import Transport
from .source_process import Bytes, content

#: Sizes of the buffers of the source: the first is the one most tests read.
SIZES = (6 << 20, 1, 100, 4096, 65539)
HERE_NBYTES = 8 << 20
UNTOUCHED = 0xA5


class Destination(Protocol):
    """Memory of the reader's, as `peerload.memory.arena.Arena` has it."""

    @property
    def address(self) -> int: ...
    @property
    def used_nbytes(self) -> int: ...
    def allocate(self, nbytes: int, align: int = 64) -> int: ...
    def region(self) -> Region: ...
    def read(self, address: int, nbytes: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def close(self) -> None: ...


class Source(Protocol):
    """Somebody to read from. `description` and `address` change when a buffer is registered later."""

    description: bytes
    address: list[int]

    def register_more(self, nbytes: int) -> int:
        """Make one more buffer readable; returns its index."""

    def kill(self) -> None:
        """End it as abruptly as can be."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A connected pair, the reader's destination memory, and what the source holds there by address."""

    source: Source
    reader: Transport
    peer: str
    arena: Destination
    here: int

    def read(self, batch: Batch, deadline: Deadline | None = None) -> None:
        """As a caller would who has read the transport's limits."""
        limits = self.reader.limits
        if not limits.strided:
            batch = Batch.of_runs(*batch.runs())
        at_most = limits.max_operations or max(1, len(batch))
        for first in range(0, max(1, len(batch)), at_most):
            self.reader.read(self.peer, batch.take(slice(first, first + at_most)), deadline or soon())

    def landed(self, offset: int, nbytes: int) -> Bytes:
        return np.frombuffer(self.arena.read(self.here + offset, nbytes), np.uint8)


def soon() -> Deadline:
    return Deadline.after(20)


def strided(src: int, dst: int, run: int, count: Sequence[int], src_step: Sequence[int], dst_step: Sequence[int]) -> Batch:
    """A batch of one copy; missing levels are outermost."""

    def level(values: Sequence[int], fill: int) -> IntArray:
        return np.array([[fill] * (LEVELS - len(values)) + list(values)], np.int64)

    src_, dst_, run_ = (np.array([value], np.int64) for value in (src, dst, run))
    return Batch(src_, dst_, run_, level(count, 1), level(src_step, 0), level(dst_step, 0))


def runs(src: IntArray, dst: IntArray, nbytes: int) -> Batch:
    return Batch.of_runs(src.astype(np.int64), dst.astype(np.int64), np.full(len(src), nbytes, np.int64))


class TransportConformance(abc.ABC):
    """Tests read from the source's buffer 0 unless they say otherwise; the oracle copies run by run with NumPy.

    reads_need_the_source: a read stands still while the source's process is stopped."""

    reads_need_the_source = False

    @abc.abstractmethod
    def source(self, nbytes: Sequence[int], registration: str) -> AbstractContextManager[Source]:
        """A source with buffers of `nbytes`, registered under the strategy `registration`."""

    @abc.abstractmethod
    def reader(self) -> Transport:
        """A transport that reaches the source; the scene closes it."""

    def destination(self, nbytes: int) -> Destination:
        """Memory for the reader to read into; the scene closes it."""
        return Arena(nbytes)

    @contextmanager
    def scene(self, registration: str = "arena", sizes: Sequence[int] = SIZES) -> Iterator[Scene]:
        reader = self.reader()
        try:
            with self.source(sizes, registration) as source, closing(self.destination(HERE_NBYTES)) as arena:
                here = arena.allocate(HERE_NBYTES, 4096)
                arena.write(here, bytes([UNTOUCHED]) * HERE_NBYTES)
                reader.register([arena.region()])
                yield Scene(source, reader, reader.connect(source.description, "source", soon()), arena, here)
        finally:
            reader.close()

    def check(self, scene: Scene, batch: Batch, buffer: int = 0, nbytes: int = SIZES[0]) -> None:
        """Read `batch` and compare all of the destination memory, the bytes between the runs included."""
        scene.read(batch)
        there = content(buffer, nbytes)
        expected = np.full(HERE_NBYTES, UNTOUCHED, np.uint8)
        src, dst, run = batch.runs()
        if len(run) and (run == run[0]).all():
            step = np.arange(int(run[0]))
            expected[(dst - scene.here)[:, None] + step] = there[(src - scene.source.address[buffer])[:, None] + step]
        else:
            for s, d, n in zip(src - scene.source.address[buffer], dst - scene.here, run, strict=True):
                expected[d : d + n] = there[s : s + n]
        wrong = np.flatnonzero(scene.landed(0, HERE_NBYTES) != expected)
        assert len(wrong) == 0, f"{len(wrong)} bytes differ, the first at {wrong[0]}"

    def test_contiguous(self) -> None:
        with self.scene() as scene:
            self.check(scene, strided(scene.source.address[0], scene.here, SIZES[0], [], [], []))

    def test_unaligned(self) -> None:
        with self.scene() as scene:
            self.check(scene, strided(scene.source.address[0] + 4097, scene.here + 13, (5 << 20) + 3, [], [], []))

    def test_no_copies_at_all(self) -> None:
        with self.scene() as scene:
            self.check(scene, Batch.of_runs(*(np.zeros(0, np.int64),) * 3))

    def test_scattered_pages(self) -> None:
        rng = np.random.default_rng(1)
        with self.scene() as scene:
            src, dst = rng.permutation(1500)[:1200] * 4096, rng.permutation(2000)[:1200] * 4096
            self.check(scene, runs(scene.source.address[0] + src, scene.here + dst, 4096))

    def test_a_hundred_thousand_tiny_runs(self) -> None:
        rng = np.random.default_rng(2)
        with self.scene() as scene:
            src, dst = rng.permutation(300_000)[:100_000] * 16, rng.permutation(400_000)[:100_000] * 16
            self.check(scene, runs(scene.source.address[0] + src, scene.here + dst, 16))

    def test_runs_of_different_lengths(self) -> None:
        rng = np.random.default_rng(3)
        with self.scene() as scene:
            run: IntArray = rng.integers(1, 20_000, 400).astype(np.int64)
            end = np.cumsum(run)
            src: IntArray = scene.source.address[0] + rng.integers(0, SIZES[0] - int(run.max()), 400).astype(np.int64)
            self.check(scene, Batch.of_runs(src, scene.here + end - run, run))

    def test_half_of_every_row(self) -> None:
        with self.scene() as scene:
            self.check(scene, strided(scene.source.address[0] + 2048, scene.here, 2048, [1400], [4096], [2048]))

    def test_three_levels(self) -> None:
        with self.scene() as scene:
            batch = strided(
                scene.source.address[0], scene.here, 24, [5, 33, 70], [900_000, 20_000, 48], [33 * 70 * 30, 70 * 30, 30]
            )
            self.check(scene, batch)

    def test_negative_steps(self) -> None:
        with self.scene() as scene:
            batch = strided(
                scene.source.address[0] + 4_000_000,
                scene.here + 2_000_000,
                100,
                [50, 60],
                [-60_000, 300],
                [7_000, -110],
            )
            self.check(scene, batch)

    @pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 3])
    def test_transposed_elements(self, itemsize: int) -> None:
        rows, columns = 150, 211
        with self.scene() as scene:
            batch = strided(
                scene.source.address[0],
                scene.here,
                itemsize,
                [columns, rows],
                [itemsize, columns * itemsize],
                [rows * itemsize, itemsize],
            )
            self.check(scene, batch)

    def test_elements_with_gaps_on_both_sides(self) -> None:
        with self.scene() as scene:
            self.check(scene, strided(scene.source.address[0], scene.here, 2, [90, 250], [15_000, 6], [1_000, 4]))

    def test_copies_of_many_shapes_at_once(self) -> None:
        with self.scene() as scene:
            src, here = scene.source.address[0], scene.here
            parts = [
                strided(src, here, 1 << 20, [], [], []),
                strided(src + (1 << 20), here + (2 << 20), 2, [100, 100], [2, 200], [200, 2]),
                strided(src + (2 << 20), here + (3 << 20), 4096, [200], [8192], [4096]),
                strided(src + (5 << 20), here + (4 << 20), 700, [10], [-700], [1000]),
            ]
            self.check(scene, Batch(*(np.concatenate([getattr(p, f) for p in parts]) for f in Batch.__slots__)))

    @pytest.mark.parametrize("registration", ["per-tensor", "per-allocation", "arena"])
    def test_every_buffer_under_every_registration(self, registration: str) -> None:
        with self.scene(registration) as scene:
            size = np.array(SIZES, np.int64)
            at: IntArray = np.cumsum(size) - size
            batch = Batch.of_runs(np.array(scene.source.address, np.int64), scene.here + at, size)
            scene.read(batch)
            for i, nbytes in enumerate(SIZES):
                assert np.array_equal(scene.landed(int(at[i]), nbytes), content(i, nbytes))

    def test_a_source_registers_more(self) -> None:
        with self.scene() as scene:
            index = scene.source.register_more(50_000)
            again = scene.reader.connect(scene.source.description, "source", soon())
            batch = strided(scene.source.address[index], scene.here, 50_000, [], [], [])
            scene.reader.read(again, batch, soon())
            assert np.array_equal(scene.landed(0, 50_000), content(index, 50_000))
            old = strided(scene.source.address[0], scene.here, 50_000, [], [], [])
            scene.reader.read(scene.peer, old, soon())
            assert np.array_equal(scene.landed(0, 50_000), content(0, SIZES[0])[:50_000])

    def test_a_reader_registers_more(self) -> None:
        with self.scene() as scene, closing(self.destination(1000)) as more:
            here = more.allocate(1000)
            batch = strided(scene.source.address[0], here, 1000, [], [], [])
            with pytest.raises(PlanError):
                scene.read(batch)
            scene.reader.register([more.region()])
            scene.read(batch)
            assert more.read(here, 1000) == content(0, SIZES[0])[:1000].tobytes()

    @pytest.mark.parametrize("row", [0, 1, 2, 3])
    def test_source_bytes_outside_the_regions_are_refused(self, row: int) -> None:
        with self.scene("per-tensor", [4096]) as scene:
            src = scene.source.address[0]
            bad = [
                strided(src - 1, scene.here, 10, [], [], []),
                strided(src + 4090, scene.here, 7, [], [], []),
                strided(src, scene.here, 16, [4], [2048], [16]),
                strided(src, scene.here, 16, [2], [-16], [16]),
            ][row]
            good = strided(src, scene.here + 1000, 100, [], [], [])
            both = Batch(*(np.concatenate([getattr(p, f) for p in (good, bad)]) for f in Batch.__slots__))
            with pytest.raises(SourceLost, match=r"source: batch.src\["):
                scene.read(both)
            assert (scene.landed(0, HERE_NBYTES) == UNTOUCHED).all(), "something moved"

    def test_destination_bytes_outside_the_regions_are_refused(self) -> None:
        with self.scene() as scene:
            src, end = scene.source.address[0], scene.arena.address + scene.arena.used_nbytes
            for bad in (strided(src, end - 9, 10, [], [], []), strided(src, scene.here, 1, [2], [1], [1 << 40])):
                with pytest.raises(PlanError, match=r"dst\["):
                    scene.read(bad)
            assert (scene.landed(0, HERE_NBYTES) == UNTOUCHED).all(), "something moved"

    def test_a_deadline_that_has_passed(self) -> None:
        with self.scene() as scene:
            batch = strided(scene.source.address[0], scene.here, SIZES[0], [], [], [])
            with pytest.raises(DeadlineExceeded, match="source"):
                scene.reader.read(scene.peer, batch, Deadline(at_s=1.0, clock=lambda: 2.0))
            self.check(scene, batch)

    def test_a_dead_source_is_lost(self) -> None:
        with self.scene() as scene:
            batch = strided(scene.source.address[0], scene.here, SIZES[0], [], [], [])
            self.check(scene, batch)
            scene.source.kill()
            for _ in range(2):
                with pytest.raises(SourceLost, match="source"):
                    scene.read(batch)
            with pytest.raises(SourceUnreachable):
                scene.reader.connect(scene.source.description, "source", soon())

    def test_a_source_that_dies_while_it_is_read(self) -> None:
        """Whatever the moment: the reader gets an error, and every read that succeeded brought the right bytes."""
        with self.scene() as scene:
            batch = strided(scene.source.address[0], scene.here, SIZES[0], [], [], [])
            expected = content(0, SIZES[0])
            killer = threading.Timer(0.05, scene.source.kill)
            killer.start()
            with pytest.raises(SourceError):
                for _ in range(100_000):
                    scene.read(batch)
                    assert np.array_equal(scene.landed(0, SIZES[0]), expected)
            killer.join()

    def test_reads_from_several_threads(self) -> None:
        with self.scene() as scene:
            part = 64 << 10
            failures: list[BaseException] = []

            def work(mine: int) -> None:
                try:
                    for i in range(mine, SIZES[0] // part, 4):
                        scene.read(strided(scene.source.address[0] + i * part, scene.here + i * part, part, [], [], []))
                except BaseException as error:  # handed to the test's own thread
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures, failures
            assert np.array_equal(scene.landed(0, SIZES[0]), content(0, SIZES[0]))

    def test_two_connections_to_one_source(self) -> None:
        with self.scene() as scene:
            second = scene.reader.connect(scene.source.description, "source", soon())
            assert second != scene.peer
            for offset, peer in enumerate((scene.peer, second)):
                batch = strided(scene.source.address[0] + offset, scene.here + 1000 * offset, 1000, [], [], [])
                scene.reader.read(peer, batch, soon())
                assert np.array_equal(scene.landed(1000 * offset, 1000), content(0, SIZES[0])[offset : offset + 1000])

    @pytest.mark.parametrize("limit_s", [20.0, 0.7])
    def test_a_source_that_is_stopped_while_it_is_read_writes_nothing_later(self, limit_s: float) -> None:
        """Either the read needs nothing of the source's process (its memory is mapped here, or the kernel reads it) and succeeds,
        or it gives up, for want of progress or at its deadline; then no byte may arrive once the process goes on."""
        if limit_s < 20 and not self.reads_need_the_source:
            pytest.skip("the read would succeed")
        nbytes = 192 << 20
        reader = self.reader()
        with self.source([nbytes], "arena") as source, closing(self.destination(nbytes)) as arena, closing(reader):
            pid = getattr(source, "pid", None)
            if pid is None:
                pytest.skip("this source lives in the test's own process")
            here = arena.allocate(nbytes, 4096)
            arena.write(here, bytes([UNTOUCHED]) * nbytes)
            reader.register([arena.region()])
            peer = reader.connect(source.description, "source", soon())
            scene, lost = Scene(source, reader, peer, arena, here), list[Exception]()
            batch, _ = strided(source.address[0], here, nbytes, [], [], []).cut(reader.limits.max_batch_nbytes)

            def read() -> None:
                try:
                    for row in range(len(batch)):
                        reader.read(peer, batch.take(slice(row, row + 1)), Deadline.after(limit_s))
                except (SourceLost, DeadlineExceeded) as error:
                    lost.append(error)

            thread = threading.Thread(target=read)
            thread.start()
            while thread.is_alive() and (scene.landed(0, 4096) == UNTOUCHED).all():
                time.sleep(0.001)
            os.kill(pid, signal.SIGSTOP)
            try:
                thread.join(60)
            finally:
                os.kill(pid, signal.SIGCONT)
            assert not thread.is_alive()
            before = scene.landed(0, nbytes).copy()
            time.sleep(1.0)
            assert np.array_equal(scene.landed(0, nbytes), before), "bytes arrived after the read had given up"
            assert bool(lost) == self.reads_need_the_source
            if not lost:
                assert np.array_equal(before, content(0, nbytes))

    @pytest.mark.parametrize("description", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version":1}'])
    def test_nonsense_is_no_description(self, description: bytes) -> None:
        with self.scene() as scene, pytest.raises(SourceUnreachable, match="stranger"):
            scene.reader.connect(description, "stranger", soon())

    def test_closing_twice_and_what_is_refused_afterwards(self) -> None:
        with self.scene() as scene:
            batch = strided(scene.source.address[0], scene.here, 10, [], [], [])
            scene.read(batch)
            scene.reader.close()
            scene.reader.close()
            with pytest.raises((HostError, PlanError)):
                scene.read(batch)

    def test_an_unknown_peer_is_named(self) -> None:
        with self.scene() as scene, pytest.raises(PlanError, match="nobody"):
            scene.reader.read("nobody", strided(scene.source.address[0], scene.here, 10, [], [], []), Deadline.after(5))

    def test_limits_make_sense(self) -> None:
        reader = self.reader()
        limits = reader.limits
        reader.close()
        assert min(limits.operation_nbytes, limits.max_batch_nbytes) > 0
        assert limits.max_operations >= 0


def regions_of(buffers: Sequence[Bytes]) -> list[Region]:
    return [Region(int(b.ctypes.data), b.nbytes) for b in buffers if b.nbytes]
