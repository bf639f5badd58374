"""What a coordinator promises when it is killed, stopped or started late: a real process."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from coordinators import MODEL, OPEN, Network, kill, offer, process, until

from peerload.coordinator.ballot import Round
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import serve
from peerload.deadline import Deadline
from peerload.errors import CommitError, CoordinatorError, LeaseSuperseded
from peerload.model.offer import SourceId


def test_a_killed_coordinator_with_a_file_forgets_nothing(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/new folder/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address) as client:
        lease = client.announce(offer("a", generation="g2"), MODEL, files={"config.json": b"{}"}, ttl_s=60)
        client.announce(offer("b", generation="g1"), MODEL, ttl_s=60)
        client.announce(offer("b", generation="g2"), MODEL, ttl_s=60)
        client.withdraw(client.announce(offer("gone"), MODEL, ttl_s=60))
        before = client.discover(MODEL)
        with ThreadPoolExecutor() as pool:
            votes = [pool.submit(client.agree, "done", 0, rank, 2, b"%d" % rank, Deadline.after(10)) for rank in range(2)]
            assert [vote.result() for vote in votes] == [[b"0", b"1"]] * 2
            open_vote = pool.submit(client.agree, "open", 0, 0, 2, b"x", Deadline.after(30))
            until(lambda: Round("open", 0) in client.status().open_rounds)
            waiting = pool.submit(client.wait_for, MODEL, Deadline.after(30), lambda found: len(found) == 3)
            kill(first)
            with process(store, address) as (_, again):
                assert again == address
                client.renew(lease)  # the same client, the same lease
                after = client.discover(MODEL)
                assert [o.source for o in after] == [o.source for o in before] == [SourceId(i, 0, "g2") for i in "ab"]
                with pytest.raises(LeaseSuperseded):
                    client.announce(offer("b", generation="g1"), MODEL)
                # Rank 1 lost the answer; rank 0 acts on it already.
                assert client.agree("done", 0, 1, 2, b"1", Deadline.after(10)) == [b"0", b"1"]
                assert client.agree("open", 0, 1, 2, b"y", Deadline.after(10)) == [b"x", b"y"]
                assert open_vote.result(10) == [b"x", b"y"]
                client.announce(offer("c"), MODEL)
                assert len(waiting.result(10)) == 3
                with CoordinatorClient(address) as fresh:
                    assert fresh.discover(MODEL)[0].layout.pieces.start.tolist() == before[0].layout.pieces.start.tolist()
                    assert fresh.discover_files(MODEL) == {"config.json": b"{}"}


def test_votes_that_a_restart_forgot_fail_both_ranks_at_once_instead_of_at_the_deadline() -> None:
    """Rank 0 heard how round 0 ended, rank 1 didn't: neither can go on, and neither waits for the other."""
    with (
        process("memory") as (first, address),
        Network(address) as network,
        ThreadPoolExecutor() as pool,
        CoordinatorClient(address) as rank0,
        CoordinatorClient(network.address) as rank1,
    ):
        waiting = pool.submit(rank1.agree, "target", 0, 1, 2, b"1", Deadline.after(60))
        until(lambda: rank0.status().open_rounds == {Round("target", 0): (0,)})
        network.deaf = True
        assert rank0.agree("target", 0, 0, 2, b"0", Deadline.after(60)) == [b"0", b"1"]
        kill(first)
        network.deaf = False
        with process("memory", address):
            began_s = time.monotonic()
            with pytest.raises(CoordinatorError, match=r"has restarted and forgotten the votes of target, round 1"):
                rank0.agree("target", 1, 0, 2, b"0", Deadline.after(60))
            with pytest.raises(CoordinatorError, match=r"has restarted and forgotten the votes of target, round 0") as caught:
                waiting.result(30)
            assert time.monotonic() - began_s < 10
            assert "start this instance again" in caught.value.next_step
            # What a rank says when it fails reaches one that comes late.
            rank1.abort("target", 0, 1, 3, "the coordinator restarted")
            with CoordinatorClient(address) as late, pytest.raises(CommitError, match="the coordinator restarted"):
                late.agree("target", 0, 2, 3, b"2", Deadline.after(60))


def test_a_group_that_voted_with_a_file_hears_the_same_after_a_restart(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with (
        process(store) as (first, address),
        Network(address) as network,
        ThreadPoolExecutor() as pool,
        CoordinatorClient(address) as rank0,
        CoordinatorClient(network.address) as rank1,
    ):
        waiting = pool.submit(rank1.agree, "target", 0, 1, 2, b"1", Deadline.after(60))
        until(lambda: rank0.status().open_rounds == {Round("target", 0): (0,)})
        network.deaf = True
        assert rank0.agree("target", 0, 0, 2, b"0", Deadline.after(60)) == [b"0", b"1"]
        kill(first)
        network.deaf = False
        with process(store, address):
            assert waiting.result(30) == [b"0", b"1"]


def test_a_file_that_is_gone_counts_as_forgotten(tmp_path: Path) -> None:
    with (
        process(f"sqlite:{tmp_path}/one.db") as (first, address),
        CoordinatorClient(address) as client,
        ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(client.agree, "target", 0, 0, 2, b"0", Deadline.after(60))
        until(lambda: client.status().open_rounds == OPEN)
        kill(first)
        with process(f"sqlite:{tmp_path}/two.db", address), pytest.raises(CoordinatorError, match="has restarted and forgotten"):
            waiting.result(30)


def test_a_client_may_start_before_the_coordinator() -> None:
    with serve("127.0.0.1:0") as placeholder:
        address = placeholder.address
    with CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.wait_for, MODEL, Deadline.after(20), lambda found: len(found) == 1)
        announcing = pool.submit(client.announce, offer(), MODEL, deadline=Deadline.after(20))
        time.sleep(0.5)
        with serve(address):
            assert announcing.result(10).source == SourceId("seed", 0, "g1")
            assert len(waiting.result(10)) == 1


def test_a_restarted_coordinator_is_found_at_once(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        client.status()
        kill(first)
        asking = pool.submit(lambda: (client.status(Deadline.after(60)), time.monotonic()))
        time.sleep(3)
        with process(store, address):
            listens_s = time.monotonic()
            _, heard_s = asking.result(30)
            assert heard_s - listens_s < 2.5


def test_discovering_waits_for_a_coordinator_until_its_own_deadline(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address, timeout_s=0.5) as client, ThreadPoolExecutor() as pool:
        client.announce(offer(), MODEL, ttl_s=600, deadline=Deadline.after(10))
        kill(first)
        finding = pool.submit(client.discover, MODEL, Deadline.after(60))
        time.sleep(3)
        with process(store, address):
            assert len(finding.result(30)) == 1


def test_a_coordinator_that_was_stopped_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than one call waits; shortened here, so that nobody waits for a test."""
    monkeypatch.setattr("peerload.coordinator.client._AGREE_WAIT_S", 1.0)
    monkeypatch.setattr("peerload.coordinator.client._LATE_S", 1.0)
    with process("memory") as (running, address), CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.agree, "target", 0, 0, 2, b"0", Deadline.after(60))
        until(lambda: client.status().open_rounds == OPEN)
        running.send_signal(signal.SIGSTOP)
        time.sleep(5)
        assert not waiting.done()
        running.send_signal(signal.SIGCONT)
        assert client.agree("target", 0, 1, 2, b"1", Deadline.after(30)) == [b"0", b"1"]
        assert waiting.result(30) == [b"0", b"1"]
