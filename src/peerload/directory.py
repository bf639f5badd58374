"""Who holds what until when, and what the ranks of one instance agreed on. No I/O, no clock: time is an argument.

`Directory`: model -> instances -> ranks, each under a lease. One (instance, rank) is a seat; the newest generation to
announce itself holds it, every earlier one is fenced off:

    state of (seat, generation)   announce              renew             withdraw    time passes
    unknown                       -> live               LeaseUnknown      nothing     -
    live                          -> live               -> live           -> ended    -> ended after ttl_s
    ended (expired, withdrawn)    -> live               LeaseUnknown      nothing     -> unknown after fence_s
    superseded (a newer came)     LeaseSuperseded       LeaseSuperseded   nothing     -> unknown after fence_s

`Ballot`: all-or-nothing agreement of the ranks of one target instance, in numbered rounds.

`now_s` is a reading of any clock that doesn't stop, seconds; the outcome depends on the readings alone, not on how
often `expire` is called. Pure: standard library and NumPy only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from .errors import CoordinatorError, LeaseSuperseded, LeaseUnknown, ManifestError
from .manifest import ModelKey, SourceId

#: How long a superseded generation is refused, seconds: longer than any process is suspended and resumed.
FENCE_S: Final = 7 * 86400.0
#: How long an undecided round is kept that nobody votes or asks in, seconds: a rank that waits asks far more often.
ROUND_S: Final = 3600.0
#: How long a decision is kept after it was last asked for, seconds: longer than any deadline (`config.LONGEST_S`), so that
#: a rank that comes late still hears of it.
DECISION_S: Final = 2 * 86400.0
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
        ("model.name", record.model.name, 1024), ("model.revision", record.model.revision, 1024),
        ("source.instance", record.source.instance, 256), ("source.generation", record.source.generation, 256),
    ):  # fmt: skip
        if len(value) > longest or (not value and name != "model.revision"):
            raise ManifestError(name, f"has {len(value)} characters, must have 1 to {longest}")
    if not 0 <= record.source.rank < MAX_RANKS:
        raise ManifestError("source.rank", f"is {record.source.rank}, must be 0 to {MAX_RANKS - 1}")


@dataclass(frozen=True, slots=True, order=True)
class Round:
    """One question put to the ranks of a group; the same group can agree again under the next number."""

    group: str
    number: int

    def __str__(self) -> str:
        return f"{self.group}, round {self.number}"


@dataclass(frozen=True, slots=True)
class Pending:
    """Ranks whose votes are missing, ascending."""

    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreed:
    """Every rank's payload, by rank."""

    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Aborted:
    """`rank` is the one whose vote decided it."""

    rank: int
    reason: str


Outcome = Pending | Agreed | Aborted


@dataclass(frozen=True, slots=True)
class BallotLimits:
    """What a `Ballot` keeps at most: rounds, open rounds of one group, and bytes of payload, of one group and of all.

    The ranks of an instance send 32 MiB a round (`load.MESSAGE_NBYTES`), and two rounds are kept for a moment."""

    rounds: int = 100_000
    open_rounds: int = 16
    group_nbytes: int = 128 << 20
    nbytes: int = 1 << 30


class BallotFull(CoordinatorError):
    """More is kept already than `BallotLimits` allow; the vote was not counted."""


@dataclass(slots=True)
class _Poll:
    size: int
    touched_s: float
    votes: dict[int, bytes] = field(default_factory=dict)
    decided: Agreed | Aborted | None = None
    nbytes: int = 0


