"""Two releases side by side: a seed that proves its bytes in a way that this release doesn't know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import MODEL, good, only, seed, target

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.coordinator._generated import peerload_pb2_grpc as pb_grpc
from peerload.coordinator.client import CoordinatorClient
from peerload.engines.bare import BareRank
from peerload.errors import PlanError
from peerload.memory.space import HOST
from peerload.model.catalog import Parallel
from peerload.model.offer import Binding, Endpoint, Offer, SourceId, fence
from peerload.testing.instances import CONFIG, SeedProcess, content, load_ranks, on_disk
from peerload.testing.layouts import layout
from peerload.transport.local import LocalTransport

pytestmark = pytest.mark.e2e


@contextmanager
def another_release(url: str, *, wrong: bool) -> Iterator[None]:
    """A seed "a" that announces digests by algorithm m89-1. `wrong`: its bytes are, so nobody may use them."""
    with ExitStack() as stack:
        bare = BareRank.of(layout(MODEL, Parallel(), 0))
        stack.callback(bare.arena.close)
        client = stack.enter_context(CoordinatorClient(url, timeout_s=3.0))
        transport = stack.enter_context(closing(LocalTransport(threads=1)))
        must = content(MODEL, Parallel(), 0)
        for name, address in zip(bare.layout.buffer_names, bare.address.tolist(), strict=True):
            bare.arena.write(address, (must[name] ^ wrong).tobytes())
        source, held = SourceId.new("a", 0, changes=0), stack.enter_context(closing(HOST.fence()))
        held.write(fence(source.generation))
        transport.register([bare.arena.region(), held.region()])
        binding = Binding(
            source,
            bare.address,
            (Endpoint("local", transport.describe()),),
            digests=np.arange(len(bare.layout.pieces), dtype=np.uint64),
            fence_address=held.address,
            algorithm="m89-1",
        )
        client.announce(Offer(bare.layout, binding), seed(url).key, ttl_s=30.0)
        yield


def test_it_is_left_out_by_name_beside_a_seed_that_is_known(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with another_release(url, wrong=True), SeedProcess(seed(url, "b")):
        good(results := load_ranks(target(url, 2)))
    for result in results:
        assert result.receipt is not None
        assert list(result.receipt.sources) == ["b/rank 0"]
        assert result.receipt.verified_nbytes == result.receipt.needed_nbytes
    assert "a/rank 0: announces digests by algorithm m89-1, which this release doesn't know: it knows m61-1" in caplog.text


def test_alone_it_is_no_source_and_the_error_says_what_to_do(url: str) -> None:
    with another_release(url, wrong=True):
        error = only(load_ranks(target(url)), PlanError)
    assert "a/rank 0: announces digests by algorithm m89-1" in str(error)
    assert "run the same release on both sides, or set verify to off here" in str(error)


def test_the_disk_serves_in_its_place(url: str, tmp_path: Path) -> None:
    with another_release(url, wrong=True):
        life = target(url, 2, config=CONFIG.replace(fallback="disk"))
        good(results := load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))
    for result in results:
        assert result.receipt is not None
        assert list(result.receipt.sources) == [f"{tmp_path}/rank 0"]


def test_verify_off_takes_it(url: str) -> None:
    with another_release(url, wrong=False):
        good(results := load_ranks(target(url, config=CONFIG.replace(verify="off"))))
    assert results[0].receipt is not None
    assert list(results[0].receipt.sources) == ["a/rank 0"]
    assert results[0].receipt.verified_nbytes == 0


def test_its_digests_may_have_any_form(url: str) -> None:
    """The coordinator keeps them as they came."""
    made = layout(MODEL, Parallel(), 0)
    binding = Binding(SourceId.new("a", 0, changes=0), np.arange(len(made.buffer_names)) + 1, (Endpoint("local", b"{}"),))
    message, blobs = codec.encode_offer(Offer(made, binding), seed(url).key, {})
    blobs.append(codec.Blob.of(codec.Kind.DIGESTS, pb.Digests(piece=b"17 bytes in all..", algorithm="m89-1")))
    message.digests = blobs[-1].digest
    with grpc.insecure_channel(url) as channel, CoordinatorClient(url) as client:
        stub = pb_grpc.DirectoryStub(channel)
        for blob in blobs:
            stub.PutBlob(pb.PutBlobRequest(blob=codec.pack(blob)))
        stub.Announce(pb.AnnounceRequest(announcement=message, ttl_s=10))
        (found,) = client.discover(seed(url).key)
    assert (found.binding.digests, found.binding.algorithm) == (None, "m89-1")
