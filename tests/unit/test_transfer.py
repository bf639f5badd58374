"""The reader alone: what it says is undone, whom it blames, and that it stops."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peerload.bare import BareRank
from peerload.batch import Batch
from peerload.deadline import Deadline
from peerload.errors import DeadlineExceeded, SourceError, SourceLost, SourceStale, SourceUnreachable
from peerload.lower import lower
from peerload.manifest import FENCE_NBYTES, Binding, Endpoint, Offer, Parallel, SourceId
from peerload.memory import Arena
from peerload.plan import Plan, make_plan
from peerload.testing.layouts import layout, llama
from peerload.transfer import Reader, fence
from peerload.transport.base import Limits
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.files import FileSet, FilesTransport
from peerload.transport.memory import MemoryTransport

MODEL = llama(name="small", hidden=64, inter=160, heads=8, kv_heads=4, head=8, layers=3, vocabulary=200)
SMALL_BATCHES = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=8 << 10)
GENERATION = "0123456789abcdef" * 2


class Room:
    """A target and sources in one process, each source with random bytes."""

    def __init__(self, stack: ExitStack, sources: tuple[str, ...], tp: int = 1, seed_tp: int = 1) -> None:
        self.stack, self.hall = stack, dict[str, MemoryTransport]()
        self.target = self._rank(BareRank.of(layout(MODEL, Parallel(tp=tp), 0)))
        self.here = MemoryTransport(self.hall)
        self.offers, self.fences, self.there = [], {}, {}
        for name in sources:
            for rank in range(seed_tp):
                bare = self._rank(BareRank.of(layout(MODEL, Parallel(tp=seed_tp), rank)))
                view = np.frombuffer(bare.arena.view(bare.arena.address + 4096, bare.arena.used_nbytes - 4096), np.uint8)
                view[:] = np.random.default_rng(1).integers(0, 256, view.size, np.uint8)
                transport = self.there[name] = MemoryTransport(self.hall)
                mark = self.fences[name] = Arena(FENCE_NBYTES)
                stack.callback(mark.close)
                mark.write(mark.fence_address, fence(GENERATION))
                transport.register([bare.arena.region(), mark.region()])
                source = SourceId(name, rank, GENERATION)
                endpoints = (Endpoint("memory", transport.describe()),)
                self.offers.append(Offer(bare.layout, Binding(source, bare.address, endpoints, fence_address=mark.fence_address)))

    def _rank(self, bare: BareRank) -> BareRank:
        self.stack.callback(bare.arena.close)
        return bare

    def reader(
        self, faults: Faults | None = None, limits: Limits = SMALL_BATCHES, staging_nbytes: int = 0, keep_unfenced: bool = False
    ) -> Reader:
        transport = Faulty(self.here, faults or Faults(source="nobody"))
        transport.limits = limits
        reader = self.stack.enter_context(Reader({"memory": transport}, staging_nbytes, keep_unfenced=keep_unfenced))
        self.here.register([self.target.arena.region(), *reader.regions()])
        return reader

    def plan(self) -> Plan:
        return make_plan(self.target.layout, self.offers, salt="x")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def soon() -> Deadline:
    return Deadline.after(20)


@pytest.mark.parametrize(("tp", "seed_tp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("strided", [True, False])
def test_steps_name_just_the_copies_they_carry(stack: ExitStack, tp: int, seed_tp: int, strided: bool) -> None:
    """Or a source that is lost near its end would take everything back."""
    room = Room(stack, ("a",), tp, seed_tp)
    plan = room.plan()
    limits = replace(SMALL_BATCHES, strided=strided)
    bytes_of = [_written(plan, room, [i]) for i in range(len(plan))]
    for step in lower(plan, limits, room.target.address, 4096).steps:
        batch = step.wire if step.scatter is None else step.scatter
        carried = _cells(batch)
        touched = {i for i, cells in enumerate(bytes_of) if not carried.isdisjoint(cells)}
        assert touched == set(step.copies.tolist())


def _cells(batch: Batch) -> set[int]:
    _, dst, run = batch.runs()
    return {at for a, n in zip(dst.tolist(), run.tolist(), strict=True) for at in range(a, a + n, 2)}


def _written(plan: Plan, room: Room, rows: list[int]) -> set[int]:
    """Destination addresses of copies, by lowering them alone."""
    one = plan.rest(np.array(rows))
    alone = make_plan(one, [plan.offers[int(plan.offer[rows[0]])]])
    cells: set[int] = set()
    for step in lower(alone, Limits(strided=True, operation_nbytes=0), room.target.address, 0).steps:
        cells |= _cells(step.wire)
    return cells


def test_what_a_lost_source_gave_before_is_kept_if_it_will_be_verified(stack: ExitStack) -> None:
    room = Room(stack, ("a",))
    plan = room.plan()
    faults = Faults(source="a/", lost_after_nbytes=plan.nbytes * 9 // 10)
    outcome = room.reader(faults, keep_unfenced=True).read(plan, room.target.address, soon())
    (error,) = outcome.failures.values()
    assert isinstance(error, SourceLost)
    left = plan.rest(outcome.undone).nbytes
    assert 0 < left < 0.3 * plan.nbytes


def test_what_a_lost_source_gave_before_is_dropped_if_nothing_will_prove_it(stack: ExitStack) -> None:
    """Its weights may have changed before it died: its closing fence was never read."""
    room = Room(stack, ("a", "b"))
    plan = room.plan()
    outcome = room.reader(Faults(source="a/", lost_after_nbytes=plan.nbytes * 2 // 5)).read(plan, room.target.address, soon())
    assert [error.source for error in outcome.failures.values()] == ["a/rank 0"]
    assert set(np.flatnonzero(plan.offer == 0).tolist()) == set(outcome.undone.tolist())
    assert outcome.wire_nbytes == plan.rest(np.flatnonzero(plan.offer == 1)).nbytes


def test_a_source_whose_fence_falls_while_it_is_read_gave_nothing(stack: ExitStack) -> None:
    room = Room(stack, ("a", "b"))
    plan = room.plan()
    done = []

    def on_bytes(nbytes: int) -> None:
        done.append(nbytes)
        if len(done) == 3:
            room.fences["a"].write(room.fences["a"].fence_address, bytes(FENCE_NBYTES))

    outcome = room.reader().read(plan, room.target.address, soon(), on_bytes)
    (error,) = outcome.failures.values()
    assert isinstance(error, SourceStale)
    assert error.source == "a/rank 0"
    assert set(plan.offer[outcome.undone].tolist()) == {0}
    assert set(np.flatnonzero(plan.offer == 0).tolist()) == set(outcome.undone.tolist())


def test_an_error_of_ours_stops_all_threads(stack: ExitStack) -> None:
    room = Room(stack, ("a", "b", "c"))
    reads = []

    def on_bytes(nbytes: int) -> None:
        reads.append(threading.current_thread().name)
        if len(reads) == 5:
            raise RuntimeError("no")

    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="no"):
        room.reader(Faults(delay_s=0.05)).read(room.plan(), room.target.address, soon(), on_bytes)
    assert time.monotonic() - begun_s < 2
    count = len(reads)
    time.sleep(0.2)
    assert len(reads) == count


def test_the_deadline_ends_all_threads(stack: ExitStack) -> None:
    room = Room(stack, ("a", "b"))
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"reading .* from [ab]/rank 0"):
        room.reader(Faults(delay_s=5.0)).read(room.plan(), room.target.address, Deadline.after(0.5))
    assert time.monotonic() - begun_s < 2


def test_a_source_out_of_reach_is_blamed_and_the_others_are_read(stack: ExitStack) -> None:
    room = Room(stack, ("a", "b"))
    room.there["a"].close()
    plan = room.plan()
    outcome = room.reader().read(plan, room.target.address, soon())
    (error,) = outcome.failures.values()
    assert isinstance(error, SourceUnreachable)
    assert error.source == "a/rank 0"
    assert "memory: is not in this process" in error.message
    assert "doctor" in error.next_step
    assert set(plan.offer[outcome.undone].tolist()) == {0}


def test_no_common_transport_is_said(stack: ExitStack) -> None:
    room = Room(stack, ("a",))
    binding = replace(room.offers[0].binding, endpoints=(Endpoint("pigeons", b""),))
    plan = make_plan(room.target.layout, [Offer(room.offers[0].layout, binding)])
    (error,) = room.reader().read(plan, room.target.address, soon()).failures.values()
    assert "it offers pigeons; from a peer this process uses memory" in error.message


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "a generation that is not hexadecimal": ({"generation": "not-hex-0"}, "32 hexadecimal digits"),
    "a generation that is too long": ({"generation": "ab" * 40}, "32 hexadecimal digits"),
    "a generation outside ASCII": ({"generation": "\u0663" * 32}, "32 hexadecimal digits"),
    "no fence": ({"fence_address": 0}, "no fence"),
    "a fence outside its memory": ({"fence_address": 1 << 62}, "no single region"),
    "a fence at the end of all memory": ({"fence_address": (1 << 63) - 1}, "no single region"),
    "addresses outside its memory": ({"address": 1 << 59}, "no single region"),
    "addresses at the end of all memory": ({"address": (1 << 63) - 1}, "no single region"),
    "addresses of zero": ({"address": 0}, "no single region"),
    "no endpoints": ({"endpoints": ()}, "no transport"),
    "an endpoint that makes no sense": ({"endpoints": (Endpoint("memory", b"\xff"),)}, "not in this process"),
    "an endpoint of files": ({"endpoints": (Endpoint("files", b"{}"),)}, "from a peer this process uses memory"),
}


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize(("changes", "problem"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_peer_that_announces_nonsense_fails_alone(
    stack: ExitStack, changes: dict[str, object], problem: str, strided: bool
) -> None:
    room = Room(stack, ("a", "b"))
    offer = room.offers[0]
    changes = dict(changes)
    generation = str(changes.pop("generation", GENERATION))
    if "address" in changes:
        changes["address"] = np.full(len(offer.binding.address), changes["address"])
    binding = replace(offer.binding, source=SourceId("a", 0, generation), **changes)  # type: ignore[arg-type]
    plan = make_plan(room.target.layout, [Offer(offer.layout, binding), room.offers[1]], salt="x")
    limits = replace(SMALL_BATCHES, strided=strided)
    outcome = room.reader(limits=limits, staging_nbytes=1 << 20).read(plan, room.target.address, soon())
    (error,) = outcome.failures.values()
    assert isinstance(error, SourceError)
    assert error.source == "a/rank 0"
    assert problem in error.message
    assert set(plan.offer[outcome.undone].tolist()) == {0}


def test_a_file_that_a_peer_names_is_never_opened(stack: ExitStack, tmp_path: Path) -> None:
    """Only this process's own reserve is read from disk, whatever name a peer gives itself."""
    room = Room(stack, ())
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(room.target.arena.used_nbytes))
    files = FileSet.of([secret])
    layout_ = room.target.layout
    address = np.cumsum(layout_.buffer_nbytes) - layout_.buffer_nbytes + files.base[0]
    transport = stack.enter_context(closing(FilesTransport(threads=1)))
    binding = Binding(SourceId("disk", 0, GENERATION), address, (Endpoint("files", files.encode()),))
    mine, theirs = Offer(layout_, binding), Offer(layout_, replace(binding))
    reader = stack.enter_context(Reader({"files": transport}, 0, reserve=[mine], keep_unfenced=True))
    transport.register([room.target.arena.region(), *reader.regions()])
    os.utime(secret, ns=(1, files.mtime_ns[0]))
    before = secret.stat().st_atime_ns
    (error,) = reader.read(make_plan(layout_, [theirs]), room.target.address, soon()).failures.values()
    assert "it offers files; from a peer this process uses none" in error.message
    assert secret.stat().st_atime_ns == before
    assert not reader.read(make_plan(layout_, [], reserve=[mine]), room.target.address, soon()).failures


