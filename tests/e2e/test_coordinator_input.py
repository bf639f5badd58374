"""Requests that a coordinator refuses: malformed, oversized, inconsistent."""

from __future__ import annotations

import hashlib
import zlib
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from coordinators import MODEL, layout, offer, process, rss_mb

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.coordinator._generated import peerload_pb2_grpc as pb_grpc
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator
from peerload.errors import ManifestError
from peerload.model.offer import Binding, Offer, SourceId


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
