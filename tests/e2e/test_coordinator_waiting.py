"""Targets that wait for seeds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from coordinators import MODEL, offer, until

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.coordinator._generated import peerload_pb2_grpc as pb_grpc
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator
from peerload.deadline import Deadline
from peerload.errors import DeadlineExceeded
from peerload.model.offer import Offer


def test_a_target_waits_for_a_seed_that_is_not_there_yet(client: CoordinatorClient, coordinator: Coordinator) -> None:
    def seed() -> None:
        with CoordinatorClient(coordinator.address) as own:
            for rank in range(2):
                time.sleep(0.3)
                own.announce(offer("late", rank), MODEL)

    starting = threading.Thread(target=seed)
    starting.start()
    began_s = time.monotonic()
    offers = client.wait_for(MODEL, Deadline.after(20), lambda found: len(found) == 2)
    assert [o.source.rank for o in offers] == [0, 1]
    assert 0.5 < time.monotonic() - began_s < 5
    starting.join()
    until(lambda: coordinator.waiting == 0)  # no call is open during the transfer


def test_waiting_sees_withdrawal_expiry_and_replacement(client: CoordinatorClient, coordinator: Coordinator) -> None:
    lease = client.announce(offer("withdrawn"), MODEL)
    client.announce(offer("expired"), MODEL, ttl_s=0.5)
    client.announce(offer("stays", generation="g1"), MODEL)
    heard: list[set[str]] = []

    def enough(found: list[Offer]) -> bool:
        heard.append({f"{o.source.instance} {o.source.generation}" for o in found})
        return heard[-1] == {"stays g2"}

    with ThreadPoolExecutor() as pool, CoordinatorClient(coordinator.address) as target:
        waiting = pool.submit(target.wait_for, MODEL, Deadline.after(20), enough)
        until(lambda: len(heard) == 1)
        client.withdraw(lease)
        client.announce(offer("stays", generation="g2"), MODEL)
        assert len(waiting.result(10)) == 1
    assert heard[0] == {"withdrawn g1", "expired g1", "stays g1"}
    assert {"expired g1", "stays g1"} in heard


def test_waiting_ends_at_the_deadline_and_says_who_is_there(client: CoordinatorClient) -> None:
    client.announce(offer("half", 1), MODEL)
    began_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"not enough seeds of org/llama@r1 .* there: half/rank 1"):
        client.wait_for(MODEL, Deadline.after(0.5), lambda found: len(found) == 2)
    assert 0.4 < time.monotonic() - began_s < 2


def test_waiting_calls_starve_nobody(coordinator: Coordinator) -> None:
    room = 200
    with CoordinatorClient(coordinator.address) as client, grpc.insecure_channel(coordinator.address) as channel:
        stub = pb_grpc.DirectoryStub(channel)
        request = pb.WatchRequest(model=codec.encode_model(MODEL))
        coordinator.narrow(room)
        streams = [stub.Watch(request, timeout=60) for _ in range(room)]
        until(lambda: coordinator.waiting == room, 20)
        lease = client.announce(offer(), MODEL, deadline=Deadline.after(5))
        client.renew(lease, Deadline.after(5))
        # One more may not wait, and gets by with asking again.
        assert len(client.wait_for(MODEL, Deadline.after(5), lambda found: len(found) == 1)) == 1
        asked_s = time.monotonic()
        with ThreadPoolExecutor() as pool:
            votes = [pool.submit(client.agree, "group", 0, rank, 2, b"", Deadline.after(10)) for rank in range(2)]
            assert [vote.result() for vote in votes] == [[b"", b""]] * 2
        assert time.monotonic() - asked_s < 5
        for stream in streams:
            stream.cancel()
        until(lambda: coordinator.waiting == 0, 20)
