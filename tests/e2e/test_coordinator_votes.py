"""Ranks that agree, abort or die: each in a process of its own where it must die."""

from __future__ import annotations

import itertools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from coordinators import OPEN, answer, process, rank_process, until

from peerload.coordinator.ballot import Round
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator, serve
from peerload.deadline import Deadline
from peerload.errors import CommitError, CoordinatorError, DeadlineExceeded
from peerload.job.exchange import FAREWELL_S, LATE_S, Group


def test_processes_agree(coordinator: Coordinator) -> None:
    with ExitStack() as stack:
        ranks = [stack.enter_context(rank_process(coordinator.address, rank, 3, rounds=2)) for rank in range(3)]
        for rank in ranks:
            assert [answer(rank), answer(rank)] == ["[b'0', b'1', b'2']"] * 2


def test_one_abort_sends_everyone_home_at_once(client: CoordinatorClient) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.agree, "target", 0, rank, 4, b"", Deadline.after(30)) for rank in (0, 1)]
        until(lambda: client.status().open_rounds == {Round("target", 0): (2, 3)})
        began_s = time.monotonic()
        client.abort("target", 0, 2, 4, "digest of lm_head.weight differs")
        for rank in waiting:
            with pytest.raises(CommitError, match=r"target, round 0: rank 2 aborted: digest of lm_head.weight differs"):
                rank.result(10)
        assert time.monotonic() - began_s < 5
    with pytest.raises(CommitError, match="rank 2 aborted"):
        client.agree("target", 0, 3, 4, b"", Deadline.after(5))
    assert client.status().open_rounds == {}


def test_a_deadline_names_the_missing_ranks_and_holds_for_all(client: CoordinatorClient) -> None:
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(client.agree, "target", 0, 2, 4, b"", Deadline.after(30))
        until(lambda: Round("target", 0) in client.status().open_rounds)
        with pytest.raises(DeadlineExceeded, match=r"target, round 0: rank 1, 3 of 4 did not vote in time"):
            client.agree("target", 0, 0, 4, b"", Deadline.after(0.5))
        with pytest.raises(CommitError, match=r"rank 0 aborted: its deadline passed while waiting for rank 1, 3"):
            patient.result(10)


def test_a_rank_whose_time_is_up_keeps_a_promise_that_the_others_rely_on(client: CoordinatorClient) -> None:
    with rank_process(client.url, 0, 2, deadline_s=2.0) as slow:
        until(lambda: client.status().open_rounds == {Round("target", 0): (1,)})
        slow.send_signal(signal.SIGSTOP)
        assert client.agree("target", 0, 1, 2, b"1", Deadline.after(5)) == [b"0", b"1"]
        time.sleep(2.5)  # its deadline passes
        slow.send_signal(signal.SIGCONT)
        assert answer(slow) == "[b'0', b'1']"


def test_a_rank_that_dies_is_named_at_the_deadline() -> None:
    with (
        serve("127.0.0.1:0") as coordinator,
        CoordinatorClient(coordinator.address) as client,
        rank_process(coordinator.address, 0, 2, deadline_s=3.0) as waits,
    ):
        until(lambda: client.status().open_rounds == OPEN)
        assert answer(waits) == "DeadlineExceeded target, round 0: rank 1 of 2 did not vote in time"


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_rank_without_a_coordinator_keeps_to_its_deadline_farewell_included(fault: signal.Signals) -> None:
    with process("memory") as (running, address), CoordinatorClient(address) as client:
        deadline = Deadline.after(3)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.agree, "target", 0, 0, 2, b"0", deadline)
            with CoordinatorClient(address) as other:
                until(lambda: other.status().open_rounds == OPEN)
            running.send_signal(fault)
            with pytest.raises((CoordinatorError, DeadlineExceeded), match=r"agreeing on target, round 0") as caught:
                waiting.result(30)
            for number in (0, 1):
                with pytest.raises((CoordinatorError, DeadlineExceeded)):
                    client.abort("target", number, 0, 2, caught.value.message, deadline)
        assert time.monotonic() - deadline.at_s < 3


@pytest.mark.parametrize(("deadline_s", "most_s"), [(600.0, FAREWELL_S), (0.0, LATE_S)], ids=["early", "late"])
def test_a_farewell_that_nobody_hears_ends(deadline_s: float, most_s: float) -> None:
    step_s = most_s / 40
    now_s = itertools.count(0.0, step_s)  # a clock that goes on whenever it is read
    with CoordinatorClient("127.0.0.1:1") as client:
        Group("target", 0, 2, client, Deadline(deadline_s, lambda: next(now_s))).abort(CommitError("why"))
    assert next(now_s) < most_s + 10 * step_s
