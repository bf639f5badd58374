"""Leases: renewed, ended, fenced, and kept by a coordinator that is restarted or cannot be reached for a while."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from coordinators import MODEL, kill, offer, process, until

from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import serve
from peerload.deadline import Deadline
from peerload.errors import LeaseSuperseded, LeaseUnknown


def test_a_lease_ends_unless_renewed(client: CoordinatorClient) -> None:
    kept, lost = client.announce(offer("kept"), MODEL, ttl_s=0.6), client.announce(offer("lost"), MODEL, ttl_s=0.6)
    for _ in range(5):
        time.sleep(0.2)
        assert client.renew(kept) == kept
    assert [o.source.instance for o in client.discover(MODEL)] == ["kept"]
    with pytest.raises(LeaseUnknown, match="no lease is held for lost/rank 0"):
        client.renew(lost)
    client.announce(offer("lost"), MODEL)
    assert len(client.discover(MODEL)) == 2
    client.withdraw(kept)
    client.withdraw(kept)
    assert [o.source.instance for o in client.discover(MODEL)] == ["lost"]


def test_a_new_generation_fences_the_old_one(client: CoordinatorClient) -> None:
    old = client.announce(offer(generation="g1", endpoint=b"old"), MODEL)
    client.announce(offer(generation="g2", endpoint=b"new"), MODEL)
    assert [o.binding.endpoints[0].description for o in client.discover(MODEL)] == [b"new"]
    with pytest.raises(LeaseSuperseded, match="superseded by g2"):
        client.renew(old)
    with pytest.raises(LeaseSuperseded, match="superseded by g2"):
        client.announce(offer(generation="g1"), MODEL)
    client.withdraw(old)
    assert [o.source.generation for o in client.discover(MODEL)] == ["g2"]


def test_leases_get_a_full_ttl_after_a_restart(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with serve("127.0.0.1:0", store) as first, CoordinatorClient(first.address) as client:
        lease = client.announce(offer(), MODEL, ttl_s=3.0)
    time.sleep(3.2)  # it was away for longer than the lease
    with serve("127.0.0.1:0", store) as second, CoordinatorClient(second.address) as client:
        assert len(client.discover(MODEL)) == 1
        client.renew(lease)
        until(lambda: client.discover(MODEL) == [], 10)


def test_a_coordinator_that_forgot_is_told_again() -> None:
    with process("memory") as (first, address), CoordinatorClient(address) as client:
        lease = client.announce(offer(), MODEL)
        kill(first)
        with process("memory", address):
            with pytest.raises(LeaseUnknown):
                client.renew(lease)
            client.announce(offer(), MODEL)
            assert len(client.discover(MODEL)) == 1


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
