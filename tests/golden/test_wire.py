"""The bytes of every message in `wire.txt`: today's code reads them as the values below, and writes them again.

`python tests/golden/test_wire.py` writes the file anew; read the difference. Where bytes that were there have changed, releases
before and after do not mix: all processes of a fleet must be replaced together. Say so in CHANGELOG.md.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.engines.settle import Said
from peerload.integrity.claims import Measured
from peerload.integrity.digest import digest_boxes
from peerload.job.exchange import Judgement
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces
from peerload.model.offer import ALGORITHM, Binding, Endpoint, Offer, SourceId, fence
from peerload.receipt import Read
from peerload.transport import cuda_ipc, descriptions, local_peer, nixl
from peerload.transport.files import FileSet

FILE = Path(__file__).with_name("wire.txt")

GENERATION = "0123456789abcdef0123456700000002"
SOURCE = SourceId("seed-é", 1, GENERATION)
SPECS = [
    TensorSpec("embed", "BF16", (10, 4)),
    TensorSpec("down", "F8_E4M3", (4, 6)),
    TensorSpec("scale", "F32", ()),
    TensorSpec("lm_head", "BF16", (10, 4)),
]
CATALOG = Catalog.of(SPECS)
LAYOUT = Layout(
    CATALOG,
    ("embed", "down", "scale"),
    np.array([40, 16, 4]),
    Pieces.of(
        [
            Piece(0, Box((5, 0), (10, 4)), 0, 0, (8, 2)),
            Piece(1, Box((0, 3), (4, 6)), 1, 2, (3, 1)),
            Piece(2, Box((), ()), 2, 0, ()),
            Piece(3, Box((5, 0), (10, 4)), 0, 0, (8, 2)),
        ],
        CATALOG.width,
    ),
    constants=(Constant(1, 14, (2,), (1,), b"\7"),),
    aliases={"lm_head": "embed"},
    ignored={"rotary": "computed by the engine"},
    parallel=Parallel(tp=2, pp=1, ep=2),
    rank=1,
)
DIGESTS = np.array([1, 2, 3, (1 << 61) - 2], np.uint64)
FILES = {"config.json": b"{}", "generation_config.json": b"[]"}
OFFER = Offer(
    LAYOUT,
    Binding(
        SOURCE,
        np.array([2**47, 4096, 8192]),
        (Endpoint("local", b"\0pid"), Endpoint("nixl", b"{}")),
        digests=DIGESTS,
        fence_address=2**46,
        host="boot-id",
        attributes={"engine": "vllm", "a": "b"},
    ),
)
ANNOUNCEMENT, BLOBS = codec.encode_offer(OFFER, ModelKey("org/model", "abc"), FILES)
DERIVED = Catalog.of([*SPECS, TensorSpec("embed as F32", "F32", (10, 4))])
MEASURED = Measured(
    DERIVED,
    rank=np.array([1, 1, 1]),
    tensor=np.array([0, 1, 4]),
    start=np.array([[5, 0], [0, 3], [0, 0]]),
    stop=np.array([[10, 4], [4, 6], [10, 4]]),
    digest=DIGESTS[1:],
    source=np.array([0, 1, 0]),
    sources=(SOURCE, SourceId("/models/m", 0, "")),
)
PROCESS = {"host": "boot-id", "pid_namespace": 1, "pid": 2, "start_time": 3, "socket": "peerload-1", "token": "0a" * 16}
DESCRIPTIONS = {
    "local": local_peer.LocalDescription(**PROCESS, address=(4096, 8192), nbytes=(10, 20), file=(-1, 0), offset=(0, 4096)),
    "cuda_ipc": cuda_ipc.CudaDescription(
        **PROCESS,
        gpu="GPU-0",
        address=(4096, 5000),
        nbytes=(10, 20),
        block=(0, 0),
        base=(4096,),
        size=(8192,),
        handle=("ab" * 64,),
    ),
    "nixl": nixl.NixlDescription(host="boot-id", metadata="AAAA", address=(4096,), nbytes=(1,)),
    "files": FileSet(path=("/a/b\udc80",), nbytes=(7,), mtime_ns=(-1,), base=(4096,)),
}

#: A value, what makes its bytes, and what reads them.
Row = tuple[Any, Callable[[Any], bytes], Callable[[bytes], Any]]


def serialized(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def proto(message: Message) -> Row:
    return message, serialized, type(message).FromString


def described(description: Any) -> Row:
    return description, descriptions.encode, lambda data: descriptions.decode(type(description), data, "a")


def packed(blob: codec.Blob) -> Row:
    return blob, lambda b: serialized(codec.pack(b)), lambda data: codec.unpack(pb.Blob.FromString(data))


MODEL, SENT = codec.encode_model(ModelKey("org/model", "abc")), codec.encode_source(SOURCE)
SERVICE = pb.DESCRIPTOR.services_by_name["Directory"]
VOTE = {"group": "target/1", "round": 3, "rank": 1, "size": 2, "wait_s": 1.5, "epoch": "e"}
HOLDING = pb.Holding(
    model=MODEL,
    source=SENT,
    parallel=codec.encode_parallel(LAYOUT.parallel),
    nbytes=60,
    pieces=4,
    transport=["local", "nixl"],
    host="boot-id",
    attributes={"engine": "vllm"},
    layout=BLOBS[1].digest,
    lease_left_s=12.5,
)
BLOB = pb.Blob(kind=pb.FILES, digest="ab" * 32, nbytes=5, packed=b"zlib's")

ROWS: dict[str, Row] = {
    # What is content-addressed.
    "Catalog": (CATALOG, lambda c: codec.encode_catalog(c).data, codec.decode_catalog),
    "Layout": (
        LAYOUT,
        lambda layout: codec.encode_layout(layout, BLOBS[0].digest).data,
        lambda data: codec.decode_layout(data, {BLOBS[0].digest: CATALOG}.__getitem__),
    ),
    "Digests": ((DIGESTS, ALGORITHM), lambda d: codec.encode_digests(*d).data, codec.decode_digests),
    "Files": (FILES, lambda f: codec.encode_files(f).data, codec.decode_files),
    **{f"Blob {blob.kind.name}": packed(blob) for blob in BLOBS},
    # What seeds and targets say to the coordinator, and what it says.
    "Announcement": (
        OFFER,
        lambda offer: serialized(codec.encode_offer(offer, ModelKey("org/model", "abc"), FILES)[0]),
        lambda data: codec.decode_offer(pb.Announcement.FromString(data), LAYOUT, DIGESTS),
    ),
    "AnnounceRequest": proto(pb.AnnounceRequest(announcement=ANNOUNCEMENT, ttl_s=30.0)),
    "AnnounceReply": proto(pb.AnnounceReply()),
    "RenewRequest": proto(pb.RenewRequest(source=SENT)),
    "RenewReply": proto(pb.RenewReply(ttl_s=30.0)),
    "WithdrawRequest": proto(pb.WithdrawRequest(source=SENT)),
    "WithdrawReply": proto(pb.WithdrawReply()),
    "PutBlobRequest": proto(pb.PutBlobRequest(blob=BLOB)),
    "PutBlobReply": proto(pb.PutBlobReply()),
    "HasBlobsRequest": proto(pb.HasBlobsRequest(digest=["ab" * 32, "cd" * 32])),
    "HasBlobsReply": proto(pb.HasBlobsReply(missing=["ab" * 32])),
    "GetBlobRequest": proto(pb.GetBlobRequest(digest="ab" * 32)),
    "GetBlobReply": proto(pb.GetBlobReply(blob=BLOB)),
    "DiscoverRequest": proto(pb.DiscoverRequest(model=MODEL)),
    "WatchRequest": proto(pb.WatchRequest(model=MODEL)),
    "WatchEvent snapshot": proto(pb.WatchEvent(change=pb.WatchEvent.SNAPSHOT)),
    "WatchEvent announced": proto(pb.WatchEvent(change=pb.WatchEvent.ANNOUNCED, announcement=ANNOUNCEMENT)),
    "WatchEvent withdrawn": proto(pb.WatchEvent(change=pb.WatchEvent.WITHDRAWN, source=SENT)),
    "WatchEvent expired": proto(pb.WatchEvent(change=pb.WatchEvent.EXPIRED, source=SENT)),
    "WatchEvent superseded": proto(pb.WatchEvent(change=pb.WatchEvent.SUPERSEDED, source=SENT)),
    "AgreeRequest yes": proto(pb.AgreeRequest(**VOTE, payload=b".told")),
    "AgreeRequest no": proto(pb.AgreeRequest(**VOTE, abort="out of luck")),
    "AgreeRequest asks": proto(pb.AgreeRequest(**VOTE, asks=True)),
    "AgreeReply pending": proto(pb.AgreeReply(pending=pb.AgreeReply.Pending(missing=[1, 300]), epoch="e")),
    "AgreeReply agreed": proto(pb.AgreeReply(agreed=pb.AgreeReply.Agreed(payload=[b".told", b"+more"]), epoch="e")),
    "AgreeReply aborted": proto(pb.AgreeReply(aborted=pb.AgreeReply.Aborted(rank=1, reason="out of luck"), epoch="e")),
    "AgreeReply forgotten": proto(pb.AgreeReply(epoch="e")),
    "StatusRequest": proto(pb.StatusRequest()),
    "StatusReply": proto(
        pb.StatusReply(
            version="0.1",
            store="memory",
            uptime_s=2.5,
            blobs=4,
            blob_nbytes=1000,
            holding=[HOLDING],
            open_round=[pb.OpenRound(group="target/1", round=3, missing=[1])],
        )
    ),
    "calls": (
        [
            f"{SERVICE.full_name}/{m.name} {m.input_type.name} {'stream ' * m.server_streaming}{m.output_type.name}"
            for m in SERVICE.methods
        ],
        lambda calls: "\n".join(calls).encode(),
        lambda data: data.decode().split("\n"),
    ),
    # What the ranks of an instance tell each other.
    "measured": (MEASURED, Measured.encode, lambda data: Measured.decode(data, CATALOG)),
    "judgement": (
        Judgement(["rank 1: embed differs"], {1: [0, 2]}, {"seed-é/rank 1": Read(nbytes=60, operations=3)}),
        Judgement.encode,
        lambda data: Judgement.decode(data, [0, 3]),
    ),
    "said": (Said("org/model@abc", frozenset({"a/rank 0 g"}), True, "why"), Said.encode, Said.decode),
    # What processes say of their memory.
    **{f"description {name}": described(description) for name, description in DESCRIPTIONS.items()},
    "fence": (GENERATION, fence, bytes.hex),
}
#: zlib's compressed bytes differ between its builds: these are only read.
ONLY_READ = {"measured", *(name for name in ROWS if name.startswith("Blob "))}


def committed() -> dict[str, bytes]:
    """A name, then its bytes in hexadecimal, indented."""
    entries = re.findall(r"^(\S.*)\n((?: .*\n)*)", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: bytes.fromhex(told) for name, told in entries}


def plain(value: Any) -> Any:
    """Comparable, whatever it is made of."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_the_file_has_these_messages_and_no_other() -> None:
    assert list(committed()) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_bytes_are_read_as_they_always_were(name: str) -> None:
    value, encode, decode = ROWS[name]
    assert plain(decode(committed()[name])) == plain(value)
    assert plain(decode(encode(value))) == plain(value)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ONLY_READ])
