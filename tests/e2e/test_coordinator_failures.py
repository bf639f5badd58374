"""What a coordinator promises when it is killed, stopped, flooded, or its disk is full: real processes and real limits."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from coordinators import Network, answer, kill, process, rank_process, rss_mb, until
from test_coordinator import MODEL, offer

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.coordinator._generated import peerload_pb2_grpc as pb_grpc
from peerload.coordinator.ballot import Round
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.directory import FENCE_S
from peerload.coordinator.server import serve
from peerload.coordinator.store import Store
from peerload.deadline import Deadline
from peerload.errors import CommitError, CoordinatorError, DeadlineExceeded, HostError
from peerload.job.exchange import FAREWELL_S, LATE_S, Group
from peerload.model.offer import SourceId

OPEN = {Round("target", 0): (1,)}


# A coordinator that forgets.


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


def test_an_offer_whose_blobs_a_restart_forgot_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """It restarts between the answer to Discover and the question for the blobs."""
    with ExitStack() as stack:
        first, address = stack.enter_context(process("memory"))
        seed, target = (stack.enter_context(CoordinatorClient(address)) for _ in range(2))
        seed.announce(offer("a"), MODEL, files={"config.json": b"{}"})
        readings: list[float] = []

        def clock() -> float:
            readings.append(time.monotonic())
            if len(readings) == 2:  # it was read once for Discover
                kill(first)
                stack.enter_context(process("memory", address))
            return readings[-1]

        assert target.discover(MODEL, Deadline(time.monotonic() + 30, clock)) == []
        assert "left out a/rank 0, whose offer can't be read" in caplog.text
        seed.announce(offer("b"), MODEL)
        assert [o.source.instance for o in target.discover(MODEL)] == ["b"]


# A coordinator that is away for a while.


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


def test_many_threads_of_one_client_outlive_a_restart(tmp_path: Path) -> None:
    store, over = f"sqlite:{tmp_path}/peerload.db", threading.Event()
    with process(store) as (first, address), CoordinatorClient(address) as client, ThreadPoolExecutor(8) as pool:
        lease = client.announce(offer(), MODEL, ttl_s=60)

        def renew() -> int:
            count = 0
            while not over.is_set():
                client.renew(lease, Deadline.after(30))
                count += 1
            return count

        renewing = [pool.submit(renew) for _ in range(8)]
        time.sleep(0.5)
        kill(first)
        with process(store, address):
            time.sleep(2)
            over.set()
            assert all(future.result(30) > 0 for future in renewing)


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


def test_an_abort_gives_up_long_before_a_far_deadline() -> None:
    with CoordinatorClient("127.0.0.1:1", timeout_s=0.5) as client:
        began_s = time.monotonic()
        with pytest.raises(CoordinatorError, match="can't be reached"):
            client.abort("target", 0, 0, 2, "why", Deadline.after(600))
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(("deadline_s", "most_s"), [(600.0, FAREWELL_S), (0.0, LATE_S)], ids=["early", "late"])
def test_a_farewell_that_nobody_hears_ends(deadline_s: float, most_s: float) -> None:
    now_s = itertools.count(0.0, 0.05)  # a clock that goes on whenever it is read
    with CoordinatorClient("127.0.0.1:1") as client:
        Group("target", 0, 2, client, Deadline(deadline_s, lambda: next(now_s))).abort(CommitError("why"))
    assert next(now_s) < most_s + 0.5


# A full disk.


@contextmanager
def full_disk(running: subprocess.Popen[str], folder: Path) -> Iterator[None]:
    """No file of the process may grow any more, as on a full disk."""
    nbytes = max(path.stat().st_size for path in folder.iterdir())
    _, hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (hard, hard))


PAYLOAD = bytes(100_000)


def test_a_vote_that_cannot_be_stored_decides_nothing_and_every_voter_is_told(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        lease = client.announce(offer(), MODEL, ttl_s=60)
        waiting = pool.submit(client.agree, "target", 0, 0, 2, b"0", Deadline.after(60))
        until(lambda: client.status().open_rounds == OPEN)
        with full_disk(first, tmp_path):
            began_s = time.monotonic()
            with pytest.raises(CoordinatorError, match="the vote of rank 1 could not be stored, so nobody has agreed"):
                client.agree("target", 0, 1, 2, PAYLOAD, Deadline.after(60))
            with pytest.raises(CoordinatorError, match="the vote of rank 1 could not be stored, so nobody has agreed"):
                waiting.result(30)
            assert time.monotonic() - began_s < 10
            assert client.status().open_rounds == OPEN
            client.renew(lease)
            assert len(client.discover(MODEL)) == 1
        votes = [
            pool.submit(client.agree, "target", 0, rank, 2, said, Deadline.after(60)) for rank, said in enumerate((b"0", PAYLOAD))
        ]
        assert [vote.result(30) for vote in votes] == [[b"0", PAYLOAD]] * 2
        kill(first)
        with process(store, address):
            assert client.agree("target", 0, 1, 2, PAYLOAD, Deadline.after(60)) == [b"0", PAYLOAD]


def test_an_abort_that_cannot_be_stored_is_told_and_stored_later(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        for rank in (0, 1):  # this group has its epoch
            pool.submit(client.agree, "target", 0, rank, 2, b"", Deadline.after(60))
        until(lambda: client.agree("target", 0, 0, 2, b"", Deadline.after(60)) == [b"", b""])
        waiting = pool.submit(client.agree, "target", 1, 0, 2, b"0", Deadline.after(60))
        until(lambda: client.status().open_rounds == {Round("target", 1): (1,)})
        with full_disk(first, tmp_path):
            client.abort("target", 1, 1, 2, "bytes are wrong" + "." * 4000)
            with pytest.raises(CommitError, match="rank 1 aborted: bytes are wrong"):
                waiting.result(30)
            with pytest.raises(CoordinatorError, match="could not be stored"):
                client.agree("other", 0, 0, 2, PAYLOAD, Deadline.after(60))
        time.sleep(2)  # it tries again twice a second
        kill(first)
        with process(store, address), pytest.raises(CommitError, match="rank 1 aborted: bytes are wrong"):
            client.agree("target", 1, 0, 2, b"0", Deadline.after(60))


def test_who_waits_hears_of_a_seed_that_could_not_be_stored(tmp_path: Path) -> None:
    """It may be read, as `discover` says; only a restart would forget it."""
    store = f"sqlite:{tmp_path}/peerload.db"
    with process(store) as (first, address), CoordinatorClient(address) as client, ThreadPoolExecutor() as pool:
        client.announce(offer(), MODEL)  # its blobs are there
        waiting = pool.submit(client.wait_for, MODEL, Deadline.after(20), lambda found: len(found) == 2)
        time.sleep(0.5)
        with full_disk(first, tmp_path):
            with pytest.raises(CoordinatorError, match="can't be written"):
                client.announce(offer("other"), MODEL)
            assert len(client.discover(MODEL)) == 2
            assert len(waiting.result(10)) == 2


# The store.


def test_generations_are_forgotten_once_nobody_could_wake_up_from_them(tmp_path: Path) -> None:
    now_s = [1e9]
    store = Store(f"sqlite:{tmp_path}/peerload.db", lambda: now_s[0])
    for number in range(50):
        source = SourceId(f"host-{number}", 0, "g1")
        store.save(source, 30, b"")
        store.end([source])
    store.save(SourceId("serves", 0, "g1"), 30, b"")
    now_s[0] += 8 * FENCE_S  # it has served for long: what ends now is not old
    store.save(SourceId("serves", 0, "g2"), 30, b"")
    store.prune()
    assert store.generations() == [(SourceId("serves", 0, "g1"), True), (SourceId("serves", 0, "g2"), False)]
    now_s[0] += 1.1 * FENCE_S
    store.close()
    store = Store(f"sqlite:{tmp_path}/peerload.db", lambda: now_s[0])  # opening it forgets as well
    assert store.generations() == [(SourceId("serves", 0, "g2"), False)]
    store.close()


def test_a_file_of_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "peerload.db"
    Store(f"sqlite:{path}").close()
    for version, words in ((99, "a newer peerload: its schema is version 99"), (0, "another peerload: its schema is version 0")):
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA user_version={version}")
        db.close()
        with pytest.raises(HostError, match=words) as caught:
            Store(f"sqlite:{path}")
        assert str(path) in caught.value.message
        assert "name another file" in caught.value.next_step


def test_a_file_keeps_its_epoch_and_memory_has_a_new_one_each_time(tmp_path: Path) -> None:
    epochs = []
    for url in (f"sqlite:{tmp_path}/peerload.db", f"sqlite:{tmp_path}/peerload.db", "memory", "memory"):
        store = Store(url)
        epochs.append(store.epoch)
        store.close()
    assert epochs[0] == epochs[1]
    assert len(set(epochs)) == 3


# Limits of the host.


def test_a_coordinator_without_descriptors_keeps_its_leases_and_recovers(tmp_path: Path) -> None:
    with process("memory", log=tmp_path / "log") as (running, address), CoordinatorClient(address) as client:
        lease = client.announce(offer(), MODEL, ttl_s=3)
        limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (60, limits[1]))
        host, port = address.split(":")
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection((host, int(port))))
            for _ in range(8):
                time.sleep(0.5)
                client.renew(lease)
        with CoordinatorClient(address) as fresh:
            assert len(fresh.discover(MODEL, Deadline.after(30))) == 1


def test_a_coordinator_without_threads_lets_fewer_wait_and_serves_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process("memory", log=log) as (running, address), CoordinatorClient(address) as client:
        lease = client.announce(offer(), MODEL, ttl_s=60)
        lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
        virtual = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
        # A thread's stack takes 8 MiB of address space.
        resource.prlimit(running.pid, resource.RLIMIT_AS, (virtual + (600 << 20), -1))
        with ThreadPoolExecutor(150) as pool:
            votes = [pool.submit(client.agree, f"group {n}", 0, 0, 2, b"0", Deadline.after(120)) for n in range(150)]
            until(lambda: "allows no more than" in log.read_text(), 30)
            for _ in range(10):
                client.renew(lease, Deadline.after(20))
            for n in range(150):
                client.agree(f"group {n}", 0, 1, 2, b"1", Deadline.after(60))
            assert [vote.result(60) for vote in votes] == [[b"0", b"1"]] * 150


def test_hundreds_of_ranks_wait_and_one_vote_wakes_its_own_group() -> None:
    with serve("127.0.0.1:0") as coordinator, ExitStack() as stack, ThreadPoolExecutor(400) as pool:
        clients = [stack.enter_context(CoordinatorClient(coordinator.address)) for _ in range(8)]
        votes = [pool.submit(clients[n % 8].agree, f"group {n}", 0, 0, 2, b"0", Deadline.after(120)) for n in range(400)]
        until(lambda: coordinator.waiting == 400, 60)
        assert clients[0].agree("group 7", 0, 1, 2, b"1", Deadline.after(10)) == [b"0", b"1"]
        assert votes[7].result(10) == [b"0", b"1"]
        assert sum(vote.done() for vote in votes) == 1
        for n in range(400):
            clients[0].agree(f"group {n}", 0, 1, 2, b"1", Deadline.after(60))
        assert all(vote.result(60) == [b"0", b"1"] for vote in votes)
        until(lambda: coordinator.waiting == 0)


# What anybody may send.


def bomb(kind: codec.Kind, data: bytes) -> pb.PutBlobRequest:
    digest = hashlib.sha256(data).hexdigest()
    return pb.PutBlobRequest(blob=pb.Blob(kind=int(kind), digest=digest, nbytes=len(data), packed=zlib.compress(data, 9)))


def test_refused_requests_keep_no_memory() -> None:
    """Each takes some 60 kB on the way, 62 MB once inflated, and would take 2 GB once parsed."""
    bombs = [
        bomb(codec.Kind.LAYOUT, b"\x2a\0" * (31 << 20)),
        bomb(codec.Kind.LAYOUT, b"\xaa\0\0" * (20 << 20)),
        bomb(codec.Kind.CATALOG, b"\x0a\0" * (31 << 20)),
        bomb(codec.Kind.DIGESTS, bytes((62 << 20) - 16)),
    ]
    with process("memory") as (running, address), grpc.insecure_channel(address) as channel:
        stub = pb_grpc.DirectoryStub(channel)
        stub.Status(pb.StatusRequest())
        before = rss_mb(running)
        for _ in range(4):
            for request in bombs:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.PutBlob(request, timeout=60)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert rss_mb(running) - before < 300
        assert rss_mb(running) - before < 150


def _all_of(stream: grpc.UnaryStreamMultiCallable, data: bytes) -> list[bytes]:
    return list(stream(data, timeout=10))


def test_nonsense_is_refused_and_leaves_no_traceback(tmp_path: Path) -> None:
    with process("memory", log=tmp_path / "log") as (running, address), grpc.insecure_channel(address) as channel:
        for method in pb.DESCRIPTOR.services_by_name["Directory"].methods:
            name = f"/peerload.v1.Directory/{method.name}"
            if method.server_streaming:
                ask = partial(_all_of, channel.unary_stream(name))
            else:
                ask = partial(channel.unary_unary(name), timeout=10)
            for data in (b"\xff\xff\xff", b"\x0a\x05"):
                with pytest.raises(grpc.RpcError) as caught:
                    ask(data)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"is no {method.input_type.name} message" in caught.value.details()
        assert running.poll() is None
    assert "Traceback" not in (tmp_path / "log").read_text()


# The command.


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peerload", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["coordinator", "--listen", "nonsense"], "--listen 'nonsense' is no HOST:PORT"),
        (["coordinator", "--listen", ":7070"], "--listen ':7070' is no HOST:PORT"),
        (
            ["coordinator", "--listen", "127.0.0.1:999999"],
            "--listen '127.0.0.1:999999': the port must be a number from 0 to 65535",
        ),
        (["coordinator", "--listen", "127.0.0.1:x"], "--listen '127.0.0.1:x': the port must be a number from 0 to 65535"),
        (["ls", "--url", ""], "the coordinator's url '' is no HOST:PORT"),
        (["ls", "--url", "here"], "the coordinator's url 'here' is no HOST:PORT"),
        (["ls", "--url", "127.0.0.1:0"], "the coordinator's url '127.0.0.1:0': the port must be a number from 1 to 65535"),
    ],
)
def test_a_senseless_address_is_one_clear_line(words: list[str], said: str, tmp_path: Path) -> None:
    outcome = command(*words, XDG_STATE_HOME=str(tmp_path))
    assert outcome.returncode == 2
    first, *rest = outcome.stderr.splitlines()
    assert first == f"peerload: ConfigError: {said}"
    assert all(line.startswith("  next: ") for line in rest)
    assert len(rest) <= 1


@pytest.mark.parametrize(("listen", "why"), [("192.0.2.1:7070", "Cannot assign"), ("[::1::2]:7070", "")])
def test_an_address_that_is_not_ours_is_one_clear_line(listen: str, why: str, tmp_path: Path) -> None:
    outcome = command("coordinator", "--listen", listen, "--store", "memory")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(f"peerload: HostError: can't listen on {listen}: {why}")
    assert len(outcome.stderr.splitlines()) == 2


def test_the_command_keeps_its_store_in_a_file_unless_told_otherwise(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "peerload", "coordinator", "--listen", "127.0.0.1:0"]
    path = tmp_path / "state" / "peerload" / "coordinator.db"
    with subprocess.Popen(
        words,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        try:
            said = answer(running)
            assert f"store sqlite:{path}" in said
            assert path.exists()
        finally:
            running.kill()
    text = " ".join(command("coordinator", "--help").stdout.split())
    assert "memory forgets leases and votes" in text
    assert "~/.local/state" in text


def test_a_rank_that_dies_is_named_at_the_deadline() -> None:
    with (
        serve("127.0.0.1:0") as coordinator,
        CoordinatorClient(coordinator.address) as client,
        rank_process(coordinator.address, 0, 2, deadline_s=3.0) as waits,
    ):
        until(lambda: client.status().open_rounds == OPEN)
        assert answer(waits) == "DeadlineExceeded target, round 0: rank 1 of 2 did not vote in time"
