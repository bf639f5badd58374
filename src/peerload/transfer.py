"""Carrying out a plan: every source read by its own thread, step by step, so that a lost source loses only its own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Protocol, runtime_checkable

import numpy as np

from .batch import Batch
from .deadline import Deadline
from .errors import SourceError, SourceStale, SourceUnreachable
from .geometry import IntArray
from .lower import Step, lower
from .manifest import FENCE_NBYTES, Offer, SourceId
from .memory import Arena
from .plan import Plan
from .space import HOST, Space
from .transport.base import Mappable, Region, Transport
from .transport.deferred import Deferred
from .transport.files import FilesTransport

#: Sources read at the same time. Each has its own share of the staging memory.
WORKERS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """undone: rows of the plan that are not (or not surely) in place. failures: why, by source.

    wire_nbytes and operations count what was asked of the transports for steps that succeeded, attached_nbytes what of it
    was mapped instead of moved."""

    undone: IntArray
    undone_opaques: tuple[int, ...]
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


class Reader:
    """Reads plans into one rank's buffers. Owns connections and staging memory; the transports stay the caller's.

    arena: holds all the buffers, and may have a peer's pages mapped into it (None: everything is copied). space: where the
    buffers lie."""

    def __init__(
        self, transports: Mapping[str, Transport], staging_nbytes: int, arena: Arena | None = None, space: Space = HOST
    ) -> None:
        self._transports, self._arena, self._space = transports, arena, space
        needed = any(not transport.limits.strided for transport in transports.values())
        self._share = staging_nbytes // WORKERS if needed else 0
        self._staging = Arena(WORKERS * (self._share + 4096))
        self._slots = [self._staging.allocate(self._share + 4096, 4096) for _ in range(WORKERS)]
        self._peers: dict[SourceId, tuple[Transport, str]] = {}
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
        """Do the plan's copies into buffers at `address`. Sources that fail are reported, not raised; DeadlineExceeded is
        raised after all threads have stopped."""
        failures: dict[SourceId, SourceError] = {}
        routes: dict[str, set[int]] = {}
        for i in np.unique(np.append(plan.offer, [o for _, o, _ in plan.opaque])).astype(int).tolist():
            try:
                transport, _ = self._reach(plan.offers[i])
                routes.setdefault(transport.name, set()).add(i)
            except SourceError as error:
                failures[plan.offers[i].source] = error
        parts = [lower(plan, self._transports[n].limits, address, self._share, frozenset(only)) for n, only in routes.items()]
        steps: dict[int, list[Step]] = {}
        for step in (s for part in parts for s in part.steps):
            steps.setdefault(step.offer, []).append(step)
        free, undone = list(self._slots), {i for i, o in enumerate(plan.offers) if o.source in failures}
        lost: list[IntArray] = [np.flatnonzero(np.isin(plan.offer, sorted(undone)))]
        attached = dict.fromkeys(steps, 0)
        lost_opaques = [row for row, o, _ in plan.opaque if o in undone]
        stop = Event()

        def drain(i: int) -> int:
            """All steps of offer i; returns how many were done."""
            offer = plan.offers[i]
            with self._lock:
                slot = free.pop()
            done = 0
            try:
                transport, peer = self._reach(offer)
                self._check_fence(transport, peer, offer, slot, deadline)
                for step in steps[i]:
                    if stop.is_set():
                        return 0
                    attached[i] += self._step(transport, peer, step, slot + 4096, deadline)
                    done += 1
                    on_bytes(step.wire.nbytes)
                self._check_fence(transport, peer, offer, slot, deadline)
            except SourceStale as error:
                failures[offer.source], done = error, 0  # nothing it gave can be trusted
            except SourceError as error:
                failures[offer.source] = error
            finally:
                with self._lock:
                    free.append(slot)
            return done

        with ThreadPoolExecutor(min(WORKERS, max(1, len(steps))), "peerload-read") as pool:
            try:
                done = dict(zip(steps, pool.map(drain, steps), strict=True))
            except BaseException:
                stop.set()  # nobody will use what the other threads read
                raise
        for i, mine in steps.items():
            for step in mine[done[i] :]:
                lost.append(step.copies[step.copies >= 0])
                lost_opaques += [plan.opaque[-1 - k][0] for k in step.copies[step.copies < 0].tolist()]
        finished = [s for i, mine in steps.items() for s in mine[: done[i]]]
        return Outcome(
            np.unique(np.concatenate(lost)), tuple(sorted(set(lost_opaques))), failures,
            sum(s.wire.nbytes for s in finished), sum(s.operations for s in finished),
            max((p.staging_nbytes for p in parts), default=0),
            sum(attached[i] for i in steps if done[i]),
        )  # fmt: skip

    def _step(self, transport: Transport, peer: str, step: Step, staging: int, deadline: Deadline) -> int:
        """Bytes that were attached."""
        if step.scatter is None:
            left = step.wire
            if self._arena is not None and isinstance(transport, Attaches) and self._unpinned():
                left = transport.attach(peer, left, self._arena)
            transport.read(peer, left, deadline)
            return step.wire.nbytes - left.nbytes
        transport.read(peer, _moved(step.wire, dst=staging), deadline)
        self._space.copy(_moved(step.scatter, src=staging))
        return 0

    def _unpinned(self) -> bool:
        """No transport may have handed our pages to a device, which would go on using them after they were replaced."""
        return all(
            isinstance(t, Attaches | FilesTransport) or (isinstance(t, Deferred) and not t.started)
            for t in self._transports.values()
        )

    def _reach(self, offer: Offer) -> tuple[Transport, str]:
        """Connect over the first of our transports that works, once per source."""
        with self._lock:
            known = self._peers.get(offer.source)
        if known is not None:
            return known
        described = {e.transport: e.description for e in offer.binding.endpoints}
        problems = []
        for name, transport in self._transports.items():
            if name in described:
                try:
                    peer = transport.connect(described[name], str(offer.source))
                except SourceUnreachable as error:
                    problems.append(f"{name}: {error.problem}")
                else:
                    with self._lock:
                        self._peers[offer.source] = transport, peer
                    return transport, peer
        raise SourceUnreachable(
            str(offer.source),
            "; ".join(problems)
            or f"it offers {', '.join(described) or 'no transport'}, here is {', '.join(self._transports) or 'none'}",
            next_step="run `peerload doctor` on both hosts",
        )

    def _check_fence(self, transport: Transport, peer: str, offer: Offer, slot: int, deadline: Deadline) -> None:
        """Raise SourceStale unless the source's memory still carries the generation it announced."""
        if not offer.binding.fence_address:
            return
        row = np.array([0], np.int64)
        transport.read(peer, Batch.of_runs(row + offer.binding.fence_address, row + slot, row + FENCE_NBYTES), deadline)
        if self._staging.read(slot, FENCE_NBYTES) != fence(offer.source.generation):
            raise SourceStale(str(offer.source), "its weights have changed since it announced them", next_step="discover again")


def fence(generation: str) -> bytes:
    """The 16 bytes a seed keeps in its memory while the weights of `generation` (32 hex digits) are there."""
    return bytes.fromhex(generation)


def _moved(batch: Batch, *, src: int = 0, dst: int = 0) -> Batch:
    return Batch(batch.src + src, batch.dst + dst, batch.run, batch.count, batch.src_step, batch.dst_step)
