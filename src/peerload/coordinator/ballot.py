"""What the ranks of one target instance agreed on, all or nothing, in numbered rounds. No I/O, no clock: time is an argument.

`now_s` is a reading of any clock that doesn't stop, seconds; the outcome depends on the readings alone. Pure: standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..errors import CoordinatorError, ManifestError
from .directory import MAX_RANKS

#: How long an undecided round is kept that nobody votes or asks in, seconds: a rank that waits asks far more often.
ROUND_S: Final = 3600.0


#: How long a decision is kept after it was last asked for, seconds: longer than any deadline (`config.LONGEST_S`), so that
#: a rank that comes late still hears of it.
DECISION_S: Final = 2 * 86400.0


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

    The ranks of an instance send 32 MiB a round (`exchange.MESSAGE_NBYTES`), and two rounds are kept for a moment."""

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
