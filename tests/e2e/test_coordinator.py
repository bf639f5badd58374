"""A real coordinator on a real port, real clients; where it must die, a real process is killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from coordinators import answer, kill, process, rank_process, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.coordinator._generated import peerload_pb2_grpc as pb_grpc
from peerload.coordinator.ballot import Round
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator, serve
from peerload.deadline import Deadline
from peerload.errors import (
    CommitError,
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
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.model.offer import Binding, Endpoint, Offer, SourceId

MODEL = ModelKey("org/llama", "r1")


def layout(rank: int = 0, tp: int = 2) -> Layout:
    catalog = Catalog.of([TensorSpec("w", "BF16", (8, 4)), TensorSpec("norm", "BF16", (4,))])
    rows = 8 // tp
    pieces = [
        Piece(0, Box((rank * rows, 0), ((rank + 1) * rows, 4)), 0, 0, (8, 2)),
        Piece(1, Box((0,), (4,)), 0, rows * 8, (2,)),
    ]
    return Layout(catalog, ("arena",), np.array([rows * 8 + 8]), Pieces.of(pieces, 2), parallel=Parallel(tp), rank=rank)


def offer(instance: str = "seed", rank: int = 0, generation: str = "g1", tp: int = 2, endpoint: bytes = b"pid 1") -> Offer:
    binding = Binding(
        SourceId(instance, rank, generation),
        np.array([4096]),
        (Endpoint("local", endpoint),),
        np.array([7, 9], np.uint64),
        host="boot",
        attributes={"engine": "transformers"},
    )
    return Offer(layout(rank, tp), binding)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with serve("127.0.0.1:0") as running:
        yield running


@pytest.fixture
def client(coordinator: Coordinator) -> Iterator[CoordinatorClient]:
    with CoordinatorClient(coordinator.address) as running:
        yield running


# Announce and discover.


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


# Leases.


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


# Waiting.


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


# Agreement.


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


# Restarts.


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


# Bad input.


def i64(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


def put(stub: pb_grpc.DirectoryStub, kind: codec.Kind, message: pb.Catalog | pb.Layout | pb.Files) -> None:
    stub.PutBlob(pb.PutBlobRequest(blob=codec.pack(codec.Blob.of(kind, message))))


def bad_catalog(stub: pb_grpc.DirectoryStub, **changes: object) -> None:
    good = {"name": ["w"], "dtype_name": ["BF16"], "dtype": b"\0", "ndim": b"\2", "extent": i64(8, 4)}
    put(stub, codec.Kind.CATALOG, pb.Catalog(**{**good, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype_name": ["F4_NEW"]}, "catalog[w].dtype"),
        ({"extent": i64(8, -4)}, "catalog.extent[1]"),
        ({"extent": i64(8, 4, 2)}, "catalog.extent"),
        ({"ndim": b"\2\2"}, "catalog.ndim"),
        ({"extent": i64(1 << 40, 1 << 40)}, "catalog[w].shape"),
    ],
    ids=["unknown dtype", "negative extent", "inconsistent shapes", "columns differ", "oversized"],
)
def test_bad_blobs_are_refused_by_field_and_not_stored(
    coordinator: Coordinator, client: CoordinatorClient, changes: dict[str, object], field: str
) -> None:
    with grpc.insecure_channel(coordinator.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            bad_catalog(pb_grpc.DirectoryStub(channel), **changes)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(f"{field}: ")
        assert ("peerload-field-bin", field.encode()) in [(m.key, m.value) for m in caught.value.trailing_metadata()]
    assert client.status().blobs == 0


def test_bad_announcements_are_refused_by_field_and_not_stored(coordinator: Coordinator, client: CoordinatorClient) -> None:
    good, blobs = codec.encode_offer(offer(), MODEL, {})
    other, _ = codec.encode_offer(Offer(layout(), Binding(SourceId("x", 0, "g"), np.array([1]), ())), MODEL, {})
    wrong_digests = codec.encode_digests(np.array([1], np.uint64))
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = pb_grpc.DirectoryStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.PutBlob(pb.PutBlobRequest(blob=codec.pack(blobs[1])))  # before its catalog
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            stub.Announce(pb.AnnounceRequest(announcement=good, ttl_s=10))  # before its blobs
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for blob in [*blobs, wrong_digests]:
            stub.PutBlob(pb.PutBlobRequest(blob=codec.pack(blob)))
        faults: list[tuple[dict[str, object], str]] = [
            ({"address": i64(4096, 4096)}, "binding.address"),
            ({"address": i64(-4096)}, "binding.address[0]"),
            ({"digests": wrong_digests.digest}, "binding.digests"),
            ({"layout": blobs[0].digest}, "layout"),
            ({"digests": blobs[0].digest}, "digests"),
            ({"files": blobs[0].digest}, "files"),
            ({"source": pb.Source(instance="", generation="g")}, "source.instance"),
            ({"source": pb.Source(instance="a", generation="g", rank=1 << 20)}, "source.rank"),
            ({"model": pb.ModelKey()}, "model.name"),
        ]
        for changes, field in faults:
            bad = pb.Announcement()
            bad.CopyFrom(good)
            for name, value in changes.items():
                bad.ClearField(name)  # type: ignore[arg-type]
                bad.MergeFrom(pb.Announcement(**{name: value}))  # type: ignore[arg-type]
            with pytest.raises(grpc.RpcError) as caught:
                stub.Announce(pb.AnnounceRequest(announcement=bad, ttl_s=10))
            assert (caught.value.code(), caught.value.details().split(": ")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Announce(pb.AnnounceRequest(announcement=other, ttl_s=0))
        assert caught.value.details().startswith("ttl_s: ")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Agree(pb.AgreeRequest(group="g", size=1))
        assert caught.value.details() == "agree.vote: is missing"
    assert client.status().holdings == ()
    with pytest.raises(ManifestError) as refused:
        client.announce(offer(), MODEL, ttl_s=0)
    assert (refused.value.field, refused.value.problem) == ("ttl_s", "is 0, must be 0.1 to 86400 seconds")
    with pytest.raises(ManifestError) as refused:
        client.announce(offer(), MODEL, files={"config.json": bytes(2 << 20)})
    assert refused.value.field == "files"


def test_a_question_about_no_model_is_refused_by_field(coordinator: Coordinator) -> None:
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = pb_grpc.DirectoryStub(channel)
        for ask in (lambda: stub.Discover(pb.DiscoverRequest(), timeout=5), lambda: stub.Watch(pb.WatchRequest(), timeout=5)):
            with pytest.raises(grpc.RpcError) as error:
                list(ask())
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "model.name" in error.value.details()


def test_an_oversized_message_is_refused(coordinator: Coordinator, client: CoordinatorClient) -> None:
    with grpc.insecure_channel(coordinator.address, [("grpc.max_send_message_length", 1 << 30)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.DirectoryStub(channel).PutBlob(pb.PutBlobRequest(blob=pb.Blob(packed=bytes(codec.MAX_MESSAGE_NBYTES))))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.status().blobs == 0


def test_an_unknown_field_survives_the_coordinator(coordinator: Coordinator) -> None:
    good, blobs = codec.encode_offer(offer(), MODEL, {})
    future = bytes([0xFA, 0x3F, 3]) + b"new"  # field 1023, three bytes
    with grpc.insecure_channel(coordinator.address) as channel:
        stub = pb_grpc.DirectoryStub(channel)
        for blob in blobs:
            stub.PutBlob(pb.PutBlobRequest(blob=codec.pack(blob)))
        newer = pb.Announcement.FromString(good.SerializeToString() + future)
        stub.Announce(pb.AnnounceRequest(announcement=newer, ttl_s=10))
        (found,) = stub.Discover(pb.DiscoverRequest(model=codec.encode_model(MODEL)))
        assert future in found.SerializeToString()


# The process.


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
