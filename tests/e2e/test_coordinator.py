"""What clients ask of a coordinator and hear from it: a real one on a real port."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from coordinators import MODEL, offer, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator, serve
from peerload.deadline import Deadline
from peerload.errors import (
    ConfigError,
    CoordinatorError,
    DeadlineExceeded,
    HostError,
    LeaseSuperseded,
    LeaseUnknown,
    ManifestError,
    PeerloadError,
)
from peerload.model.boxes import Box
from peerload.model.catalog import ModelKey, Parallel
from peerload.model.offer import Endpoint, SourceId


def test_a_target_finds_every_rank_whatever_its_layout(client: CoordinatorClient, coordinator: Coordinator) -> None:
    for rank in (1, 0):
        client.announce(offer("a", rank), MODEL)
    client.announce(offer("b", 0, tp=1), MODEL)
    client.announce(offer("c", 0), ModelKey("org/llama", "r2"))
    with CoordinatorClient(coordinator.address) as target:
        offers = target.discover(MODEL)
        assert [str(o.source) for o in offers] == ["a/rank 0", "a/rank 1", "b/rank 0"]
        assert [o.layout.parallel.tp for o in offers] == [2, 2, 1]
        assert offers[1].layout.box_of(0) == Box((4, 0), (8, 4))
        assert offers[0].binding.endpoints == (Endpoint("local", b"pid 1"),)
        assert offers[0].binding.attributes == {"engine": "transformers"}
        assert offers[0].binding.digests is not None
        assert offers[0].binding.digests.tolist() == [7, 9]
        assert offers[0].layout.catalog is offers[2].layout.catalog
        assert target.discover(ModelKey("nobody")) == []


def test_replicas_are_stored_and_decoded_once(client: CoordinatorClient) -> None:
    client.announce(offer("a"), MODEL, files={"config.json": b"{}"})
    blobs = client.status().blobs
    assert blobs == 4  # catalog, layout, digests, files
    for replica in range(10):
        client.announce(offer(f"r{replica}"), MODEL, files={"config.json": b"{}"})
    assert client.status().blobs == blobs
    assert len({id(o.layout) for o in client.discover(MODEL)}) == 1


def test_files_travel_with_the_announcement(client: CoordinatorClient) -> None:
    client.announce(offer("a"), MODEL)
    with pytest.raises(CoordinatorError, match="has announced files"):
        client.discover_files(MODEL)
    client.announce(offer("b"), MODEL, files={"config.json": b'{"a": 1}', "tokenizer.json": b""})
    assert client.discover_files(MODEL) == {"config.json": b'{"a": 1}', "tokenizer.json": b""}


def test_files_are_those_that_most_instances_announce(client: CoordinatorClient) -> None:
    """Whatever the first says, and however many ranks it has."""
    for rank in range(4):
        client.announce(offer("a", rank, tp=4), MODEL, files={"config.json": b"odd"})
    for instance in ("b", "c"):
        client.announce(offer(instance), MODEL, files={"config.json": b"{}"})
    assert client.discover_files(MODEL) == {"config.json": b"{}"}


def test_status_says_who_holds_what(client: CoordinatorClient) -> None:
    client.announce(offer("a", 1), MODEL, ttl_s=60)
    status = client.status()
    (holding,) = status.holdings
    assert (holding.model, holding.source, holding.parallel) == (MODEL, SourceId("a", 1, "g1"), Parallel(2))
    assert (holding.nbytes, holding.pieces, holding.transports, holding.host) == (40, 2, ("local",), "boot")
    assert 55 < holding.lease_left_s <= 60
    assert status.store == "memory"
    assert status.blob_nbytes > 0


def test_health(coordinator: Coordinator) -> None:
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "peerload.v1.Directory"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_it_stops_at_once_though_clients_wait() -> None:
    with ThreadPoolExecutor() as pool, serve("127.0.0.1:0") as running, CoordinatorClient(running.address) as client:
        waiting = pool.submit(client.wait_for, MODEL, Deadline.after(4), lambda found: len(found) > 0)
        voting = pool.submit(client.agree, "g", 0, 0, 2, b"", Deadline.after(4))
        until(lambda: running.waiting == 2)
        began_s = time.monotonic()
        running.stop()
        running.stop()
        assert time.monotonic() - began_s < 2
        assert running.wait(0)
        for future in (waiting, voting):
            with pytest.raises(CoordinatorError, match="can't be reached"):
                future.result(15)


def test_port_and_file_belong_to_one_coordinator(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/peerload.db"
    with serve("127.0.0.1:0", store) as running:
        with pytest.raises(HostError, match="can't listen on"):
            serve(running.address)
        with pytest.raises(HostError, match="another coordinator holds it"):
            serve("127.0.0.1:0", store)
    with pytest.raises(HostError, match="can't be used"):
        serve("127.0.0.1:0", f"sqlite:{tmp_path}")
    with pytest.raises(ConfigError, match="neither memory nor sqlite:PATH"):
        serve("127.0.0.1:0", "redis://here")


def test_blobs_that_nobody_stands_on_are_dropped_in_the_end() -> None:
    skipped_s = [0.0]
    with serve("127.0.0.1:0", clock=lambda: time.monotonic() + skipped_s[0]) as running:
        with CoordinatorClient(running.address) as client:
            client.announce(offer("stays"), MODEL, ttl_s=86400)
            client.announce(offer("goes", tp=1), MODEL, ttl_s=1)
            assert client.status().blobs == 4  # one catalog, two layouts, one column of digests
            skipped_s[0] = 1800
            until(lambda: len(client.status().holdings) == 1)
            assert client.status().blobs == 4
            skipped_s[0] = 7200
            until(lambda: client.status().blobs == 3)
        with CoordinatorClient(running.address) as client:
            assert [o.source.instance for o in client.discover(MODEL)] == ["stays"]


def test_an_absent_coordinator_is_named() -> None:
    with CoordinatorClient("127.0.0.1:1", timeout_s=0.5) as client:
        with pytest.raises(CoordinatorError) as caught:
            client.discover(MODEL)
        assert "127.0.0.1:1" in str(caught.value)
        assert "is `peerload coordinator` running there?" in caught.value.next_step
        with pytest.raises(CoordinatorError, match="can't be reached"):
            client.wait_for(MODEL, Deadline.after(0.5), lambda _: True)
        with pytest.raises(CoordinatorError, match="can't be reached"):
            client.agree("g", 0, 0, 1, b"", Deadline.after(0.2))


class _Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "why"

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK], ids=lambda c: c.name)
def test_every_grpc_error_becomes_ours(code: grpc.StatusCode) -> None:
    special: dict[grpc.StatusCode, type[PeerloadError]] = {
        grpc.StatusCode.INVALID_ARGUMENT: ManifestError,
        grpc.StatusCode.FAILED_PRECONDITION: LeaseSuperseded,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.NOT_FOUND: LeaseUnknown,
    }
    with CoordinatorClient("127.0.0.1:1") as client:
        error = client._error(_Failure(code), "renewing", LeaseUnknown)
    assert type(error) is special.get(code, CoordinatorError)
    assert isinstance(error, ManifestError) or "127.0.0.1:1" in str(error) or code is grpc.StatusCode.FAILED_PRECONDITION