def test_the_bytes_are_written_as_they_always_were(name: str) -> None:
    value, encode, _ = ROWS[name]
    assert encode(value).hex(" ", 4) == committed()[name].hex(" ", 4)


def test_every_field_of_the_proto_file_is_in_some_message() -> None:
    messages = [getattr(pb, kind).FromString(data) for name, data in committed().items() if hasattr(pb, kind := name.split()[0])]
    assert {name for kind in pb.DESCRIPTOR.message_types_by_name.values() for name in fields(kind)} == {
        name for message in messages for name in filled(message)
    }


def fields(kind: Descriptor) -> Iterator[str]:
    if not kind.GetOptions().map_entry:
        yield from (field.full_name for field in kind.fields)
        for nested in kind.nested_types:
            yield from fields(nested)


def filled(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        yield field.full_name
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from filled(part)


def test_the_name_of_an_algorithm_stands_for_its_numbers() -> None:
    """Other numbers need another name."""
    catalog = Catalog.of([TensorSpec("w", "BF16", (6, 700))])
    held = (ctypes.c_uint16 * 4200)(*range(4200))
    start, stop, stride = np.array([[0, 0], [3, 1]]), np.array([[6, 700], [6, 700]]), np.array([[1400, 2], [1400, 2]])
    address = ctypes.addressof(held) + (start * stride).sum(axis=1)
    found = digest_boxes(catalog, np.array([0, 0]), start, stop, address, stride)
    assert (ALGORITHM, found.tolist()) == ("m61-1", [1012952381722904713, 1593697230291063568])


if __name__ == "__main__":
    with FILE.open("w", encoding="utf-8") as file:
        for name, (value, encode, _) in ROWS.items():
            data = encode(value)
            lines = [data[at : at + 60].hex() for at in range(0, len(data), 60)]
            file.write("\n    ".join([name, *lines]) + "\n")
