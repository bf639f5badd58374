"""From the words of `vocabulary.py` to `Layout`s: layers are worked out once per (rank, parallel) and stamped out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import ITEMSIZE, Catalog, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces

from .vocabulary import Model, Param, Part, Stack, chunk

SINGLE = Parallel()


@cache
def _catalog(stacks: tuple[tuple[tuple[str, ...], tuple[TensorSpec, ...]], ...]) -> Catalog:
    return Catalog.of(
        TensorSpec(prefix + name, dtype, shape)
        for prefixes, specs in stacks
        for prefix in prefixes
        for name, dtype, shape in specs
    )


@cache
def _specs(params: tuple[Param, ...]) -> tuple[TensorSpec, ...]:
    return tuple(sorted({spec for param in params for spec in param.tensors()}))


@cache
def catalog(model: Model) -> Catalog:
    """The model's logical tensors in stack order. Models that differ only in how they are held share one object."""
    stacks = (Stack(model.before), *model.layers, Stack(model.after))
    tied = [_specs(model.before)[0]._replace(name=name) for name, _ in model.aliases]
    return _catalog((*((tuple(s.names()), _specs(s.params)) for s in stacks), (("",), tuple(tied))))


@dataclass(slots=True)
class _Sheet:
    """One layer's buffers, pieces and constants; tensors by name inside the layer, buffers counted from 0."""

    tensors: list[str] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def add(self, param: Param, tp: int, ep: int, rank: int) -> None:
        if not param.experts:
            self._buffer(param, param.name, (), rank, tp)
            return
        size = tp // ep
        experts = tuple(range(*chunk(param.experts, rank // size, ep)))
        if "{e}" in param.name:
            for expert in experts:
                self._buffer(param, param.name.format(e=expert), (expert,), rank % size, size)
        elif experts:
            self._buffer(param, param.name, experts, rank % size, size)

    def _buffer(self, param: Param, name: str, experts: tuple[int, ...], rank: int, size: int) -> None:
        slots = [_slot(part, rank, size) for part in param.parts]
        shape = (sum(s.rows for s in slots), *next((s.tail for s in slots if s.rows), ()))
        if not math.prod(shape):
            return
        itemsize = ITEMSIZE[param.parts[0].dtype]
        strides = _strides(shape, itemsize, param.transposed)
        expert_nbytes = math.prod(shape) * itemsize
        row = 0
        for part, slot in zip(param.parts, slots, strict=True):
            offset = row * strides[0]
            own = strides if part.shape else ()
            held = 0
            if slot.box is not None:
                held = slot.box.shape[0] if part.shape else 1
                self._pieces(part.tensor, slot.box, experts, offset, own, expert_nbytes)
            for i in range(len(experts) or 1) if held < slot.rows else ():
                at = i * expert_nbytes + offset + held * strides[0]
                self.constants.append(Constant(len(self.names), at, (slot.rows - held, *slot.tail), strides, bytes(itemsize)))
            row += slot.rows
        self.names.append(name)
        self.nbytes.append(expert_nbytes * max(1, len(experts)))

    def _pieces(
        self, tensor: str, box: Box, experts: tuple[int, ...], offset: int, strides: tuple[int, ...], expert_nbytes: int
    ) -> None:
        if experts and "{e}" not in tensor:
            box = Box((experts[0], *box.start), (experts[-1] + 1, *box.stop))
            experts, strides = (), (expert_nbytes, *strides)
        for i, expert in enumerate(experts or (0,)):
            self.tensors.append(tensor.format(e=expert))
            self.pieces.append(Piece(0, box, len(self.names), i * expert_nbytes + offset, strides))


class _Slot(NamedTuple):
    """What a rank keeps of a part: `box` in the coordinates of the tensor (of one expert), None when it holds nothing;
    `rows` in the buffer, constants included; `tail`, the extents after the rows."""

    box: Box | None
    rows: int
    tail: tuple[int, ...]


def _slot(part: Part, rank: int, size: int) -> _Slot:
    if not part.shape:
        return _Slot(Box((), ()), 1, ())
    axis = part.split.axis
    low, high = part.region or (0, part.shape[axis])
    start, stop = [0] * len(part.shape), list(part.shape)
    a, b = part.split.range(high - low, rank, size)
    start[axis], stop[axis] = low + a, low + b
    extents = [q - p for p, q in zip(start, stop, strict=True)]
    extents[axis] = part.split.allocated(high - low, rank, size)
    return _Slot(Box(tuple(start), tuple(stop)) if a < b else None, extents[0], tuple(extents[1:]))


def _strides(shape: tuple[int, ...], itemsize: int, transposed: bool) -> tuple[int, ...]:
    order = list(range(len(shape)))
    if transposed and len(shape) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@cache
def _sheet(params: tuple[Param, ...], tp: int, ep: int, rank: int) -> _Sheet:
    sheet = _Sheet()
    for param in params:
        sheet.add(param, tp, ep, rank)
    return sheet


@cache
def _columns(params: tuple[Param, ...], tp: int, ep: int, rank: int, width: int) -> Pieces:
    """The sheet's pieces, with tensors counted inside the layer."""
    sheet = _sheet(params, tp, ep, rank)
    row = {spec.name: i for i, spec in enumerate(_specs(params))}
    return Pieces.of([p._replace(tensor=row[name]) for p, name in zip(sheet.pieces, sheet.tensors, strict=True)], width)


class _Stamp(NamedTuple):
    """Equal layers that stand on one stage: their name prefixes and the catalog row of each one's first tensor."""

    params: tuple[Param, ...]
    prefixes: list[str]
    first: IntArray


def _stamps(model: Model, pp: int, stage: int) -> Iterator[_Stamp]:
    """Layers are dealt to stages in order, as evenly as numpy.array_split does."""
    edges = np.cumsum([0] + [len(part) for part in np.array_split(np.arange(sum(s.count for s in model.layers)), pp)])
    row = layer = 0
    for stack in (Stack(model.before), *model.layers, Stack(model.after)):
        names, per = stack.names(), len(_specs(stack.params))
        if stack.prefix:
            here = range(max(int(edges[stage]) - layer, 0), min(int(edges[stage + 1]) - layer, stack.count))
            layer += stack.count
        else:
            here = range(stage == (0 if row == 0 else pp - 1))
        if here and stack.params:
            yield _Stamp(stack.params, [names[k] for k in here], row + per * np.array(here, np.int64))
        row += per * len(names)
    if model.tied and 0 < stage == pp - 1:
        yield _Stamp(model.tied, [""], np.zeros(1, np.int64))


@cache
def layout(model: Model, parallel: Parallel = SINGLE, rank: int = 0) -> Layout:
    """What world rank `rank` holds. Raises ValueError when the ranks can't be arranged so."""
    tp, pp, ep = parallel.tp, parallel.pp, parallel.ep
    if tp % ep or not 0 <= rank < tp * pp:
        raise ValueError(f"rank {rank} of {parallel}: ep must divide tp, and the rank be below {tp * pp}")
    stage, tp_rank = divmod(rank, tp)
    book = catalog(model)
    names: list[str] = []
    nbytes: list[int] = []
    constants: list[Constant] = []
    blocks = [Pieces.of([], book.width)]
    for stamp in _stamps(model, pp, stage):
        sheet = _sheet(stamp.params, tp, ep, tp_rank)
        one = _columns(stamp.params, tp, ep, tp_rank, book.width)
        times, n, per = len(stamp.prefixes), len(one), len(sheet.names)
        base = len(names) + per * np.arange(times)
        blocks.append(
            Pieces(
                np.repeat(stamp.first, n) + np.tile(one.tensor, times),
                np.tile(one.start, (times, 1)),
                np.tile(one.stop, (times, 1)),
                np.repeat(base, n) + np.tile(one.buffer, times),
                np.tile(one.offset, times),
                np.tile(one.stride, (times, 1)),
            )
        )
        for prefix, first in zip(stamp.prefixes, base.tolist(), strict=True):
            names += [prefix + name for name in sheet.names]
            nbytes += sheet.nbytes
            constants += [Constant(c.buffer + first, c.offset, c.shape, c.strides, c.fill) for c in sheet.constants]
    return Layout(
        book,
        tuple(names),
        np.array(nbytes, np.int64),
        _with_tied(model, _concatenated(blocks)),
        tuple(constants),
        aliases=dict(model.aliases),
        parallel=parallel,
        rank=rank,
    )


def _concatenated(blocks: list[Pieces]) -> Pieces:
    columns = ("tensor", "start", "stop", "buffer", "offset", "stride")
    return Pieces(*(np.concatenate([getattr(block, column) for block in blocks]) for column in columns))


def _with_tied(model: Model, pieces: Pieces) -> Pieces:
    """The pieces once more under their tied names."""
    rows = catalog(model).row
    for name, other in model.aliases:
        same = pieces.take(pieces.tensor == rows[other])
        again = Pieces(np.full(len(same), rows[name]), same.start, same.stop, same.buffer, same.offset, same.stride)
        pieces = _concatenated([pieces, again])
    return pieces


def layouts(model: Model, parallel: Parallel = SINGLE) -> tuple[Layout, ...]:
    """All ranks of an instance."""
    return tuple(layout(model, parallel, rank) for rank in range(parallel.tp * parallel.pp))


@cache
def checkpoint(model: Model, files: int = 1) -> Layout:
    """The model as `files` safetensors files: every tensor whole and contiguous, buffers are files' byte ranges.

    Tied tensors are stored once, as checkpoints do, and found under both names.
    """
    book = catalog(model)
    aliases = dict(model.aliases)
    rows = np.array([i for i, name in enumerate(book.names) if name not in aliases], np.int64)
    shape, itemsize = book.shape[rows], book.itemsize[rows]
    nbytes = shape.prod(axis=1) * itemsize
    file = np.minimum((np.cumsum(nbytes) - nbytes) * files // max(1, int(nbytes.sum())), files - 1)
    size = np.bincount(file, weights=nbytes, minlength=files).astype(np.int64)
    offset = np.cumsum(nbytes) - nbytes - (np.cumsum(size) - size)[file]
    tail = np.cumprod(np.concatenate([shape[:, 1:], np.ones((len(rows), 1), np.int64)], axis=1)[:, ::-1], axis=1)[:, ::-1]
    stride = tail * itemsize[:, None]
    real = np.arange(book.width)[None, :] >= book.width - np.array([len(book.shapes[i]) for i in rows.tolist()])[:, None]
    pieces = _with_tied(model, Pieces(rows, np.zeros_like(shape), shape, file, offset, np.where(real, stride, 0)))
    names = tuple(f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files))
    return Layout(book, names, size, pieces, aliases=aliases)
