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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError
from .boxes import BoolArray, Box, IntArray, byte_extents, disjoint_bytes, injective, pad_left
from .catalog import Catalog, Parallel, TensorSpec, frozen


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
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    parallel: Parallel = Parallel()  # noqa: RUF009 - frozen
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
        """Raise ManifestError unless no byte of any buffer belongs to two written pieces or constants."""
        if self._clash is not None:
            raise ManifestError("layout.pieces", "{} and {} share a byte of one buffer".format(*self._clash))

    @cached_property
    def _clash(self) -> tuple[str, str] | None:
        """Two pieces or constants that share a byte, in words."""
        base = np.cumsum(self.buffer_nbytes) - self.buffer_nbytes  # buffers side by side, so that one check serves all
        rows, p, width = self.written, self.pieces, self.catalog.width
        at, itemsize = base[p.buffer[rows]] + p.offset[rows], self.catalog.itemsize[p.tensor[rows]]
        spans = [(at, (p.stop - p.start)[rows], p.stride[rows], itemsize)]
        depth = max([width, *(len(c.shape) for c in self.constants)])
        for c in self.constants:
            shape, steps = np.array([c.shape], np.int64), np.array([c.strides], np.int64)
            spans.append((base[[c.buffer]] + c.offset, shape, steps, np.array([len(c.fill)], np.int64)))
        offset, itemsize = (np.concatenate([s[i] for s in spans]) for i in (0, 3))
        shape = np.concatenate([pad_left(s[1], depth, 1) for s in spans])
        stride = np.concatenate([pad_left(s[2], depth, 0) for s in spans])
        clash = disjoint_bytes(offset, shape, stride, itemsize)
        if clash is None:
            return None
        first, second = (self.describe(int(rows[i])) if i < len(rows) else "a constant" for i in clash)
        return first, second

    def prove_cover(self) -> None:
        """Raise ManifestError unless every byte of every buffer is a written piece's or a constant's."""
        self.prove_disjoint()
        held = np.bincount(self.pieces.buffer[self.written], self.piece_nbytes[self.written], len(self.buffer_names))
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
