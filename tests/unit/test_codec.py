"""Everything survives the wire, equal values have equal bytes, and nothing senseless gets in."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.coordinator import codec
from peerload.coordinator._generated import peerload_pb2 as pb
from peerload.errors import ManifestError
from peerload.model.boxes import Box
from peerload.model.catalog import ITEMSIZE, Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces
from peerload.model.offer import Binding, Endpoint, Offer, SourceId

ROOT = Path(__file__).resolve().parents[2]


def a_layout() -> Layout:
    """One of everything: a column and a row shard, a scalar, a tied name, padding, an ignored name."""
    catalog = Catalog.of(
        [
            TensorSpec("embed", "BF16", (10, 4)),
            TensorSpec("down", "F8_E4M3", (4, 6)),
            TensorSpec("scale", "F32", ()),
            TensorSpec("lm_head", "BF16", (10, 4)),
            TensorSpec("elsewhere", "I32", (8,)),
            TensorSpec("rotary", "F32", (2,)),
        ]
    )
    pieces = [
        Piece(0, Box((5, 0), (10, 4)), 0, 0, (8, 2)),
        Piece(3, Box((5, 0), (10, 4)), 0, 0, (8, 2)),
        Piece(1, Box((0, 3), (4, 6)), 1, 2, (-0 + 3, 1)),
        Piece(2, Box((), ()), 2, 0, ()),
    ]
    return Layout(
        catalog,
        ("embed", "down", "scale"),
        np.array([48, 16, 4]),
        Pieces.of(pieces, catalog.width),
        constants=(Constant(0, 40, (1, 4), (8, 2), b"\0\0"),),
        aliases={"lm_head": "embed"},
        ignored={"rotary": "computed by the engine", "a": "b"},
        parallel=Parallel(2, 1, 2),
        rank=1,
    )


def an_offer(digests: bool = True) -> Offer:
    layout = a_layout()
    column = np.array([1, 2**64 - 1, 3, 4], np.uint64) if digests else None
    endpoints = (Endpoint("local", b"\0pid"), Endpoint("nixl", bytes(range(256))))
    address = np.array([2**47, 4096, 8192])
    binding = Binding(SourceId("seed-é", 1, "g1"), address, endpoints, column, 2**46, "boot-id", {"engine": "vllm", "v": "1"})
    return Offer(layout, binding)


def same_layout(a: Layout, b: Layout) -> None:
    assert a.catalog == b.catalog
    for field in ("buffer_names", "constants", "aliases", "ignored", "parallel", "rank"):
        assert getattr(a, field) == getattr(b, field), field
    assert a.buffer_nbytes.tolist() == b.buffer_nbytes.tolist()
    for field in ("tensor", "start", "stop", "buffer", "offset", "stride"):
        left, right = getattr(a.pieces, field), getattr(b.pieces, field)
        assert left.shape == right.shape
        assert left.tolist() == right.tolist(), field
        assert right.dtype == np.int64
        assert not right.flags.writeable


@pytest.mark.parametrize("digests", [True, False])
def test_an_offer_comes_back_as_it_went(digests: bool) -> None:
    offer, model = an_offer(digests), ModelKey("org/model", "abc")
    message, blobs = codec.encode_offer(offer, model, {"config.json": b"{}"})
    sent = {blob.digest: codec.unpack(pb.Blob.FromString(codec.pack(blob).SerializeToString())) for blob in blobs}
    catalog = codec.decode_catalog(next(b.data for b in sent.values() if b.kind is codec.Kind.CATALOG))
    layout = codec.decode_layout(sent[message.layout].data, {blobs[0].digest: catalog}.__getitem__)
    same_layout(offer.layout, layout)
    column = codec.decode_digests(sent[message.digests].data)[0] if message.digests else None
    back = codec.decode_offer(pb.Announcement.FromString(message.SerializeToString()), layout, column)
    for field in ("source", "endpoints", "fence_address", "host", "attributes"):
        assert getattr(back.binding, field) == getattr(offer.binding, field)
    assert back.binding.address.tolist() == offer.binding.address.tolist()
    if digests:
        assert back.binding.digests is not None
        assert back.binding.digests.tolist() == [1, 2**64 - 1, 3, 4]
    else:
        assert back.binding.digests is None
    assert codec.decode_files(sent[message.files].data) == {"config.json": b"{}"}
    assert codec.decode_model(message.model) == model


shapes = st.lists(st.integers(1, 2**40), max_size=4).filter(lambda s: int(np.prod(s, dtype=object) or 1) < 2**56)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(names, st.sampled_from(sorted(ITEMSIZE)), shapes), unique_by=lambda row: row[0], max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_catalog_comes_back(rows: list[tuple[str, str, list[int]]]) -> None:
    catalog = Catalog.of(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in rows)
    blob = codec.encode_catalog(catalog)
    assert codec.decode_catalog(blob.data) == catalog
    assert codec.encode_catalog(codec.decode_catalog(blob.data)) == blob


def test_equal_layouts_have_equal_bytes_whatever_the_order_of_their_maps() -> None:
    one, other = a_layout(), a_layout()
    object.__setattr__(other, "ignored", dict(reversed(list(one.ignored.items()))))
    assert codec.encode_layout(one, "c").digest == codec.encode_layout(other, "c").digest
    object.__setattr__(other, "rank", 0)
    assert codec.encode_layout(one, "c").digest != codec.encode_layout(other, "c").digest


def test_a_rank_without_pieces_comes_back() -> None:
    catalog = a_layout().catalog
    layout = Layout(catalog, (), np.array([], np.int64), Pieces.of([], catalog.width))
    same_layout(layout, codec.decode_layout(codec.encode_layout(layout, "c").data, lambda _: catalog))


def i64(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


def patched(column: bytes, at: int, value: int) -> bytes:
    return column[: 8 * at] + i64(value) + column[8 * at + 8 :]


LAYOUT_FAULTS: list[tuple[str, Callable[[pb.Layout], object], str]] = [
    ("column cut off", lambda m: setattr(m.pieces, "offset", m.pieces.offset[:-3]), "layout.pieces.offset"),
    ("row missing", lambda m: setattr(m.pieces, "offset", m.pieces.offset[:-8]), "layout.pieces"),
    ("half a box", lambda m: setattr(m.pieces, "start", m.pieces.start[:-8]), "layout.pieces.start"),
    ("box missing", lambda m: setattr(m.pieces, "stop", m.pieces.stop[:-16]), "layout.pieces"),
    ("negative start", lambda m: setattr(m.pieces, "start", patched(m.pieces.start, 0, -1)), "layout.pieces.start[0]"),
    ("empty box", lambda m: setattr(m.pieces, "stop", patched(m.pieces.stop, 0, 5)), "layout.pieces[0].stop"),
    ("box outside tensor", lambda m: setattr(m.pieces, "stop", patched(m.pieces.stop, 0, 11)), "layout.pieces[0].stop"),
    ("unknown tensor", lambda m: setattr(m.pieces, "tensor", patched(m.pieces.tensor, 2, 99)), "layout.pieces[2].tensor"),
    ("negative tensor", lambda m: setattr(m.pieces, "tensor", patched(m.pieces.tensor, 2, -1)), "layout.pieces.tensor[2]"),
    ("unknown buffer", lambda m: setattr(m.pieces, "buffer", patched(m.pieces.buffer, 1, 4)), "layout.pieces[1].buffer"),
    ("outside buffer", lambda m: setattr(m.pieces, "offset", patched(m.pieces.offset, 2, 8)), "layout.pieces[2].offset"),
    ("folded", lambda m: setattr(m.pieces, "stride", patched(m.pieces.stride, 4, 1)), "layout.pieces[2].stride"),
    ("overflow", lambda m: setattr(m.pieces, "stride", patched(m.pieces.stride, 0, 2**60)), "layout.pieces[0].stride"),
    ("huge stride", lambda m: setattr(m.pieces, "stride", patched(m.pieces.stride, 0, 2**62)), "layout.pieces.stride[0]"),
    ("huge stop", lambda m: setattr(m.pieces, "stop", patched(m.pieces.stop, 0, 2**62)), "layout.pieces.stop[0]"),
    ("width", lambda m: setattr(m.pieces, "width", 3), "layout.pieces.width"),
    ("width 0", lambda m: setattr(m.pieces, "width", 0), "layout.pieces.width"),
    ("negative buffer", lambda m: setattr(m, "buffer_nbytes", i64(-48, 16, 4)), "layout.buffer_nbytes[0]"),
    ("buffer without size", lambda m: setattr(m, "buffer_nbytes", i64(48, 16)), "layout.buffers"),
    ("constant outside", lambda m: setattr(m.constant[0], "offset", 41), "layout.constants[0].offset"),
    ("constant overflow", lambda m: setattr(m.constant[0], "stride", i64(8, 2**59)), "layout.constants[0].shape"),
    ("constant huge", lambda m: setattr(m.constant[0], "stride", i64(8, 2**62)), "layout.constants[0].stride[1]"),
    ("constant empty", lambda m: setattr(m.constant[0], "shape", i64(0, 4)), "layout.constants[0].shape[0]"),
    ("constant of many dimensions", lambda m: setattr(m.constant[0], "shape", i64(*[1] * 65)), "layout.constants[0].shape"),
    ("many constants", lambda m: m.constant.extend([pb.Constant()] * 100_000), "layout.constants"),
    ("constant without fill", lambda m: setattr(m.constant[0], "fill", b""), "layout.constants[0]"),
    ("alias of nothing", lambda m: setattr(m.alias[0], "text", "nothing"), "layout.aliases[lm_head]"),
    ("tp 0", lambda m: setattr(m.parallel, "tp", 0), "parallel.tp"),
]


@pytest.mark.parametrize(("fault", "field"), [f[1:] for f in LAYOUT_FAULTS], ids=[f[0] for f in LAYOUT_FAULTS])
def test_a_bad_layout_is_refused_by_field(fault: Callable[[pb.Layout], object], field: str) -> None:
    layout = a_layout()
    message = pb.Layout.FromString(codec.encode_layout(layout, "c").data)
    fault(message)
    with pytest.raises(ManifestError) as caught:
        codec.decode_layout(message.SerializeToString(), lambda _: layout.catalog)
    assert caught.value.field == field


CATALOG_FAULTS: list[tuple[str, Callable[[pb.Catalog], object], str]] = [
    ("unknown dtype", lambda m: m.dtype_name.__setitem__(0, "F4"), "catalog[embed].dtype"),
    ("dtype row", lambda m: setattr(m, "dtype", b"\x09" * 6), "catalog.dtype"),
    ("dtype missing", lambda m: setattr(m, "dtype", m.dtype[:-1]), "catalog.dtype"),
    ("ndim missing", lambda m: setattr(m, "ndim", m.ndim[:-1]), "catalog.ndim"),
    ("negative extent", lambda m: setattr(m, "extent", patched(m.extent, 1, -4)), "catalog.extent[1]"),
    ("zero extent", lambda m: setattr(m, "extent", patched(m.extent, 1, 0)), "catalog.extent[1]"),
    ("extent missing", lambda m: setattr(m, "extent", m.extent[:-8]), "catalog.extent"),
    ("extent cut off", lambda m: setattr(m, "extent", m.extent[:-1]), "catalog.extent"),
    ("overflow", lambda m: setattr(m, "extent", patched(patched(m.extent, 0, 2**40), 1, 2**40)), "catalog[embed].shape"),
    ("twice", lambda m: m.name.__setitem__(1, "embed"), "catalog.name"),
    ("too many dimensions", lambda m: (setattr(m, "ndim", b"\x09" * 6), setattr(m, "extent", i64(*[1] * 54))), "catalog.shapes"),
]


@pytest.mark.parametrize(("fault", "field"), [f[1:] for f in CATALOG_FAULTS], ids=[f[0] for f in CATALOG_FAULTS])
def test_a_bad_catalog_is_refused_by_field(fault: Callable[[pb.Catalog], object], field: str) -> None:
    message = pb.Catalog.FromString(codec.encode_catalog(a_layout().catalog).data)
    fault(message)
    with pytest.raises(ManifestError) as caught:
        codec.decode_catalog(message.SerializeToString())
    assert caught.value.field == field


BLOB_FAULTS: list[tuple[str, Callable[[pb.Blob], object], str]] = [
    ("flipped digest", lambda m: setattr(m, "digest", "0" * 64), "blob.digest"),
    ("kind", lambda m: setattr(m, "kind", 77), "blob.kind"),
    ("no kind", lambda m: setattr(m, "kind", 0), "blob.kind"),
    ("no zlib", lambda m: setattr(m, "packed", b"abc"), "blob.packed"),
    ("cut off", lambda m: setattr(m, "packed", m.packed[:-1]), "blob.nbytes"),
    ("trailing bytes", lambda m: setattr(m, "packed", m.packed + b"x"), "blob.nbytes"),
    ("understated", lambda m: setattr(m, "nbytes", m.nbytes - 1), "blob.nbytes"),
    ("overstated", lambda m: setattr(m, "nbytes", m.nbytes + 1), "blob.nbytes"),
    ("too large", lambda m: setattr(m, "nbytes", codec.MAX_BLOB_NBYTES + 1), "blob.nbytes"),
    ("bomb", lambda m: setattr(m, "packed", zlib.compress(bytes(200 << 20))), "blob.nbytes"),
]


@pytest.mark.parametrize(("fault", "field"), [f[1:] for f in BLOB_FAULTS], ids=[f[0] for f in BLOB_FAULTS])
def test_a_bad_blob_is_refused_by_field(fault: Callable[[pb.Blob], object], field: str) -> None:
    message = codec.pack(codec.encode_catalog(a_layout().catalog))
    fault(message)
    with pytest.raises(ManifestError) as caught:
        codec.unpack(message)
    assert caught.value.field == field


RECORD_FAULTS: list[tuple[str, Callable[[pb.Announcement], object], str]] = [
    ("no model", lambda m: m.ClearField("model"), "model.name"),
    ("no layout", lambda m: m.ClearField("layout"), "announcement.layout"),
    ("address cut off", lambda m: setattr(m, "address", m.address[:-1]), "binding.address"),
    ("negative address", lambda m: setattr(m, "address", patched(m.address, 2, -1)), "binding.address[2]"),
    ("fence", lambda m: setattr(m, "fence_address", 2**63), "binding.fence_address"),
    ("transport", lambda m: setattr(m.endpoint[1], "transport", ""), "binding.endpoints[1].transport"),
    ("endpoints", lambda m: m.endpoint.extend([m.endpoint[0]] * 15), "binding.endpoints"),
    ("description", lambda m: setattr(m.endpoint[0], "description", bytes((16 << 20) + 1)), "binding.endpoints[0].description"),
    ("attribute", lambda m: m.attributes.__setitem__("k", "v" * 5000), "binding.attributes[k]"),
    ("attributes", lambda m: m.attributes.update({str(i): "" for i in range(70)}), "binding.attributes"),
    ("host", lambda m: setattr(m, "host", "h" * 5000), "binding.host"),
]


@pytest.mark.parametrize(("fault", "field"), [f[1:] for f in RECORD_FAULTS], ids=[f[0] for f in RECORD_FAULTS])
def test_a_bad_announcement_is_refused_by_field(fault: Callable[[pb.Announcement], object], field: str) -> None:
    message, _ = codec.encode_offer(an_offer(), ModelKey("m"), {})
    fault(message)
    with pytest.raises(ManifestError) as caught:
        codec.decode_record(message)
    assert caught.value.field == field


@pytest.mark.parametrize("algorithm", ["", "m61\n1", "m" * 65])
def test_digests_name_their_algorithm(algorithm: str) -> None:
    with pytest.raises(ManifestError) as caught:
        codec.decode_digests(pb.Digests(piece=bytes(8), algorithm=algorithm).SerializeToString())
    assert caught.value.field == "digests.algorithm"


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/passwd", "a\\b", "C:x", "a\0b", "n" * 256])
def test_files_stay_inside_their_folder(name: str) -> None:
    with pytest.raises(ManifestError, match="plain file name"):
        codec.encode_files({name: b""})


def test_files_are_capped() -> None:
    with pytest.raises(ManifestError, match="at most 1048576"):
        codec.encode_files({"config.json": bytes(1 << 20)})


def test_noise_never_gets_in_and_never_does_worse_than_manifest_error() -> None:
    draw = random.Random(0)
    layout = a_layout()
    data = codec.encode_layout(layout, "c").data
    refused = 0
    for _ in range(2000):
        noisy = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            noisy[draw.randrange(len(noisy))] ^= 1 << draw.randrange(8)
        try:
            codec.decode_layout(bytes(noisy), lambda _: layout.catalog)
        except ManifestError:
            refused += 1
    assert refused > 500


def test_fields_of_the_future_survive_in_a_record() -> None:
    message, _ = codec.encode_offer(an_offer(), ModelKey("m"), {})
    future = message.SerializeToString() + bytes([0xFA, 0x3F, 3]) + b"new"  # field 1023, three bytes
    record = codec.decode_record(pb.Announcement.FromString(future))
    assert bytes([0xFA, 0x3F, 3]) + b"new" in record.body


def varint(number: int) -> bytes:
    low = [number >> at & 0x7F for at in range(0, max(number.bit_length(), 1), 7)]
    return bytes([byte | 0x80 for byte in low[:-1]] + low[-1:])


#: Elements of 2 or 3 bytes each, which a parser turns into some 70.
BOMBS: list[tuple[str, type[Message], bytes]] = [
    ("constants", pb.Layout, b"\x2a\0" * 1_100_000),
    ("constants whose tags are longer than they need be", pb.Layout, b"\xaa\0\0" * 1_100_000),
    ("names", pb.Catalog, b"\x0a\0" * 1_100_000),
    ("files", pb.Files, b"\x0a\0" * 1_100_000),
    ("endpoints", pb.AnnounceRequest, b"\x0a" + varint(2_200_000) + b"\x3a\0" * 1_100_000),
    ("attributes", pb.AnnounceRequest, b"\x0a" + varint(2_200_000) + b"\x52\0" * 1_100_000),
    ("digests", pb.HasBlobsRequest, b"\x0a\0" * 1_100_000),
    ("names, cut short", pb.Catalog, b"\x0a\0" * 1_100_000 + b"\x0a\x05"),
]


@pytest.mark.parametrize(("kind", "data"), [b[1:] for b in BOMBS], ids=[b[0] for b in BOMBS])
def test_a_message_of_too_many_parts_is_refused_before_it_takes_memory(kind: type[Message], data: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        codec.parse(kind, data, "message")
    assert str(caught.value) == "message: has more than 1000000 parts"


def test_a_large_message_of_few_parts_is_none_of_those() -> None:
    """Its columns hold the bytes with which a part could start."""
    data = pb.Layout(catalog="c", pieces=pb.Pieces(offset=b"\x2a" * 8_000_000), buffer_name=["b"]).SerializeToString()
    assert len(codec.parse(pb.Layout, data, "layout").pieces.offset) == 8_000_000


@given(st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=20))
def test_parts_are_counted_rightly(rows: list[tuple[str, bytes]]) -> None:
    """Against the parser, for one of everything that repeats."""
    message = pb.Layout(
        buffer_name=[name for name, _ in rows],
        constant=[pb.Constant(fill=fill) for _, fill in rows],
        alias=[pb.Pair(name=name, text=name) for name, _ in rows],
        parallel=pb.Parallel(tp=300),
    )
    parts, data = 3 * len(rows), message.SerializeToString()
    assert codec._parts(pb.Layout.DESCRIPTOR, data, 0, len(data), 1000) == parts
    assert codec._parts(pb.Layout.DESCRIPTOR, data, 0, len(data), 0) <= max(1, parts)
    assert sum(byte & 0x7F in codec._starts(pb.Layout.DESCRIPTOR) for byte in data) >= parts


def test_what_the_coordinator_parses_repeats_no_numbers() -> None:
    """A packed column of them would be one part and any amount of memory."""

    def check(kind: Descriptor) -> None:
        for field in kind.fields:
            assert not field.is_repeated or field.type in (field.TYPE_STRING, field.TYPE_BYTES, field.TYPE_MESSAGE), (
                field.full_name
            )
            if field.message_type is not None:
                check(field.message_type)

    for method in pb.DESCRIPTOR.services_by_name["Directory"].methods:
        check(method.input_type)
    for kind in (pb.Catalog, pb.Layout, pb.Digests, pb.Files):
        check(kind.DESCRIPTOR)


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_generated_code_is_that_of_the_proto_file() -> None:
    command = [sys.executable, str(ROOT / "tools" / "generate_protos.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "up to date", done.stdout + done.stderr
    assert done.returncode == 0
