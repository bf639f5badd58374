"""Our values <-> messages of `peerload.proto`. Outside client, server and store nobody sees a message.

What large things share is content-addressed: a catalog is one blob for all layouts of a model, a layout one blob for
all replicas, piece digests one blob for all replicas of the same weights. Encoding is deterministic. Decoding trusts
nothing: whatever it returns has passed every check of `model/`, and no column is long enough to overflow or to
fill the memory; otherwise it raises ManifestError naming the field.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import islice
from typing import Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from ..errors import ManifestError
from ..model.boxes import IntArray
from ..model.catalog import Catalog, ModelKey, Parallel
from ..model.layout import Constant, Layout, Pieces
from ..model.offer import ALGORITHM, Binding, Endpoint, Offer, SourceId
from ._generated import peerload_pb2 as pb
from .directory import MAX_RANKS, Record

#: Largest message gRPC lets through, bytes.
MAX_MESSAGE_NBYTES: Final = 100 << 20
#: Largest blob before compression, bytes. A layout of 100,000 pieces has 7 MB.
MAX_BLOB_NBYTES: Final = 64 << 20
MAX_FILES_NBYTES: Final = 1 << 20
MAX_ENDPOINTS: Final = 16
MAX_DESCRIPTION_NBYTES: Final = 16 << 20
MAX_ATTRIBUTES: Final = 64
MAX_TEXT: Final = 4096
#: Most elements of repeated fields (names, constants, endpoints) in one message, nested ones included. DeepSeek-V3 has 90,427
#: tensors. 64 MiB of empty ones would take 2.3 GB once parsed.
MAX_PARTS: Final = 1_000_000
#: Most constants of a layout, and most dimensions of one.
_MAX_CONSTANTS: Final = 100_000
_MAX_NDIM: Final = 64
#: Longest name of a digest's algorithm.
_MAX_ALGORITHM: Final = 64
#: Bounds under which sums and products of two columns stay inside int64.
_MAX_EXTENT: Final = 1 << 48
_MAX_NBYTES: Final = 1 << 60
#: Level 1 packs a 90,000-tensor catalog in 9 ms, level 6 in 27 ms and a third smaller.
_ZLIB_LEVEL: Final = 1

_M = TypeVar("_M", bound=Message)


class Kind(IntEnum):
    """What a blob holds; the numbers of `BlobKind`."""

    CATALOG = 1
    LAYOUT = 2
    DIGESTS = 3
    FILES = 4


@dataclass(frozen=True, slots=True)
class Blob:
    """`data` is uncompressed, `digest` its hexadecimal SHA-256."""

    kind: Kind
    digest: str
    data: bytes

    @classmethod
    def of(cls, kind: Kind, message: Message) -> Blob:
        data = message.SerializeToString(deterministic=True)
        return cls(kind, hashlib.sha256(data).hexdigest(), data)


def pack(blob: Blob) -> pb.Blob:
    """Raises ManifestError when it is too large to be sent."""
    if len(blob.data) > MAX_BLOB_NBYTES:
        raise ManifestError("blob.nbytes", f"a {blob.kind.name} has {len(blob.data)}, at most {MAX_BLOB_NBYTES} are allowed")
    packed = zlib.compress(blob.data, _ZLIB_LEVEL)
    return pb.Blob(kind=pb.BlobKind.ValueType(blob.kind), digest=blob.digest, nbytes=len(blob.data), packed=packed)


def unpack(message: pb.Blob) -> Blob:
    """Decompresses at most what the message admits to, and checks the digest."""
    if message.kind not in {int(kind) for kind in Kind}:
        raise ManifestError("blob.kind", f"{message.kind} is unknown")
    if message.nbytes > MAX_BLOB_NBYTES:
        raise ManifestError("blob.nbytes", f"is {message.nbytes}, at most {MAX_BLOB_NBYTES} are allowed")
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(message.packed, message.nbytes + 1)
    except zlib.error as error:
        raise ManifestError("blob.packed", f"does not decompress: {error}") from error
    if len(data) != message.nbytes or not inflater.eof or inflater.unused_data:
        raise ManifestError("blob.nbytes", f"is {message.nbytes}, but blob.packed holds another number of bytes")
    if hashlib.sha256(data).hexdigest() != message.digest:
        raise ManifestError("blob.digest", "is not the SHA-256 of the blob's bytes")
    return Blob(Kind(message.kind), message.digest, data)


def parse(message: type[_M], data: bytes, field: str) -> _M:
    """Raises ManifestError for what is no such message, and, before it takes memory, for one of more than MAX_PARTS parts."""
    kind = cast("Descriptor", message.DESCRIPTOR)
    if _most_parts(kind, data) > MAX_PARTS and _parts(kind, data, 0, len(data), MAX_PARTS) > MAX_PARTS:
        raise ManifestError(field, f"has more than {MAX_PARTS} parts")
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise ManifestError(field, f"is no {message.DESCRIPTOR.name} message") from error


@cache
def _starts(kind: Descriptor) -> frozenset[int]:
    """How an element of a repeated field can start, here or in a nested message: the low seven bits of its tag. (The eighth says
    whether more of the tag follows: https://protobuf.dev/programming-guides/encoding.)"""
    own = {number << 3 & 0x78 | 2 for number, field in kind.fields_by_number.items() if field.is_repeated}
    return frozenset(own).union(*(_starts(field.message_type) for field in kind.fields if field.message_type is not None))


def _most_parts(kind: Descriptor, data: bytes) -> int:
    """An upper bound of `_parts`, at the speed of memory. Needs a schema without repeated numbers: our columns are bytes."""
    if len(data) <= MAX_PARTS:
        return len(data)
    low = np.frombuffer(data, np.uint8) & 0x7F
    return sum(int(np.count_nonzero(low == start)) for start in _starts(kind))


def _parts(kind: Descriptor, data: bytes, start: int, stop: int, enough: int) -> int:
    """Elements of repeated fields in the message `data[start:stop]`, nested ones included; counts a little beyond `enough`. What
    is no message is counted up to where it goes wrong."""
    fields, count = kind.fields_by_number, 0
    try:
        while start < stop and count <= enough:
            tag, start = _varint(data, start)
            field, wire = fields.get(tag >> 3), tag & 7
            count += field is not None and field.is_repeated
            if wire == 2:
                length, start = _varint(data, start)
                if field is not None and field.message_type is not None:
                    count += _parts(field.message_type, data, start, min(start + length, stop), enough - count)
                start += length
            elif wire in (1, 5):
                start += 8 if wire == 1 else 4
            elif wire == 0:
                _, start = _varint(data, start)
            else:  # groups: none of our messages has one
                return enough + 1
    except IndexError:
        pass  # cut short: the parser says so
    return count


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The number that starts there, and where it ends."""
    number = shift = 0
    while True:
        byte = data[start]
        number |= (byte & 0x7F) << shift
        start += 1
        if byte < 0x80:
            return number, start
        shift += 7


def _bytes_of(column: IntArray) -> bytes:
    return np.ascontiguousarray(column, dtype="<i8").tobytes()


def _column(data: bytes, field: str, low: int = 0, high: int = _MAX_NBYTES) -> IntArray:
    if len(data) % 8:
        raise ManifestError(field, f"has {len(data)} bytes, which is no whole number of int64")
    column = np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)
    outside = (column < low) | (column > high)
    if outside.any():
        row = int(np.argmax(outside))
        problem = "is negative" if low == 0 and column[row] < 0 else f"is {int(column[row])}, must be {low} to {high}"
        raise ManifestError(f"{field}[{row}]", problem)
    return column


def _table(data: bytes, field: str, width: int, low: int = 0, high: int = _MAX_NBYTES) -> IntArray:
    column = _column(data, field, low, high)
    if len(column) % width:
        raise ManifestError(field, f"has {len(column)} numbers, which are no rows of {width}")
    return column.reshape(-1, width)


def _pairs(mapping: Mapping[str, str]) -> list[pb.Pair]:
    return [pb.Pair(name=name, text=text) for name, text in sorted(mapping.items())]


# Blobs.


def encode_catalog(catalog: Catalog) -> Blob:
    dtypes = sorted(set(catalog.dtypes))
    row = {dtype: i for i, dtype in enumerate(dtypes)}
    extents = np.fromiter((e for shape in catalog.shapes for e in shape), np.int64)
    message = pb.Catalog(
        name=catalog.names,
        dtype_name=dtypes,
        dtype=bytes(map(row.__getitem__, catalog.dtypes)),
        ndim=bytes(map(len, catalog.shapes)),
        extent=_bytes_of(extents),
    )
    return Blob.of(Kind.CATALOG, message)


def decode_catalog(data: bytes) -> Catalog:
    message = parse(pb.Catalog, data, "catalog")
    n = len(message.name)
    for field, column in (("dtype", message.dtype), ("ndim", message.ndim)):
        if len(column) != n:
            raise ManifestError(f"catalog.{field}", f"has {len(column)} rows for {n} names")
    extents = _column(message.extent, "catalog.extent", 1, _MAX_EXTENT)
    if sum(message.ndim) != len(extents):
        raise ManifestError("catalog.extent", f"has {len(extents)} numbers, the shapes need {sum(message.ndim)}")
    if n and max(message.dtype) >= len(message.dtype_name):
        raise ManifestError("catalog.dtype", f"row {max(message.dtype)} is none of {len(message.dtype_name)} dtypes")
    names = tuple(message.name)
    if len(set(names)) != n:  # before Catalog looks for the culprit, in quadratic time
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ManifestError("catalog.name", f"{twice!r} appears more than once")
    dtypes, numbers = tuple(message.dtype_name), iter(extents.tolist())
    shapes = tuple(tuple(islice(numbers, ndim)) for ndim in message.ndim)
    catalog = Catalog(names, tuple(dtypes[row] for row in message.dtype), shapes)
    huge = np.prod(catalog.shape, axis=1, dtype=np.float64) * catalog.itemsize > _MAX_NBYTES
    if huge.any():
        name = names[int(np.argmax(huge))]
        raise ManifestError(f"catalog[{name}].shape", f"{catalog.shapes[int(np.argmax(huge))]} is too large")
    return catalog


def encode_layout(layout: Layout, catalog: str) -> Blob:
    """`catalog`: the digest of the layout's catalog blob."""
    p = layout.pieces
    message = pb.Layout(
        catalog=catalog,
        buffer_name=layout.buffer_names,
        buffer_nbytes=_bytes_of(layout.buffer_nbytes),
        pieces=pb.Pieces(
            width=p.start.shape[1],
            tensor=_bytes_of(p.tensor),
            start=_bytes_of(p.start),
            stop=_bytes_of(p.stop),
            buffer=_bytes_of(p.buffer),
            offset=_bytes_of(p.offset),
            stride=_bytes_of(p.stride),
        ),
        constant=[
            pb.Constant(buffer=c.buffer, offset=c.offset, shape=_numbers(c.shape), stride=_numbers(c.strides), fill=c.fill)
            for c in layout.constants
        ],
        alias=_pairs(layout.aliases),
        ignored=_pairs(layout.ignored),
        parallel=encode_parallel(layout.parallel),
        rank=_rank(layout.rank, "layout.rank"),
    )
    return Blob.of(Kind.LAYOUT, message)


def decode_layout(data: bytes, catalog_of: Callable[[str], Catalog]) -> Layout:
    """`catalog_of` maps the digest that the layout states to the catalog."""
    message = parse(pb.Layout, data, "layout")
    p, width = message.pieces, message.pieces.width
    catalog = catalog_of(message.catalog)
    if width != catalog.width:
        raise ManifestError("layout.pieces.width", f"is {width}, the catalog's is {catalog.width}")
    pieces = Pieces(
        tensor=_column(p.tensor, "layout.pieces.tensor"),
        start=_table(p.start, "layout.pieces.start", width, 0, _MAX_EXTENT),
        stop=_table(p.stop, "layout.pieces.stop", width, 0, _MAX_EXTENT),
        buffer=_column(p.buffer, "layout.pieces.buffer"),
        offset=_column(p.offset, "layout.pieces.offset"),
        stride=_table(p.stride, "layout.pieces.stride", width, -_MAX_NBYTES),
    )
    if len(message.constant) > _MAX_CONSTANTS:
        raise ManifestError("layout.constants", f"are {len(message.constant)}, at most {_MAX_CONSTANTS} are allowed")
    reach = np.abs((pieces.stop - pieces.start - 1) * np.abs(pieces.stride).astype(np.float64)).sum(axis=1)
    if (reach > _MAX_NBYTES).any():
        raise ManifestError(f"layout.pieces[{int(np.argmax(reach > _MAX_NBYTES))}].stride", "reaches beyond any buffer")
    return Layout(
        catalog=catalog,
        buffer_names=tuple(message.buffer_name),
        buffer_nbytes=_column(message.buffer_nbytes, "layout.buffer_nbytes"),
        pieces=pieces,
        constants=tuple(_constant(c, f"layout.constants[{i}]") for i, c in enumerate(message.constant)),
        aliases={pair.name: pair.text for pair in message.alias},
        ignored={pair.name: pair.text for pair in message.ignored},
        parallel=decode_parallel(message.parallel),
        rank=message.rank,
    )


def _numbers(numbers: Sequence[int]) -> bytes:
    return _bytes_of(np.array(numbers, np.int64))


def _constant(message: pb.Constant, field: str) -> Constant:
    for name, data in (("shape", message.shape), ("stride", message.stride)):
        if len(data) > 8 * _MAX_NDIM:
            raise ManifestError(f"{field}.{name}", f"has {len(data)} bytes, at most {8 * _MAX_NDIM} are allowed")
    shape = tuple(_column(message.shape, f"{field}.shape", 1, _MAX_EXTENT).tolist())
    stride = tuple(_column(message.stride, f"{field}.stride", -_MAX_NBYTES).tolist())
    span = sum(abs(n * step) for n, step in zip(shape, stride, strict=False))
    if max(abs(message.offset), span) > _MAX_NBYTES:
        raise ManifestError(f"{field}.shape", "reaches beyond any buffer")
    return Constant(message.buffer, message.offset, shape, stride, message.fill)


def encode_digests(digests: npt.NDArray[np.uint64], algorithm: str = ALGORITHM) -> Blob:
    piece = np.ascontiguousarray(digests, dtype="<u8").tobytes()
    return Blob.of(Kind.DIGESTS, pb.Digests(piece=piece, algorithm=algorithm))


def decode_digests(data: bytes) -> tuple[npt.NDArray[np.uint64] | None, str]:
    """The digests and their algorithm. Those of an algorithm that we don't know may have any form: they are None."""
    message = parse(pb.Digests, data, "digests")
    column, algorithm = message.piece, message.algorithm
    if not algorithm or len(algorithm) > _MAX_ALGORITHM or not algorithm.isprintable():
        raise ManifestError("digests.algorithm", f"{algorithm[:_MAX_ALGORITHM]!r} is no name of an algorithm")
    if algorithm != ALGORITHM:
        return None, algorithm
    if len(column) % 8:
        raise ManifestError("digests.piece", f"has {len(column)} bytes, which is no whole number of uint64")
    return np.frombuffer(column, dtype="<u8").astype(np.uint64, copy=False), algorithm


def encode_files(files: Mapping[str, bytes]) -> Blob:
    blob = Blob.of(Kind.FILES, pb.Files(file=[pb.File(name=name, content=files[name]) for name in sorted(files)]))
    decode_files(blob.data)
    return blob


def decode_files(data: bytes) -> dict[str, bytes]:
    """Names are plain file names: whoever writes them into a folder stays inside it."""
    message = parse(pb.Files, data, "files")
    if len(data) > MAX_FILES_NBYTES:
        raise ManifestError("files", f"have {len(data)} bytes, at most {MAX_FILES_NBYTES} are allowed")
    for file in message.file:
        if not 1 <= len(file.name) <= 255 or file.name in (".", "..") or set(file.name) & set("/\\:\0"):
            raise ManifestError("files.name", f"{file.name[:80]!r} is no plain file name")
    return {file.name: file.content for file in message.file}


# What is announced.


def encode_parallel(parallel: Parallel) -> pb.Parallel:
    return pb.Parallel(tp=parallel.tp, pp=parallel.pp, ep=parallel.ep)


def decode_parallel(message: pb.Parallel) -> Parallel:
    return Parallel(message.tp, message.pp, message.ep)


def encode_model(model: ModelKey) -> pb.ModelKey:
    return pb.ModelKey(name=model.name, revision=model.revision)


def decode_model(message: pb.ModelKey) -> ModelKey:
    return ModelKey(message.name, message.revision)


def encode_source(source: SourceId) -> pb.Source:
    return pb.Source(instance=source.instance, rank=_rank(source.rank, "source.rank"), generation=source.generation)


def decode_source(message: pb.Source) -> SourceId:
    return SourceId(message.instance, message.rank, message.generation)


def _rank(rank: int, field: str) -> int:
    if not 0 <= rank < MAX_RANKS:
        raise ManifestError(field, f"is {rank}, must be 0 to {MAX_RANKS - 1}")
    return rank


def encode_offer(offer: Offer, model: ModelKey, files: Mapping[str, bytes]) -> tuple[pb.Announcement, list[Blob]]:
    """The announcement, and the blobs it stands on in the order in which they must be put."""
    binding = offer.binding
    blobs = [encode_catalog(offer.layout.catalog)]
    layout = encode_layout(offer.layout, blobs[0].digest)
    blobs.append(layout)
    message = pb.Announcement(
        model=encode_model(model),
        source=encode_source(binding.source),
        layout=layout.digest,
        address=_bytes_of(binding.address),
        endpoint=[pb.Endpoint(transport=e.transport, description=e.description) for e in binding.endpoints],
        fence_address=binding.fence_address,
        host=binding.host,
        attributes=dict(binding.attributes),
    )
    if binding.digests is not None:
        blobs.append(encode_digests(binding.digests, binding.algorithm))
        message.digests = blobs[-1].digest
    if files:
        blobs.append(encode_files(files))
        message.files = blobs[-1].digest
    return message, blobs


def decode_offer(
    message: pb.Announcement, layout: Layout, digests: npt.NDArray[np.uint64] | None, algorithm: str = ALGORITHM
) -> Offer:
    """`layout`, and `digests` with their `algorithm`: the decoded blobs that the announcement names."""
    return Offer(
        layout,
        Binding(
            source=decode_source(message.source),
            address=_column(message.address, "binding.address"),
            endpoints=tuple(Endpoint(e.transport, e.description) for e in message.endpoint),
            digests=digests,
            fence_address=message.fence_address,
            host=message.host,
            attributes=dict(message.attributes),
            algorithm=algorithm,
        ),
    )


def decode_record(message: pb.Announcement) -> Record:
    """What the directory keeps: the announcement as it came, unknown fields included."""
    if not message.layout:
        raise ManifestError("announcement.layout", "is empty")
    _column(message.address, "binding.address")
    if len(message.endpoint) > MAX_ENDPOINTS:
        raise ManifestError("binding.endpoints", f"are {len(message.endpoint)}, at most {MAX_ENDPOINTS} are allowed")
    for i, endpoint in enumerate(message.endpoint):
        if not endpoint.transport or len(endpoint.transport) > MAX_TEXT:
            raise ManifestError(f"binding.endpoints[{i}].transport", "is empty or too long")
        if len(endpoint.description) > MAX_DESCRIPTION_NBYTES:
            raise ManifestError(f"binding.endpoints[{i}].description", f"has {len(endpoint.description)} bytes")
    if message.fence_address >= 1 << 63:
        raise ManifestError("binding.fence_address", f"{message.fence_address:#x} is no address")
    texts = {"host": message.host, **{f"attributes[{k[:80]}]": k + v for k, v in message.attributes.items()}}
    if len(message.attributes) > MAX_ATTRIBUTES:
        raise ManifestError("binding.attributes", f"are {len(message.attributes)}, at most {MAX_ATTRIBUTES} are allowed")
    for name, text in texts.items():
        if len(text) > MAX_TEXT:
            raise ManifestError(f"binding.{name}", f"has {len(text)} characters, at most {MAX_TEXT} are allowed")
    return Record(
        model=decode_model(message.model),
        source=decode_source(message.source),
        body=message.SerializeToString(deterministic=True),
        blobs=tuple(filter(None, (message.layout, message.digests, message.files))),
    )
