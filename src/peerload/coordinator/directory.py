"""Who holds what until when. No I/O, no clock: time is an argument.

`Directory`: model -> instances -> ranks, each under a lease. One (instance, rank) is a seat; the newest generation to
announce itself holds it, every earlier one is fenced off:

    state of (seat, generation)   announce              renew             withdraw    time passes
    unknown                       -> live               LeaseUnknown      nothing     -
    live                          -> live               -> live           -> ended    -> ended after ttl_s
    ended (expired, withdrawn)    -> live               LeaseUnknown      nothing     -> unknown after fence_s
    superseded (a newer came)     LeaseSuperseded       LeaseSuperseded   nothing     -> unknown after fence_s

`now_s` is a reading of any clock that doesn't stop, seconds; the outcome depends on the readings alone, not on how
often `expire` is called. Pure: standard library and NumPy only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from ..errors import LeaseSuperseded, LeaseUnknown, ManifestError
from ..model.catalog import ModelKey
from ..model.offer import SourceId

#: How long a superseded generation is refused, seconds: longer than any process is suspended and resumed.
FENCE_S: Final = 7 * 86400.0


TTL_LIMITS_S: Final = (0.1, 86400.0)


MAX_RANKS: Final = 65536


@dataclass(frozen=True, slots=True)
class Record:
    """What one rank announced. `body` is kept as it came; `blobs` are the digests of the blobs it stands on."""

    model: ModelKey
    source: SourceId
    body: bytes
    blobs: tuple[str, ...] = ()


class Change(StrEnum):
    ANNOUNCED = "announced"
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Event:
    """`record` is now to be read (ANNOUNCED, which replaces an earlier one of its seat) or no longer (all others)."""

    change: Change
    record: Record


@dataclass(frozen=True, slots=True)
class Lease:
    """`record` may be read until `expires_s`, unless renewed. `ttl_s` is what one renewal grants."""

    record: Record
    ttl_s: float
    expires_s: float


Seat = tuple[str, int]


def seat_of(source: SourceId) -> Seat:
    return source.instance, source.rank


@dataclass(slots=True)
class _Holder:
    """`current` is the newest generation of a seat; `ended_s` says since when the others (and it, when it is not
    live) are not offered."""

    current: str
    ended_s: dict[str, float] = field(default_factory=dict)


class Directory:
    """Leases on records. Not thread-safe: the caller holds a lock."""

    def __init__(self, fence_s: float = FENCE_S) -> None:
        self._fence_s = fence_s
        self._leases: dict[Seat, Lease] = {}
        self._of_model: dict[ModelKey, set[Seat]] = {}
        self._holders: dict[Seat, _Holder] = {}
        self._expiries: list[tuple[float, Seat]] = []
        self._fences: list[tuple[float, Seat, str]] = []

    def announce(self, record: Record, ttl_s: float, now_s: float) -> list[Event]:
        """Make `record` readable for `ttl_s` seconds. Announcing the same again renews and reports nothing.

        Raises LeaseSuperseded when a newer generation has taken the seat, ManifestError for a senseless record."""
        _check(record, ttl_s)
        seat, generation = seat_of(record.source), record.source.generation
        self._refuse_superseded(record.source, now_s)
        events = self.expire(now_s)
        held = self._leases.get(seat)
        if held is not None and held.record.source == record.source and held.record.model != record.model:
            raise ManifestError("model", f"is {record.model}, but generation {generation} holds {held.record.model}")
        holder = self._holders.setdefault(seat, _Holder(generation))
        if holder.current != generation:
            if held is not None:
                events.append(Event(Change.SUPERSEDED, held.record))
            self._end(seat, holder.current, now_s)
            holder.current = generation
        holder.ended_s.pop(generation, None)
        if held is None or held.record != record:
            events.append(Event(Change.ANNOUNCED, record))
        self._drop(seat)
        self._grant(record, ttl_s, now_s)
        return events

    def renew(self, source: SourceId, now_s: float) -> Lease:
        """Grant another `ttl_s` from now. Raises LeaseUnknown (announce again) or LeaseSuperseded (stop offering)."""
        lease = self._live(source, now_s)
        if lease is None:
            self._refuse_superseded(source, now_s)
            raise LeaseUnknown(f"no lease is held for {source}, generation {source.generation}", next_step="announce again")
        return self._grant(lease.record, lease.ttl_s, now_s)

    def withdraw(self, source: SourceId, now_s: float) -> list[Event]:
        """End the lease of this generation, if it has one: saying it twice is no error."""
        lease = self._live(source, now_s)
        events = self.expire(now_s)
        if lease is not None:
            seat = seat_of(source)
            self._drop(seat)
            self._end(seat, source.generation, now_s)
            events.append(Event(Change.WITHDRAWN, lease.record))
        return events

    def expire(self, now_s: float) -> list[Event]:
        """Drop the leases that nobody renewed in time, in the order in which they ran out, and forget old fences."""
        events = []
        while self._expiries and self._expiries[0][0] <= now_s:
            at_s, seat = heapq.heappop(self._expiries)
            lease = self._leases.get(seat)
            if lease is not None and lease.expires_s == at_s:
                self._drop(seat)
                self._end(seat, lease.record.source.generation, at_s)
                events.append(Event(Change.EXPIRED, lease.record))
        while self._fences and self._fences[0][0] + self._fence_s <= now_s:
            at_s, seat, generation = heapq.heappop(self._fences)
            holder = self._holders.get(seat)
            if holder is not None and holder.ended_s.get(generation) == at_s:
                del holder.ended_s[generation]
                if not holder.ended_s and seat not in self._leases:
                    del self._holders[seat]
        return events

    def leases(self, now_s: float, model: ModelKey | None = None) -> list[Lease]:
        """Live leases of one model, or of all, by seat."""
        seats = sorted(self._leases if model is None else self._of_model.get(model, ()))
        return [lease for lease in map(self._leases.__getitem__, seats) if lease.expires_s > now_s]

    def restore(self, generations: Iterable[tuple[SourceId, bool]], leases: Iterable[tuple[Record, float]], now_s: float) -> None:
        """Go on after a restart: `generations` are all that were ever announced, each with whether it is superseded,
        `leases` the records that were live with their `ttl_s`. Each gets one full `ttl_s` from now, since nobody
        could renew while the coordinator was away."""
        for source, superseded in generations:
            seat = seat_of(source)
            holder = self._holders.setdefault(seat, _Holder(source.generation))
            if not superseded:
                holder.current = source.generation
            self._end(seat, source.generation, now_s)
        for record, ttl_s in leases:
            self._holders[seat_of(record.source)].ended_s.pop(record.source.generation, None)
            self._grant(record, ttl_s, now_s)

    def _live(self, source: SourceId, now_s: float) -> Lease | None:
        lease = self._leases.get(seat_of(source))
        return lease if lease is not None and lease.record.source == source and lease.expires_s > now_s else None

    def _refuse_superseded(self, source: SourceId, now_s: float) -> None:
        holder = self._holders.get(seat_of(source))
        if holder is None or holder.current == source.generation:
            return
        ended_s = holder.ended_s.get(source.generation)
        if ended_s is not None and ended_s + self._fence_s > now_s:
            raise LeaseSuperseded(
                f"{source}: generation {source.generation} was superseded by {holder.current}",
                next_step="stop offering these weights; if two processes use one instance name, rename one",
            )

    def _grant(self, record: Record, ttl_s: float, now_s: float) -> Lease:
        seat = seat_of(record.source)
        lease = self._leases[seat] = Lease(record, ttl_s, now_s + ttl_s)
        self._of_model.setdefault(record.model, set()).add(seat)
        heapq.heappush(self._expiries, (lease.expires_s, seat))
        if len(self._expiries) > 64 + 4 * len(self._leases):  # mostly renewed: their old entries are dead weight
            self._expiries = sorted((held.expires_s, key) for key, held in self._leases.items())
        return lease

    def _drop(self, seat: Seat) -> None:
        lease = self._leases.pop(seat, None)
        if lease is not None:
            seats = self._of_model[lease.record.model]
            seats.remove(seat)
            if not seats:
                del self._of_model[lease.record.model]

    def _end(self, seat: Seat, generation: str, at_s: float) -> None:
        self._holders[seat].ended_s[generation] = at_s
        heapq.heappush(self._fences, (at_s, seat, generation))


def _check(record: Record, ttl_s: float) -> None:
    low, high = TTL_LIMITS_S
    if not low <= ttl_s <= high:
        raise ManifestError("ttl_s", f"is {ttl_s:g}, must be {low:g} to {high:g} seconds")
    for name, value, longest in (
        ("model.name", record.model.name, 1024),
        ("model.revision", record.model.revision, 1024),
        ("source.instance", record.source.instance, 256),
        ("source.generation", record.source.generation, 256),
    ):
        if len(value) > longest or (not value and name != "model.revision"):
            raise ManifestError(name, f"has {len(value)} characters, must have 1 to {longest}")
    if not 0 <= record.source.rank < MAX_RANKS:
        raise ManifestError("source.rank", f"is {record.source.rank}, must be 0 to {MAX_RANKS - 1}")