class Ballot:
    """Rounds of votes. Decided when all `size` ranks have voted, or at the first abort; a decision never changes.

    The ranks of a group take one round after the other: when all have agreed on one, the earlier ones are over, and are
    forgotten. Not thread-safe: the caller holds a lock."""

    def __init__(self, keep_s: float = ROUND_S, decision_s: float = DECISION_S, limits: BallotLimits | None = None) -> None:
        self._keep_s, self._decision_s = keep_s, decision_s
        self._limits = limits or BallotLimits()
        self._groups: dict[str, dict[int, _Poll]] = {}
        self._agreed: dict[str, int] = {}  # the last round that a group agreed on
        self._over: list[Round] = []
        self._rounds = self._nbytes = 0

    def check(self, key: Round, rank: int, size: int, payload: bytes | None) -> None:
        """Raise what `vote` (or `abort`: payload None) would raise, and change nothing: ManifestError for a senseless vote or
        a round that is over, BallotFull when there is no room."""
        if not key.group or len(key.group) > 256:
            raise ManifestError("agree.group", f"has {len(key.group)} characters, must have 1 to 256")
        if not 1 <= size <= MAX_RANKS:
            raise ManifestError("agree.size", f"is {size}, must be 1 to {MAX_RANKS}")
        if not 0 <= rank < size:
            raise ManifestError("agree.rank", f"is {rank}, must be 0 to {size - 1}")
        agreed, polls = self._agreed.get(key.group), self._groups.get(key.group, {})
        if agreed is not None and key.number < agreed:
            raise ManifestError("agree.round", f"is {key.number}, but all ranks of {key.group} have gone on to round {agreed}")
        poll = polls.get(key.number)
        if poll is None or (poll.decided is None and rank not in poll.votes):
            self._check_room(key, polls, len(payload or b""))

    def _check_room(self, key: Round, polls: dict[int, _Poll], nbytes: int) -> None:
        limits = self._limits
        if key.number not in polls:
            if self._rounds >= limits.rounds:
                raise BallotFull(f"{self._rounds} rounds of votes are kept already, which is the limit")
            if sum(p.decided is None for p in polls.values()) >= limits.open_rounds:
                raise BallotFull(f"{key.group} has {limits.open_rounds} open rounds already, which is the limit")
        if sum(p.nbytes for p in polls.values()) + nbytes > limits.group_nbytes:
            raise BallotFull(f"the votes of {key.group} have more than {limits.group_nbytes} bytes, which is the limit")
        if self._nbytes + nbytes > limits.nbytes:
            raise BallotFull(f"the votes of all groups have more than {limits.nbytes} bytes, which is the limit")

    def vote(self, key: Round, rank: int, size: int, payload: bytes, now_s: float) -> Outcome:
        """Say yes, with something for the others to know. Voting the same again changes nothing and tells the outcome
        so far. Voting differently, or for another size, aborts an open round and is told Aborted in a decided one: it
        comes from a rank that lost its memory, or from another group of the same name."""
        self.check(key, rank, size, payload)
        poll = self._poll(key, size, now_s)
        refusal = None
        if poll.size != size:
            refusal = Aborted(rank, f"rank {rank} says the group has {size} ranks, an earlier vote said {poll.size}")
        elif poll.votes.get(rank, payload) != payload:
            refusal = Aborted(rank, f"rank {rank} voted twice, differently")
        if refusal is not None:
            if poll.decided is None:
                self._abort(poll, refusal)
            return poll.decided if isinstance(poll.decided, Aborted) else refusal
        if poll.decided is None:
            if rank not in poll.votes:
                poll.votes[rank] = payload
                poll.nbytes += len(payload)
                self._nbytes += len(payload)
            if len(poll.votes) == poll.size:
                poll.decided = Agreed(tuple(poll.votes[r] for r in range(poll.size)))
                self._go_on(key)
        return self._outcome(poll)

    def abort(self, key: Round, rank: int, size: int, reason: str, now_s: float) -> Outcome:
        """Say no. Too late, and then without effect, when all had agreed: the caller is bound by that."""
        self.check(key, rank, size, None)
        poll = self._poll(key, size, now_s)
        if poll.decided is None:
            self._abort(poll, Aborted(rank, reason))
        return self._outcome(poll)

    def ask(self, key: Round, rank: int, now_s: float) -> Outcome | None:
        """The outcome so far for a rank that has voted yes; None when no such vote is known. Keeps the round."""
        poll = self._groups.get(key.group, {}).get(key.number)
        if poll is None or rank not in poll.votes:
            return None
        poll.touched_s = now_s
        return self._outcome(poll)

    def counts(self, key: Round, rank: int, size: int, payload: bytes) -> bool:
        """Whether this yes would change anything: it is new, and the round is undecided."""
        poll = self._groups.get(key.group, {}).get(key.number)
        return poll is None or (poll.decided is None and (poll.size != size or poll.votes.get(rank) != payload))

    def expire(self, now_s: float) -> list[Round]:
        """Forget the rounds that are over, and those that nobody touched for long; returns them."""
        old = [
            Round(group, number)
            for group, polls in self._groups.items()
            for number, poll in polls.items()
            if poll.touched_s + (self._keep_s if poll.decided is None else self._decision_s) <= now_s
        ]
        for key in old:
            self._drop(key)
        over, self._over = self._over, []
        return over + old

    def outcome(self, key: Round) -> Outcome:
        """Raises KeyError for a round that nobody voted in."""
        return self._outcome(self._groups[key.group][key.number])

    def outcomes(self) -> dict[Round, Outcome]:
        return {
            Round(group, number): self._outcome(poll)
            for group, polls in sorted(self._groups.items())
            for number, poll in sorted(polls.items())
        }

    def _poll(self, key: Round, size: int, now_s: float) -> _Poll:
        polls = self._groups.setdefault(key.group, {})
        if key.number not in polls:
            polls[key.number] = _Poll(size, now_s)
            self._rounds += 1
        polls[key.number].touched_s = now_s
        return polls[key.number]

    def _go_on(self, key: Round) -> None:
        """All ranks have agreed on this round, so all have heard how the earlier ones ended."""
        self._agreed[key.group] = key.number
        over = [Round(key.group, number) for number in self._groups[key.group] if number < key.number]
        for earlier in over:
            self._drop(earlier)
        self._over += over

    def _drop(self, key: Round) -> None:
        polls = self._groups[key.group]
        self._nbytes -= polls.pop(key.number).nbytes
        self._rounds -= 1
        if not polls:
            del self._groups[key.group]
            self._agreed.pop(key.group, None)

    def _abort(self, poll: _Poll, refusal: Aborted) -> None:
        """Nobody needs what the others had said; who had voted is still known."""
        poll.decided = refusal
        self._nbytes -= poll.nbytes
        poll.nbytes = 0
        poll.votes = dict.fromkeys(poll.votes, b"")

    @staticmethod
    def _outcome(poll: _Poll) -> Outcome:
        if poll.decided is not None:
            return poll.decided
        return Pending(tuple(r for r in range(poll.size) if r not in poll.votes))
