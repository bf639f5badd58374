"""A coordinator on a host that runs out of something: disk space, descriptors, threads. Real processes and real limits."""

from __future__ import annotations

import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from coordinators import MODEL, OPEN, kill, offer, process, until

from peerload.coordinator.ballot import Round
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import serve
from peerload.deadline import Deadline
from peerload.errors import CommitError, CoordinatorError


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
