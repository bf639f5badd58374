"""Carrying out a plan: every source read by its own thread, step by step, so that a lost source loses only its own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Final, Protocol, runtime_checkable

import numpy as np

from ..deadline import Deadline
from ..errors import SourceError, SourceStale, SourceUnreachable
from ..memory.arena import Arena
from ..memory.region import Mappable, Region
from ..memory.space import HOST, Space
from ..model.boxes import IntArray
from ..model.offer import FENCE_NBYTES, Offer, SourceId, fence
from ..planning.batch import Batch
from ..planning.lower import Step, lower
from ..planning.plan import Plan
from ..transport.base import Transport
from ..transport.files import FilesTransport

#: Sources read at the same time. Each has its own share of the staging memory.
WORKERS: Final = 4
#: Sources connected to at the same time, and the seconds each of them has to answer.
CONNECTING: Final = 64
CONNECT_S: Final = 5.0
#: A share of the staging memory begins with a page of its own, into which fences are read.
PAGE_NBYTES: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """undone: rows of the plan that are not (or not surely) in place. failures: why, by source.

    wire_nbytes and operations count what was asked of the transports for steps that succeeded, attached_nbytes what of it
    was mapped instead of moved."""

    undone: IntArray
    failures: Mapping[SourceId, SourceError]
    wire_nbytes: int
    operations: int
    staging_nbytes: int
    attached_nbytes: int


@runtime_checkable
class Attaches(Protocol):
    """A transport that can map a peer's memory in place of ours."""

    def attach(self, peer: str, batch: Batch, arena: Mappable) -> Batch:
        """Map what can be of `batch`, whose destinations lie in `arena`; returns the rest, to be read. Raises as `read` does."""


@dataclass(slots=True)
class _Portion:
    """What a plan asks of one source: offer `offer` of the plan. The first `done` steps are in place."""

    offer: int
    steps: tuple[Step, ...] = ()
    done: int = 0
    staging_nbytes: int = 0
    attached_nbytes: int = 0
    failure: SourceError | None = None

    def undone(self, plan: Plan) -> IntArray:
        """Rows of the plan that are not all in place."""
        if self.done == 0:
            return np.flatnonzero(plan.offer == self.offer)
        return np.concatenate([np.zeros(0, np.int64), *(step.copies for step in self.steps[self.done :])])


