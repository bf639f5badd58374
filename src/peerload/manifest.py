"""Who holds which box of which logical tensor, at which byte: the values that everything else speaks in.

Two halves with different lifetimes. A `Layout` says where boxes of logical tensors lie in a rank's buffers; a thousand
replicas share one. A `Binding` says where one process has put those buffers and how to reach them; it lives as long as
a lease. Together they are an `Offer`.

Thousands are objects, millions are arrays: tensors, buffers and pieces are columns. Arrays are read-only int64; a row's
box is padded on the left to the catalog's `width` dimensions with `[0, 1)` and stride 0.
Pure: standard library and NumPy only.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import ManifestError, printable
from .geometry import BoolArray, Box, IntArray, byte_extents, disjoint_bytes, injective, pad_left

#: Bytes per element, by safetensors dtype name (https://github.com/huggingface/safetensors, `Dtype`).
ITEMSIZE: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

MAX_DIMENSIONS: Final = 8


def _refuse_unprintable(field: str, name: str) -> None:
    """Names are printed and logged by everybody who hears of them."""
    if printable(name) != name or "\n" in name or "\t" in name:
        raise ManifestError(field, f"{name!r:.100} has a control character")


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """What two instances must agree on before they may exchange weights. Parallelism is no part of it."""

    name: str
    revision: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ManifestError("model.name", "is empty")
        _refuse_unprintable("model.name", self.name)
        _refuse_unprintable("model.revision", self.revision)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """Sizes of the parallel dimensions of an instance: tensor, pipeline and expert."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise ManifestError(f"parallel.{name}", f"is {getattr(self, name)}, must be at least 1")

    def __str__(self) -> str:
        extra = "".join(f",{n}={v}" for n, v in (("pp", self.pp), ("ep", self.ep)) if v > 1)
        return f"tp={self.tp}{extra}"


class TensorSpec(NamedTuple):
    """A logical tensor, named as the checkpoint names it. `dtype` is a safetensors name, a key of `ITEMSIZE`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def frozen(values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[np.int64]:
    """A read-only contiguous array; copies only when it must."""
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.flags.writeable:
        array = array.copy() if array is values else array
        array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Catalog:
    """All logical tensors of a model, whoever holds them. The list both sides of a plan are checked against."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ManifestError("catalog", "names, dtypes and shapes differ in length")
        if len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ManifestError("catalog.names", f"{twice!r} appears more than once")
        unknown = set(self.dtypes) - ITEMSIZE.keys()
        if unknown:
            row = next(i for i, d in enumerate(self.dtypes) if d in unknown)
            raise ManifestError(f"catalog[{self.names[row]}].dtype", f"{self.dtypes[row]!r} is none of {', '.join(ITEMSIZE)}")
        if self.shapes and (min(map(min, filter(None, self.shapes)), default=1) < 1):
            row = next(i for i, s in enumerate(self.shapes) if s and min(s) < 1)
            raise ManifestError(f"catalog[{self.names[row]}].shape", f"{self.shapes[row]} has an extent below 1")
        if self.width > MAX_DIMENSIONS:
            raise ManifestError("catalog.shapes", f"a tensor has {self.width} dimensions, at most {MAX_DIMENSIONS} are allowed")

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Catalog:
        rows = list(specs)
        return cls(tuple(r.name for r in rows), tuple(r.dtype for r in rows), tuple(tuple(r.shape) for r in rows))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> TensorSpec:
        return TensorSpec(self.names[row], self.dtypes[row], self.shapes[row])

    def __iter__(self) -> Iterator[TensorSpec]:
        return map(TensorSpec, self.names, self.dtypes, self.shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Catalog):
            return NotImplemented
        return self is other or (self.names, self.dtypes, self.shapes) == (other.names, other.dtypes, other.shapes)

    __hash__ = object.__hash__

    @cached_property
    def row(self) -> Mapping[str, int]:
        """Row by name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def width(self) -> int:
        """The widest tensor's number of dimensions, at least 1."""
        return max(map(len, self.shapes), default=1) or 1

    @cached_property
    def shape(self) -> IntArray:
        """[n, width], padded on the left with 1."""
        width = self.width
        padded = [(1,) * (width - len(s)) + s for s in self.shapes]
        return frozen(np.array(padded, np.int64).reshape(len(self.shapes), width))

    @cached_property
    def itemsize(self) -> IntArray:
        """[n], bytes."""
        return frozen(np.fromiter((ITEMSIZE[d] for d in self.dtypes), np.int64, len(self.dtypes)))

    @cached_property
    def nbytes(self) -> int:
        return int((self.shape.prod(axis=1) * self.itemsize).sum())


