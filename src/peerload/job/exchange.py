"""What the ranks of one instance tell each other while they load. All hear what all have said, or none goes on.

What another rank sends is checked before it is used: a rank that talks nonsense is named in a CommitError.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import CommitError, CoordinatorError, PeerloadError, reason_of
from ..receipt import Read

log = logging.getLogger(__name__)

#: A payload goes in parts of this size at most, bytes; all ranks' parts together are one message.
PART_NBYTES = (1 << 20) - 1
MESSAGE_NBYTES = 32 << 20
#: A rank that gives up tells the others for so long, while the coordinator restarts, and no longer than until so long after its
#: deadline, seconds.
FAREWELL_S, LATE_S = 30.0, 1.0
#: For so long if it gives up because the coordinator is away, or because a person has interrupted it, seconds.
SHORT_FAREWELL_S = 2.0
#: Doubts that one rank names to the others; they are for people.
DOUBTS = 20


class Group:
    """The seat of rank `rank` among the `size` ranks of the group `name` at the coordinator. Every wait ends at `deadline`.
    A rank without others hears only itself."""

    def __init__(self, name: str, rank: int, size: int, coordinator: CoordinatorClient | None, deadline: Deadline) -> None:
        self.name, self.rank, self.size = name, rank, size
        self._coordinator = coordinator if size > 1 else None
        self._deadline = deadline
        self._round = 0
        self._aborted = False  # by another rank: there is nobody left to be told

    def tell(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank, once all have sent theirs. Raises CommitError if one has given up, and what
        `CoordinatorClient.agree` raises."""
        if self._coordinator is None:
            return [payload]
        step = min(PART_NBYTES, MESSAGE_NBYTES // self.size)
        parts = [payload[at : at + step] for at in range(0, len(payload), step)] or [b""]
        heard: list[bytes] = [b""] * self.size
        more = True
        while more:  # until nobody's payload has another part: its first byte says so
            part = parts.pop(0) if parts else b""
            said = (b"+" if parts else b".") + part
            try:
                answers = self._coordinator.agree(self.name, self._round, self.rank, self.size, said, self._deadline)
            except CommitError:
                self._aborted = True
                raise
            self._round += 1
            heard = [old + new[1:] for old, new in zip(heard, answers, strict=True)]
            more = any(new[:1] == b"+" for new in answers)
        return heard

    def abort(self, error: BaseException) -> None:
        """Let the other ranks know why this one gives up, so that none of them waits or serves. Takes FAREWELL_S at most, and no
        longer than until LATE_S after the deadline."""
        if self._coordinator is None or self._aborted:
            return
        short = isinstance(error, CoordinatorError) or not isinstance(error, Exception)
        late = Deadline(self._deadline.at_s + LATE_S, self._deadline.clock).within(SHORT_FAREWELL_S if short else FAREWELL_S)
        try:
            for number in (self._round, self._round + 1):  # the others may have agreed on this round without our hearing of it
                if late.remaining_s == 0:
                    return  # their own deadlines pass as well
                self._coordinator.abort(self.name, number, self.rank, self.size, reason_of(error), late)
        except PeerloadError as unheard:
            log.warning("peerload: rank %d could not tell the others that it gave up: %s", self.rank, unheard.message)

    def nonsense(self, rank: int, problem: object) -> CommitError:
        """What to raise about a payload of `rank` that no rank of this release sends."""
        return CommitError(
            f"{self.name}: rank {rank} sent what makes no sense: {problem}",
            next_step="start all ranks of an instance with the same version and model; nobody else may use its name",
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one rank has to say about a verdict. doubts: for people. wrong: for each rank the rows of its measurements that have
    to be read again. read: what this rank has received, by source."""

    doubts: Sequence[str]
    wrong: Mapping[int, Sequence[int]]
    read: Mapping[str, Read]

    def encode(self) -> bytes:
        wrong = {str(rank): list(rows) for rank, rows in self.wrong.items() if len(rows)}
        return json.dumps({"doubts": list(self.doubts[:DOUBTS]), "wrong": wrong, "read": dict(self.read)}).encode()

    @classmethod
    def decode(cls, data: bytes, rows: Sequence[int]) -> Judgement:
        """rows: how many measurements each rank has sent. Raises ValueError for what `encode` can't have made."""
        try:
            told = json.loads(data)
            doubts = [str(line) for line in told["doubts"]]
            wrong = {int(rank): [_count(row) for row in found] for rank, found in told["wrong"].items()}
            read = {str(name): Read(_count(nbytes), _count(count)) for name, (nbytes, count) in told["read"].items()}
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"a finding is garbled: {type(error).__name__}: {error}") from error
        for rank, found in wrong.items():
            if not 0 <= rank < len(rows) or any(row >= rows[rank] for row in found):
                raise ValueError(f"a finding names measurements that rank {rank} hasn't sent")
        return cls(doubts, wrong, read)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r:.80} is no count")
    return value