class Reader:
    """Reads plans into one rank's buffers. Owns connections and staging memory; the transports stay the caller's.

    arena: holds all the buffers, and may have a peer's pages mapped into it (None: everything is copied). space: where the
    buffers lie. reserve: offers that this process has made itself; transport `files` reads nobody else's. stall_s: a source that
    hasn't answered for so long is not waited for.
    keep_unfenced: keep what came from a source that was lost before its closing fence was read, because it will be verified.
    Otherwise nothing counts whose source hasn't shown at the end that it still holds what it announced."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        staging_nbytes: int,
        arena: Arena | None = None,
        space: Space = HOST,
        *,
        reserve: Sequence[Offer] = (),
        stall_s: float = CONNECT_S,
        keep_unfenced: bool = False,
    ) -> None:
        self._transports, self._space, self._reserve = transports, space, reserve
        self._arena = None if any(transport.limits.pins for transport in transports.values()) else arena
        self._connect_s, self._keep_unfenced = min(CONNECT_S, stall_s), keep_unfenced
        needed = any(not transport.limits.strided for transport in transports.values())
        self._share = staging_nbytes // WORKERS if needed else 0
        self._staging = Arena(WORKERS * (self._share + PAGE_NBYTES))
        self._slots: SimpleQueue[int] = SimpleQueue()
        for _ in range(WORKERS):
            self._slots.put(self._staging.allocate(self._share + PAGE_NBYTES, PAGE_NBYTES))
        self._peers: dict[Offer, tuple[Transport, str]] = {}
        self._lock = Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._staging.close()

    def regions(self) -> list[Region]:
        """Memory of ours that transports must know, besides the destination buffers."""
        return [self._staging.region()]

    def read(
        self, plan: Plan, address: IntArray, deadline: Deadline, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Outcome:
        """Do the plan's copies into buffers at `address` [buffers]. Sources that fail are reported, not raised; DeadlineExceeded
        is raised after all threads have stopped."""
        parts = [_Portion(i) for i in np.unique(plan.offer).tolist()]
        stop = Event()

        def drain(part: _Portion) -> None:
            try:
                self._drain(part, plan, address, deadline, on_bytes, stop)
            except BaseException:
                stop.set()  # nobody will use what the other threads read
                raise

        with ThreadPoolExecutor(min(CONNECTING, max(1, len(parts))), "peerload-read") as pool:
            futures = [pool.submit(drain, part) for part in parts]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                raise
        return _outcome(plan, parts)

    def _drain(
        self,
        part: _Portion,
        plan: Plan,
        address: IntArray,
        deadline: Deadline,
        on_bytes: Callable[[int], None],
        stop: Event,
    ) -> None:
        """All that one source is asked for, unless `stop` is set. Its failure is noted in `part`."""
        offer = plan.offers[part.offer]
        try:
            transport, peer = self._reach(offer, deadline)
            lowered = lower(plan, transport.limits, address, self._share, part.offer)
            part.steps, part.staging_nbytes = lowered.steps, lowered.staging_nbytes
            with self._slot(deadline) as slot:
                self._check_fence(transport, peer, offer, slot, deadline)
                for step in part.steps:
                    if stop.is_set():
                        return
                    part.attached_nbytes += self._step(transport, peer, step, slot + PAGE_NBYTES, deadline)
                    part.done += 1
                    on_bytes(step.wire.nbytes)
                self._check_fence(transport, peer, offer, slot, deadline)
        except SourceError as error:
            part.failure = error
            if isinstance(error, SourceStale) or not self._keep_unfenced:
                part.done = part.attached_nbytes = 0  # nobody vouches for what it gave

    @contextmanager
    def _slot(self, deadline: Deadline) -> Iterator[int]:
        """A share of the staging memory, for one source at a time."""
        try:
            slot = self._slots.get(timeout=deadline.remaining_s)
        except Empty:
            deadline.check("waiting for other sources to be read")
            raise
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def _step(self, transport: Transport, peer: str, step: Step, staging: int, deadline: Deadline) -> int:
        """Bytes that were attached."""
        if step.scatter is None:
            left = step.wire
            if self._arena is not None and isinstance(transport, Attaches):
                left = transport.attach(peer, left, self._arena)
            transport.read(peer, left, deadline)
            return step.wire.nbytes - left.nbytes
        transport.read(peer, _moved(step.wire, dst=staging), deadline)
        self._space.copy(_moved(step.scatter, src=staging))
        return 0

    def _reach(self, offer: Offer, deadline: Deadline) -> tuple[Transport, str]:
        """Connect over the first of our transports that works, once per offer."""
        with self._lock:
            known = self._peers.get(offer)
        if known is not None:
            return known
        own = any(offer is mine for mine in self._reserve)
        described = {e.transport: e.description for e in offer.binding.endpoints}
        usable = {n: t for n, t in self._transports.items() if own or n != FilesTransport.name}
        if not own:
            self._check_announced(offer)
        problems = []
        for name, transport in usable.items():
            if name not in described:
                continue
            try:
                peer = transport.connect(described[name], str(offer.source), deadline.within(self._connect_s))
            except SourceUnreachable as error:
                deadline.check(f"connecting to {offer.source}")
                problems.append(f"{name}: {error.problem}")
                continue
            with self._lock:
                self._peers[offer] = transport, peer
            return transport, peer
        raise SourceUnreachable(
            str(offer.source),
            "; ".join(problems)
            or f"it offers {', '.join(described) or 'no transport'}; from a peer this process uses {', '.join(usable) or 'none'}",
            next_step="run `peerload doctor` on both hosts",
        )

    def _check_announced(self, offer: Offer) -> None:
        """Raise SourceUnreachable for a peer whose words about its fence can't be used."""
        try:
            usable = len(fence(offer.source.generation)) == FENCE_NBYTES
        except ValueError:
            usable = False
        if offer.binding.fence_address and not usable:
            raise SourceUnreachable(str(offer.source), "its generation is not 32 hexadecimal digits")
        if not offer.binding.fence_address and not self._keep_unfenced:
            raise SourceUnreachable(
                str(offer.source),
                "it has no fence, and without verification nothing else shows that its weights stay",
                next_step="set verify to on",
            )

    def _check_fence(self, transport: Transport, peer: str, offer: Offer, slot: int, deadline: Deadline) -> None:
        """Raise SourceStale unless the source's memory still carries the generation it announced."""
        if not offer.binding.fence_address:
            return
        row = np.array([0], np.int64)
        transport.read(peer, Batch.of_runs(row + offer.binding.fence_address, row + slot, row + FENCE_NBYTES), deadline)
        if self._staging.read(slot, FENCE_NBYTES) != fence(offer.source.generation):
            raise SourceStale(str(offer.source), "its weights have changed since it announced them", next_step="discover again")


def _outcome(plan: Plan, parts: Sequence[_Portion]) -> Outcome:
    finished = [step for part in parts for step in part.steps[: part.done]]
    return Outcome(
        np.unique(np.concatenate([np.zeros(0, np.int64), *(part.undone(plan) for part in parts)])),
        {plan.offers[part.offer].source: part.failure for part in parts if part.failure is not None},
        sum(step.wire.nbytes for step in finished),
        sum(step.operations for step in finished),
        max((part.staging_nbytes for part in parts), default=0),
        sum(part.attached_nbytes for part in parts),
    )


def _moved(batch: Batch, *, src: int = 0, dst: int = 0) -> Batch:
    return Batch(batch.src + src, batch.dst + dst, batch.run, batch.count, batch.src_step, batch.dst_step)
