"""Transcripts in `directory/*.txt`: what is said to a `Directory` and a `Ballot`, and, indented, what comes of it.

Rewrite them with `python tests/golden/test_transcripts.py` and read the difference before committing it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peerload.directory import Aborted, Agreed, Ballot, Directory, Event, Outcome, Record, Round
from peerload.errors import PeerloadError
from peerload.manifest import ModelKey, SourceId

FOLDER = Path(__file__).parent / "directory"


class Stage:
    """`t=SECONDS COMMAND`, one a line:

    announce MODEL INSTANCE/RANK GENERATION ttl=S [body=TEXT]   renew|withdraw INSTANCE/RANK GENERATION
    expire   list MODEL   crash   restart   vote|abort|ask GROUP#ROUND RANK/SIZE TEXT
    """

    def __init__(self) -> None:
        self.directory, self.ballot = Directory(fence_s=1000), Ballot(keep_s=1000, decision_s=8000)
        self.generations: dict[SourceId, bool] = {}
        self.stored: list[tuple[Record, float]] = []

    def say(self, line: str) -> list[str]:
        match = re.fullmatch(r"t=([\d.]+) +(\w+) *(.*)", line)
        assert match is not None, f"not understood: {line}"
        now_s, words = float(match[1]), match[3].split()
        try:
            return getattr(self, match[2])(now_s, *words)
        except PeerloadError as error:
            return [f"{type(error).__name__}: {error.message}"]

    def announce(self, now_s: float, model: str, seat: str, generation: str, ttl: str, body: str = "body=") -> list[str]:
        source = source_of(seat, generation)
        record = Record(ModelKey(model), source, body.removeprefix("body=").encode())
        events = self.directory.announce(record, float(ttl.removeprefix("ttl=")), now_s)
        for other in self.generations:
            self.generations[other] |= (other.instance, other.rank) == (source.instance, source.rank)
        self.generations[source] = False
        return told(events)

    def renew(self, now_s: float, seat: str, generation: str) -> list[str]:
        return [f"until {self.directory.renew(source_of(seat, generation), now_s).expires_s:g}"]

    def withdraw(self, now_s: float, seat: str, generation: str) -> list[str]:
        return told(self.directory.withdraw(source_of(seat, generation), now_s))

    def expire(self, now_s: float) -> list[str]:
        return told(self.directory.expire(now_s)) + [f"forgotten {key}" for key in self.ballot.expire(now_s)]

    def list(self, now_s: float, model: str) -> list[str]:
        leases = self.directory.leases(now_s, ModelKey(model))
        return [f"{name(x.record)} {x.record.body.decode()} until {x.expires_s:g}" for x in leases] or ["nobody"]

    def crash(self, now_s: float) -> list[str]:
        self.stored = [(lease.record, lease.ttl_s) for lease in self.directory.leases(now_s)]
        return [f"{len(self.stored)} leases stored"]

    def restart(self, now_s: float) -> list[str]:
        self.directory = Directory(fence_s=1000)
        self.directory.restore(self.generations.items(), self.stored, now_s)
        return [f"{len(self.stored)} leases restored"]

    def vote(self, now_s: float, key: str, rank: str, payload: str) -> list[str]:
        return [outcome(self.ballot.vote(*ballot_words(key, rank), payload.encode(), now_s))]

    def abort(self, now_s: float, key: str, rank: str, *reason: str) -> list[str]:
        return [outcome(self.ballot.abort(*ballot_words(key, rank), " ".join(reason), now_s))]

    def ask(self, now_s: float, key: str, rank: str) -> list[str]:
        told = self.ballot.ask(*ballot_words(key, rank)[:2], now_s)
        return ["no such vote is known"] if told is None else [outcome(told)]


def source_of(seat: str, generation: str) -> SourceId:
    instance, _, rank = seat.partition("/")
    return SourceId(instance, int(rank), generation)


def ballot_words(key: str, rank: str) -> tuple[Round, int, int]:
    group, _, number = key.partition("#")
    return Round(group, int(number)), *map(int, rank.split("/"))  # type: ignore[return-value]


def name(record: Record) -> str:
    return f"{record.source.instance}/{record.source.rank} {record.source.generation}"


def told(events: list[Event]) -> list[str]:
    return [f"{event.change} {event.record.model} {name(event.record)}" for event in events] or ["no event"]


def outcome(result: Outcome) -> str:
    if isinstance(result, Agreed):
        return f"agreed on {b' '.join(result.payloads).decode()}"
    if isinstance(result, Aborted):
        return f"aborted by rank {result.rank}: {result.reason}"
    return f"waiting for rank {', '.join(map(str, result.missing))}"


def played(text: str) -> str:
    """The transcript with what comes of it now."""
    stage, out = Stage(), []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        out.append(line)
        if line.startswith("t="):
            out += [f"    {answer}" for answer in stage.say(line)]
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert played(text) == text


if __name__ == "__main__":
    for path in FOLDER.glob("*.txt"):
        path.write_text(played(path.read_text(encoding="utf-8")), encoding="utf-8")