class Wedged(MemoryTransport):
    """Sources whose names begin with w don't answer."""

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        if source.startswith("w"):
            time.sleep(deadline.remaining_s)
            raise SourceUnreachable(source, "it does not answer")
        return super().connect(description, source, deadline)


def test_sources_that_do_not_answer_are_waited_for_all_at_once(stack: ExitStack) -> None:
    room = Room(stack, ("w0", "w1", "w2", "w3", "w4", "b"))
    transport = Wedged(room.hall)
    reader = stack.enter_context(Reader({"memory": transport}, 0, stall_s=1.0))
    transport.register([room.target.arena.region(), *reader.regions()])
    began: list[float] = []
    begun_s = time.monotonic()
    outcome = reader.read(room.plan(), room.target.address, soon(), lambda _: began.append(time.monotonic() - begun_s))
    assert len(outcome.failures) == 5
    assert time.monotonic() - begun_s < 3.0
    assert began[0] < 0.9, "who answers is read while others are waited for"
    with pytest.raises(DeadlineExceeded, match="connecting to w"):
        stack.enter_context(Reader({"memory": transport}, 0)).read(room.plan(), room.target.address, Deadline.after(0.2))


def test_a_strided_transport_needs_no_staging_memory(stack: ExitStack) -> None:
    room = Room(stack, ("a",))
    assert sum(r.nbytes for r in room.reader(staging_nbytes=64 << 20).regions()) < 1 << 20


@pytest.mark.parametrize("staging_nbytes", [16 << 10, 1 << 20])
def test_staged_reads_are_exact(stack: ExitStack, staging_nbytes: int) -> None:
    room = Room(stack, ("a", "b"), tp=2)
    plan = room.plan()
    runs = Limits(strided=False, operation_nbytes=4096, max_batch_nbytes=1 << 20)
    direct = room.reader()
    direct.read(plan, room.target.address, soon())
    arena = room.target.arena
    right = arena.read(arena.address + 4096, arena.used_nbytes - 4096)
    arena.write(arena.address + 4096, bytes(len(right)))
    outcome = room.reader(limits=runs, staging_nbytes=staging_nbytes).read(plan, room.target.address, soon())
    assert not outcome.failures
    assert 0 < outcome.staging_nbytes <= staging_nbytes // 4
    assert outcome.wire_nbytes > plan.nbytes
    assert arena.read(arena.address + 4096, arena.used_nbytes - 4096) == right


def test_the_fence_is_16_bytes_of_the_generation() -> None:
    assert fence(GENERATION).hex() == GENERATION
    assert len(fence(GENERATION)) == FENCE_NBYTES