def is_derived(name: str) -> bool:
    """Is it a logical tensor that no checkpoint holds, made of one by an engine's loader (`x.weight as F32`)? Its name has a
    space, as no checkpoint's has."""
    return " " in name


class Piece(NamedTuple):
    """One row of `Pieces`, for people: `box` of tensor `tensor` (catalog row) lies in buffer `buffer` (layout row)
    from byte `offset`, index k of dimension d being `strides[d]` bytes further."""

    tensor: int
    box: Box
    buffer: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Columns: tensor[n], start[n, width], stop[n, width], buffer[n], offset[n] (bytes), stride[n, width] (bytes)."""

    tensor: IntArray
    start: IntArray
    stop: IntArray
    buffer: IntArray
    offset: IntArray
    stride: IntArray

    def __post_init__(self) -> None:
        n = len(self.tensor)
        for name in ("tensor", "start", "stop", "buffer", "offset", "stride"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        if not (len(self.buffer) == len(self.offset) == n and self.start.shape == self.stop.shape == self.stride.shape):
            raise ManifestError("layout.pieces", "columns differ in length")
        if self.start.ndim != 2 or len(self.start) != n:
            raise ManifestError("layout.pieces", "start, stop and stride must be [pieces, dimensions]")

    @classmethod
    def of(cls, rows: Sequence[Piece], width: int) -> Pieces:
        """Rows of boxes with the tensor's own number of dimensions, padded to `width`."""
        n = len(rows)
        start, stop, stride = np.zeros((n, width), np.int64), np.ones((n, width), np.int64), np.zeros((n, width), np.int64)
        for i, piece in enumerate(rows):
            ndim = len(piece.strides)
            if ndim:
                start[i, -ndim:], stop[i, -ndim:], stride[i, -ndim:] = piece.box.start, piece.box.stop, piece.strides
        tensor, buffer, offset = (np.array([r[i] for r in rows], np.int64) for i in (0, 2, 3))
        return cls(tensor, start, stop, buffer, offset, stride)

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: npt.NDArray[np.generic]) -> Pieces:
        """The rows picked by an index or boolean array."""
        return Pieces(
            self.tensor[rows], self.start[rows], self.stop[rows], self.buffer[rows], self.offset[rows], self.stride[rows]
        )

    def box(self, row: int, ndim: int) -> Box:
        cut = self.start.shape[1] - ndim
        return Box(tuple(self.start[row, cut:].tolist()), tuple(self.stop[row, cut:].tolist()))


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes the target's own loader writes and nobody sends (padding, zeroed biases): `fill` repeated at every index.

    `strides` and `offset` are bytes; `len(fill)` is the itemsize."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fill: bytes


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes no box describes (repacked, swizzled, requantized): copied only from the same `name` with an equal `tag`.

    `covers` lists the logical tensors whose values went into it, `reason` says why it can't be described."""

    name: str
    tag: str
    buffer: int
    offset: int
    nbytes: int
    covers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where one rank of an instance keeps its part of the model.

    `aliases` maps a tied tensor's name to the name it shares bytes with (`lm_head.weight` -> `model.embed_tokens.weight`).
    `ignored` names logical tensors the engine deliberately does not keep, each with the reason.
    """

    catalog: Catalog
    buffer_names: tuple[str, ...]
    buffer_nbytes: IntArray
    pieces: Pieces
    constants: tuple[Constant, ...] = ()
    opaques: tuple[Opaque, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    parallel: Parallel = Parallel()
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffer_nbytes", frozen(self.buffer_nbytes))
        _check_layout(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces: what this rank needs or holds, tied tensors once per name."""
        return int(self.piece_nbytes.sum())

    @cached_property
    def piece_nbytes(self) -> IntArray:
        p = self.pieces
        return frozen((p.stop - p.start).prod(axis=1) * self.catalog.itemsize[p.tensor])

    @cached_property
    def written(self) -> IntArray:
        """Rows of the pieces a loader has to write: all but those of tied names, whose bytes another name writes."""
        tied = [self.catalog.row[name] for name in self.aliases]
        return frozen(np.flatnonzero(~np.isin(self.pieces.tensor, tied)))

    def prove_disjoint(self) -> None:
        """Raise ManifestError unless no byte of any buffer belongs to two written pieces, opaques or constants."""
        if not self._disjoint:
            base = np.cumsum(self.buffer_nbytes) - self.buffer_nbytes  # buffers side by side, so that one check serves all
            rows, p, width = self.written, self.pieces, self.catalog.width
            spans = [
                (
                    base[p.buffer[rows]] + p.offset[rows],
                    (p.stop - p.start)[rows],
                    p.stride[rows],
                    self.catalog.itemsize[p.tensor[rows]],
                )
            ]
            depth = max([width, *(len(c.shape) for c in self.constants)])
            for o in self.opaques:
                shape, steps = np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64)
                spans.append((base[[o.buffer]] + o.offset, shape, steps, np.array([o.nbytes], np.int64)))
            for c in self.constants:
                shape, steps = np.array([c.shape], np.int64), np.array([c.strides], np.int64)
                spans.append((base[[c.buffer]] + c.offset, shape, steps, np.array([len(c.fill)], np.int64)))
            offset, itemsize = (np.concatenate([s[i] for s in spans]) for i in (0, 3))
            shape = np.concatenate([pad_left(s[1], depth, 1) for s in spans])
            stride = np.concatenate([pad_left(s[2], depth, 0) for s in spans])
            clash = disjoint_bytes(offset, shape, stride, itemsize)
            if clash is not None:
                names = [self.describe(int(rows[i])) if i < len(rows) else "a constant or opaque region" for i in clash]
                raise ManifestError("layout.pieces", f"{names[0]} and {names[1]} share a byte of one buffer")
            self.__dict__["_disjoint"] = True

    _disjoint = False

    def prove_cover(self) -> None:
        """Raise ManifestError unless every byte of every buffer is a written piece's, an opaque's or a constant's."""
        self.prove_disjoint()
        held = np.bincount(self.pieces.buffer[self.written], self.piece_nbytes[self.written], len(self.buffer_names))
        for o in self.opaques:
            held[o.buffer] += o.nbytes
        for c in self.constants:
            held[c.buffer] += math.prod(c.shape) * len(c.fill)
        short = np.flatnonzero(held.astype(np.int64) != self.buffer_nbytes)
        if len(short):
            name, missing = self.buffer_names[short[0]], int(self.buffer_nbytes[short[0]] - held[short[0]])
            raise ManifestError(
                f"layout.buffers[{name}]", f"{missing} bytes are neither a checkpoint tensor's nor a stated constant"
            )

    def tensor_of(self, piece: int) -> TensorSpec:
        return self.catalog[int(self.pieces.tensor[piece])]

    def box_of(self, piece: int) -> Box:
        return self.pieces.box(piece, len(self.tensor_of(piece).shape))

    def describe(self, piece: int) -> str:
        return f"{self.tensor_of(piece).name}{self.box_of(piece)}"


