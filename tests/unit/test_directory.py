"""`Directory` and `Ballot` against oracles that replay the whole history for every answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peerload.config import LONGEST_S
from peerload.directory import (
    DECISION_S,
    Aborted,
    Agreed,
    Ballot,
    BallotFull,
    BallotLimits,
    Change,
    Directory,
    Event,
    Outcome,
    Pending,
    Record,
    Round,
)
from peerload.errors import LeaseSuperseded, LeaseUnknown, ManifestError
from peerload.manifest import ModelKey, SourceId

MODEL = ModelKey("llama", "r1")
FENCE_S = 40.0


def record(source: SourceId, body: bytes = b"", model: ModelKey = MODEL) -> Record:
    return Record(model, source, body)


@dataclass
class Op:
    """What happened, successfully, at `at_s`; a restart concerns every seat."""

    what: str
    at_s: float
    source: SourceId | None = None
    body: bytes = b""
    ttl_s: float = 0.0


class Oracle:
    """Slow and dumb: keeps nothing but the history of one seat."""

    def __init__(self, history: list[Op], seat: tuple[str, int], now_s: float) -> None:
        self.live: Op | None = None
        self.newest: str | None = None
        self.last: str | None = None
        self.ended: dict[str, float] = {}
        self.until_s = 0.0
        seen: list[str] = []
        for op in [*history, Op("now", now_s)]:
            if op.source is not None and (op.source.instance, op.source.rank) != seat:
                continue
            if self.live is not None and self.until_s <= op.at_s:
                self.end(self.until_s)
            self.ended = {g: t for g, t in self.ended.items() if t + FENCE_S > op.at_s}
            if self.live is None and self.newest not in self.ended:
                self.newest = None
            if op.what == "announce":
                assert op.source is not None
                if self.newest is not None:
                    self.ended[self.newest] = op.at_s
                self.live, self.newest, self.last = op, op.source.generation, op.source.generation
                self.ended.pop(self.newest, None)
                self.until_s = op.at_s + op.ttl_s
                seen.append(self.newest)
            elif op.what == "renew":
                assert self.live is not None
                self.until_s = op.at_s + self.live.ttl_s
            elif op.what == "withdraw":
                self.end(op.at_s)
            elif op.what == "restart":
                self.newest = self.last
                self.ended = {g: op.at_s for g in seen if self.live is None or g != self.newest}
                if self.live is not None:
                    self.until_s = op.at_s + self.live.ttl_s

    def end(self, at_s: float) -> None:
        assert self.newest is not None
        self.live = None
        self.ended[self.newest] = at_s

    def superseded(self, generation: str) -> bool:
        return generation != self.newest and generation in self.ended


SEATS = [("a", 0), ("a", 1), ("b", 0)]
sources = st.builds(lambda seat, g: SourceId(*seat, f"g{g}"), st.sampled_from(SEATS), st.integers(0, 3))


class AgainstOracle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(FENCE_S)
        self.history: list[Op] = []
        self.now_s = 0.0
        self.view: dict[tuple[str, int], Record] = {}

    def follow(self, events: list[Event]) -> None:
        """What somebody who only hears the events believes."""
        for event in events:
            seat = (event.record.source.instance, event.record.source.rank)
            if event.change is Change.ANNOUNCED:
                self.view[seat] = event.record
            else:
                assert self.view.pop(seat) == event.record

    def oracle(self, source: SourceId) -> Oracle:
        return Oracle(self.history, (source.instance, source.rank), self.now_s)

    @rule(dt=st.sampled_from([0.0, 1.0, 5.0, 10.0, 39.0, 40.0, 100.0]), swept=st.booleans())
    def pass_time(self, dt: float, swept: bool) -> None:
        self.now_s += dt
        if swept:
            self.follow(self.directory.expire(self.now_s))

    @rule(source=sources, body=st.sampled_from([b"x", b"y"]), ttl_s=st.sampled_from([1.0, 10.0, 60.0]))
    def announce(self, source: SourceId, body: bytes, ttl_s: float) -> None:
        if self.oracle(source).superseded(source.generation):
            with pytest.raises(LeaseSuperseded):
                self.directory.announce(record(source, body), ttl_s, self.now_s)
            return
        self.follow(self.directory.announce(record(source, body), ttl_s, self.now_s))
        self.history.append(Op("announce", self.now_s, source, body, ttl_s))

    @rule(source=sources)
    def renew(self, source: SourceId) -> None:
        oracle = self.oracle(source)
        if oracle.live is not None and oracle.live.source == source:
            self.directory.renew(source, self.now_s)
            self.history.append(Op("renew", self.now_s, source))
        else:
            with pytest.raises(LeaseSuperseded if oracle.superseded(source.generation) else LeaseUnknown):
                self.directory.renew(source, self.now_s)

    @rule(source=sources)
    def withdraw(self, source: SourceId) -> None:
        oracle = self.oracle(source)
        self.follow(self.directory.withdraw(source, self.now_s))
        if oracle.live is not None and oracle.live.source == source:
            self.history.append(Op("withdraw", self.now_s, source))

    @rule()
    def restart(self) -> None:
        self.follow(self.directory.expire(self.now_s))
        held = [(lease.record, lease.ttl_s) for lease in self.directory.leases(self.now_s)]
        announced = {op.source for op in self.history if op.source is not None and op.what == "announce"}
        generations = [(s, s.generation != self.oracle(s).last) for s in announced]
        self.directory = Directory(FENCE_S)
        self.directory.restore(generations, held, self.now_s)
        self.history.append(Op("restart", self.now_s))

    @invariant()
    def same_leases(self) -> None:
        expected = []
        for seat in SEATS:
            oracle = Oracle(self.history, seat, self.now_s)
            if oracle.live is not None and oracle.live.source is not None:
                expected.append((oracle.live.source, oracle.live.body, oracle.until_s))
        leases = self.directory.leases(self.now_s, MODEL)
        assert [(x.record.source, x.record.body, x.expires_s) for x in leases] == expected

    def teardown(self) -> None:
        self.follow(self.directory.expire(self.now_s))
        held = {(x.record.source.instance, x.record.source.rank): x.record for x in self.directory.leases(self.now_s)}
        assert self.view == held


TestAgainstOracle = AgainstOracle.TestCase
TestAgainstOracle.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def poll(votes: list[tuple[int, int, str]]) -> Outcome:
    """(rank, size, what was said, "no" being an abort) in order: the decision, worked out from scratch."""
    said: dict[int, str] = {}
    size = votes[0][1]
    for rank, its_size, text in votes:
        if its_size != size and text != "no":
            return Aborted(rank, f"rank {rank} says the group has {its_size} ranks, an earlier vote said {size}")
        if text == "no":
            return Aborted(rank, "no")
        if said.setdefault(rank, text) != text:
            return Aborted(rank, f"rank {rank} voted twice, differently")
        if len(said) == size:
            return Agreed(tuple(said[r].encode() for r in range(size)))
    return Pending(tuple(r for r in range(size) if r not in said))


@pytest.mark.parametrize("seed", range(300))
def test_ballot_against_oracle(seed: int) -> None:
    draw = random.Random(seed)
    ballot, key, votes = Ballot(), Round("group", 1), []
    for step in range(draw.randrange(1, 12)):
        size = 3 if draw.random() < 0.95 else 4
        rank = draw.randrange(3)
        text = draw.choices([f"yes {rank}", "yes", "no"], [18, 1, 1])[0]
        votes.append((rank, size, text))
        told = ballot.abort(key, rank, size, "no", step) if text == "no" else ballot.vote(key, rank, size, text.encode(), step)
        decision = poll(votes)
        assert ballot.outcome(key) == decision
        if isinstance(decision, Agreed) and text != "no" and (size != 3 or decision.payloads[rank] != text.encode()):
            assert isinstance(told, Aborted)  # a stranger is not part of what was agreed
        else:
            assert told == decision


def test_a_round_is_forgotten_after_its_last_vote_not_its_first() -> None:
    ballot, key = Ballot(keep_s=10), Round("group", 1)
    ballot.vote(key, 0, 2, b"a", 0)
    ballot.vote(key, 0, 2, b"a", 9)
    assert ballot.expire(18.9) == []
    assert ballot.expire(19) == [key]
    assert ballot.vote(key, 1, 2, b"b", 20) == Pending((0,))


def test_a_decision_is_kept_for_longer_than_any_deadline() -> None:
    assert DECISION_S > LONGEST_S
    ballot, key = Ballot(), Round("group", 1)
    ballot.abort(key, 0, 2, "no", 0)
    assert ballot.expire(LONGEST_S) == []
    assert ballot.vote(key, 1, 2, b"b", LONGEST_S) == Aborted(0, "no")


def test_a_round_that_somebody_asks_in_is_kept() -> None:
    ballot, key = Ballot(keep_s=10), Round("group", 1)
    ballot.vote(key, 0, 2, b"a", 0)
    assert ballot.ask(key, 1, 9) is None
    assert ballot.ask(Round("group", 2), 0, 9) is None
    for now_s in (9, 18, 27):
        assert ballot.ask(key, 0, now_s) == Pending((1,))
        assert ballot.expire(now_s) == []
    assert ballot.expire(37) == [key]
    assert ballot.ask(key, 0, 38) is None


def test_when_all_have_agreed_on_a_round_the_earlier_ones_are_over() -> None:
    ballot = Ballot(limits=BallotLimits(group_nbytes=5))
    for number in range(20):  # 2 bytes each would not fit together
        for rank in range(2):
            outcome = ballot.vote(Round("group", number), rank, 2, b"%d" % rank, number)
        assert outcome == Agreed((b"0", b"1"))
    assert list(ballot.outcomes()) == [Round("group", 19)]
    assert ballot.expire(19) == [Round("group", number) for number in range(19)]
    with pytest.raises(ManifestError, match="all ranks of group have gone on to round 19") as caught:
        ballot.vote(Round("group", 3), 0, 2, b"0", 20)
    assert caught.value.field == "agree.round"
    assert ballot.vote(Round("another", 3), 0, 2, b"0", 20) == Pending((1,))


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        (BallotLimits(rounds=2), "2 rounds of votes are kept already"),
        (BallotLimits(open_rounds=1), "a has 1 open rounds already"),
        (BallotLimits(group_nbytes=3), "the votes of a have more than 3 bytes"),
        (BallotLimits(nbytes=5), "the votes of all groups have more than 5 bytes"),
    ],
)
def test_a_ballot_is_bounded(limits: BallotLimits, refused: str) -> None:
    ballot = Ballot(limits=limits)
    ballot.vote(Round("b", 0), 0, 2, b"xx", 0)
    ballot.vote(Round("a", 0), 0, 2, b"xx", 0)
    before = ballot.outcomes()
    with pytest.raises(BallotFull, match=refused):
        ballot.vote(Round("a", 1), 0, 2, b"xx", 0)
    assert ballot.outcomes() == before
    assert ballot.vote(Round("a", 0), 0, 2, b"xx", 0) == Pending((1,))  # saying it again takes no room
    ballot.abort(Round("a", 0), 1, 2, "no", 0)
    ballot.abort(Round("b", 0), 1, 2, "no", 0)
    ballot.expire(DECISION_S)
    assert ballot.vote(Round("a", 1), 0, 2, b"xx", 0) == Pending((1,))


def test_an_abort_needs_no_room_of_its_own() -> None:
    ballot = Ballot(limits=BallotLimits(nbytes=2, group_nbytes=2))
    ballot.vote(Round("a", 0), 0, 2, b"xx", 0)
    with pytest.raises(BallotFull):
        ballot.vote(Round("b", 0), 0, 2, b"x", 0)
    assert ballot.abort(Round("a", 0), 1, 2, "no", 0) == Aborted(1, "no")
    assert ballot.vote(Round("b", 0), 0, 2, b"xx", 0) == Pending((1,))


@pytest.mark.parametrize(
    ("rank", "size", "group", "field"),
    [(2, 2, "g", "agree.rank"), (-1, 2, "g", "agree.rank"), (0, 0, "g", "agree.size"), (0, 1, "", "agree.group")],
)
def test_a_senseless_vote_is_refused_and_leaves_nothing(rank: int, size: int, group: str, field: str) -> None:
    ballot = Ballot()
    with pytest.raises(ManifestError) as caught:
        ballot.vote(Round(group, 0), rank, size, b"", 0)
    assert caught.value.field == field
    assert ballot.outcomes() == {}


@pytest.mark.parametrize(
    ("changed", "ttl_s", "field"),
    [
        (SourceId("", 0, "g1"), 10, "source.instance"),
        (SourceId("a" * 257, 0, "g1"), 10, "source.instance"),
        (SourceId("a", 0, ""), 10, "source.generation"),
        (SourceId("a", -1, "g1"), 10, "source.rank"),
        (SourceId("a", 0, "g1"), 0, "ttl_s"),
        (SourceId("a", 0, "g1"), float("nan"), "ttl_s"),
        (SourceId("a", 0, "g1"), 1e6, "ttl_s"),
    ],
)
def test_a_senseless_record_is_refused_and_leaves_nothing(changed: SourceId, ttl_s: float, field: str) -> None:
    directory = Directory()
    with pytest.raises(ManifestError) as caught:
        directory.announce(record(changed), ttl_s, 0)
    assert caught.value.field == field
    assert directory.leases(0) == []


def test_one_generation_holds_one_model() -> None:
    directory = Directory()
    directory.announce(record(SourceId("a", 0, "g1")), 10, 0)
    with pytest.raises(ManifestError, match="generation g1 holds llama@r1"):
        directory.announce(record(SourceId("a", 0, "g1"), model=ModelKey("qwen")), 10, 1)
    directory.announce(record(SourceId("a", 0, "g2"), model=ModelKey("qwen")), 10, 1)
    assert directory.leases(1, MODEL) == []
    assert [x.record.model.name for x in directory.leases(1)] == ["qwen"]


def test_heartbeats_of_many_seeds_leave_no_garbage() -> None:
    directory = Directory()
    seeds = [SourceId(f"i{n}", 0, "g") for n in range(100)]
    for source in seeds:
        directory.announce(record(source), 30, 0)
    for beat in range(1, 500):
        for source in seeds:
            directory.renew(source, beat * 0.01)
    assert len(directory._expiries) < 1000
    assert len(directory.expire(4.99 + 30)) == 100