def _check_layout(layout: Layout) -> None:
    """Raise ManifestError for rows that point outside their tensor or buffer, or whose strides fold onto themselves."""
    catalog, pieces = layout.catalog, layout.pieces
    if len(layout.buffer_names) != len(layout.buffer_nbytes):
        raise ManifestError("layout.buffers", "names and sizes differ in length")
    if (layout.buffer_nbytes < 0).any():
        raise ManifestError(f"layout.buffers[{int(np.argmax(layout.buffer_nbytes < 0))}].nbytes", "is negative")

    def refuse(bad: BoolArray, column: str, problem: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            tensor = int(pieces.tensor[row])
            name = catalog.names[tensor] if 0 <= tensor < len(catalog) else f"tensor {tensor}"
            raise ManifestError(f"layout.pieces[{row}].{column}", f"({name}) {problem}")

    refuse((pieces.tensor < 0) | (pieces.tensor >= len(catalog)), "tensor", "is no row of the catalog")
    refuse((pieces.buffer < 0) | (pieces.buffer >= len(layout.buffer_names)), "buffer", "is no buffer of this layout")
    if pieces.start.shape[1] != catalog.width:
        raise ManifestError("layout.pieces.start", f"has {pieces.start.shape[1]} dimensions, the catalog {catalog.width}")
    shape = pieces.stop - pieces.start
    refuse(np.any(pieces.start < 0, axis=1), "start", "is negative")
    refuse(np.any(shape < 1, axis=1), "stop", "does not lie past start")
    refuse(np.any(pieces.stop > catalog.shape[pieces.tensor], axis=1), "stop", "lies outside the tensor")
    itemsize = catalog.itemsize[pieces.tensor]
    low, high = byte_extents(pieces.offset, shape, pieces.stride, itemsize)
    refuse((low < 0) | (high > layout.buffer_nbytes[pieces.buffer]), "offset", "reaches outside its buffer")
    refuse(~injective(shape, pieces.stride, itemsize), "stride", "puts two elements on the same byte")
    for i, opaque in enumerate(layout.opaques):
        if not 0 <= opaque.buffer < len(layout.buffer_names):
            raise ManifestError(f"layout.opaques[{i}].buffer", "is no buffer of this layout")
        if opaque.nbytes < 1 or opaque.offset < 0 or opaque.offset + opaque.nbytes > layout.buffer_nbytes[opaque.buffer]:
            raise ManifestError(f"layout.opaques[{i}].offset", f"({opaque.name}) reaches outside its buffer")
    for i, constant in enumerate(layout.constants):
        if not 0 <= constant.buffer < len(layout.buffer_names):
            raise ManifestError(f"layout.constants[{i}].buffer", "is no buffer of this layout")
        if len(constant.shape) != len(constant.strides) or not constant.fill:
            raise ManifestError(f"layout.constants[{i}]", "shape, strides and fill do not fit together")
        columns = (np.array([constant.offset]), np.array([constant.shape], np.int64), np.array([constant.strides], np.int64))
        low, high = byte_extents(*columns, np.array([len(constant.fill)]))
        if low[0] < 0 or high[0] > layout.buffer_nbytes[constant.buffer]:
            raise ManifestError(f"layout.constants[{i}].offset", "reaches outside its buffer")
    for name, other in layout.aliases.items():
        if name not in catalog.row or other not in catalog.row:
            raise ManifestError(f"layout.aliases[{name}]", f"{name!r} or {other!r} is not in the catalog")


@dataclass(frozen=True, slots=True, order=True)
class SourceId:
    """One rank of one instance in one life. `generation` changes when the process restarts or its weights change. A seed's has
    32 hex digits, of which the last 8 count the changes: all ranks of an instance change their weights together, so only ranks
    with the same number hold parts of the same weights."""

    instance: str
    rank: int
    generation: str

    def __post_init__(self) -> None:
        _refuse_unprintable("source.instance", self.instance)
        _refuse_unprintable("source.generation", self.generation)

    @classmethod
    def new(cls, instance: str, rank: int, changes: int) -> SourceId:
        return cls(instance, rank, f"{uuid.uuid4().hex[:24]}{changes % (1 << 32):08x}")

    @property
    def changes(self) -> int:
        """How often the weights had changed since the seed began; 0 where the generation isn't a seed's."""
        seeds = len(self.generation) == 32 and set(self.generation) <= set("0123456789abcdef")
        return int(self.generation[24:], 16) if seeds else 0

    def __str__(self) -> str:
        return f"{self.instance}/rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How one transport reaches a process; `description` is the transport's own and opaque to everyone else."""

    transport: str
    description: bytes


#: What a fence holds: the generation, as bytes.
FENCE_NBYTES: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """Where one process has put the buffers of its layout, and how to reach it.

    address: [buffers], each buffer's first byte in the process's address space.
    digests: [pieces] uint64 of `digest.py`, or None when the seed was told not to compute them.
    fence_address: 16 bytes that hold the generation as long as the buffers hold its weights; 0 when there is none.
    host: identifies the machine (boot id), so that same-host transports know when they apply.
    """

    source: SourceId
    address: IntArray
    endpoints: tuple[Endpoint, ...]
    digests: npt.NDArray[np.uint64] | None = None
    fence_address: int = 0
    host: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", frozen(self.address))
        if (self.address < 0).any():
            raise ManifestError(f"binding.address[{int(np.argmax(self.address < 0))}]", "is negative")


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A layout that somebody holds: everything a planner needs to know about one source rank."""

    layout: Layout
    binding: Binding

    def __post_init__(self) -> None:
        if len(self.binding.address) != len(self.layout.buffer_names):
            raise ManifestError(
                "binding.address", f"has {len(self.binding.address)} rows for {len(self.layout.buffer_names)} buffers"
            )
        digests = self.binding.digests
        if digests is not None and len(digests) != len(self.layout.pieces):
            raise ManifestError("binding.digests", f"has {len(digests)} rows for {len(self.layout.pieces)} pieces")

    @property
    def source(self) -> SourceId:
        return self.binding.source
