"""Declared layouts: which part of each parameter a rank holds by its DTensor placements, in checkpoint coordinates.

Placements say how a parameter is cut; only the engine's loader knows what the parameter is made of (experts stacked,
projections fused). So a rank's layout is the traced layout of the whole model seen through the cuts. The cuts are worked
out here from the placements' definitions, not by asking torch, so that the two can be compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ...errors import LayoutError
from ...model.boxes import Box
from ...model.catalog import Parallel
from ...model.layout import Constant, Layout, Piece, Pieces
from ...tracing.views import Inexpressible, View, boxes, overlap


@dataclass(frozen=True, slots=True)
class Cut:
    """One mesh dimension's say: dimension `dim` is dealt out in `parts`, of which this rank has number `index`.

    groups: the dimension is seen as so many equal groups, each of which is dealt out by itself (`_StridedShard`)."""

    dim: int
    parts: int
    index: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """A box of a whole parameter (`start`, `shape`) that lies in a rank's own part of it from index `local` on."""

    start: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Own:
    """A rank's own part of a parameter in memory: how it is cut out of the whole, and how its elements lie."""

    cuts: tuple[Cut, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """The layout of an engine's whole model, and where in it each parameter is.

    views: how the elements of each buffer lie, by buffer name. home: the buffer of each parameter; tied ones share one."""

    layout: Layout
    views: Mapping[str, View]
    home: Mapping[str, str]


def cuts_of(name: str, tensor: object) -> tuple[Cut, ...]:
    """Those of a parameter, in the order in which they apply; none for a plain tensor, which every rank has whole.
    Raises LayoutError, naming the parameter, for placements that no box describes."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, found = tensor.device_mesh, []
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError(f"{name}: this process is no part of the mesh it is distributed over")
    for placement, parts, index in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        if isinstance(placement, _StridedShard):
            found.append(Cut(placement.dim % tensor.ndim, parts, index, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            found.append(Cut(placement.dim % tensor.ndim, parts, index))
        elif not isinstance(placement, Replicate):
            raise LayoutError(f"{name}: placement {placement} is no part of a tensor that could be copied")
    return tuple(found)


def shares(shape: Sequence[int], cuts: Sequence[Cut]) -> list[Share]:
    """What a rank holds of a parameter of this whole `shape`, in order of its own memory; nothing if a part is empty.

    Cuts apply one after the other, each to what the one before has left, uneven ones as torch.chunk does."""
    ranges = [[range(size)] for size in shape]
    for cut in cuts:
        ranges[cut.dim] = _dealt(ranges[cut.dim], cut)
    rows = [[(r, at) for r, at in zip(row, _starts(row), strict=True) if len(r)] for row in ranges]
    return [
        Share(tuple(r.start for r, _ in way), tuple(at for _, at in way), tuple(len(r) for r, _ in way))
        for way in itertools.product(*rows)
    ]


def declare(whole: Whole, own: Mapping[str, Own], *, parallel: Parallel, rank: int) -> Layout:
    """The layout of a rank that holds its `own` part of these parameters: one buffer each, of the span that it reaches over.
    Raises LayoutError, naming the parameter, where declaration, memory and engine contradict each other."""
    rows = _ByBuffer.of(whole.layout)
    pieces: list[Piece] = []
    constants: list[Constant] = []
    nbytes: list[int] = []
    for buffer, (name, mine) in enumerate(own.items()):
        home = whole.home.get(name)
        if home is None:
            raise LayoutError(f"{name}: the model has it, the engine's loader doesn't fill it", next_step="is it an adapter's?")
        full = whole.views[home]
        held = shares(full.shape, mine.cuts)
        _check(name, full, held, mine)
        itemsize = rows.itemsize[home]
        nbytes.append(math.prod(mine.shape) * itemsize)
        for share in held:
            seen = View(full.at(share.start), share.shape, full.stride)
            there = View(sum(i * s for i, s in zip(share.local, mine.stride, strict=True)), share.shape, mine.stride)
            for piece in rows.pieces[home]:
                for first, view in _through(name, piece.view, seen, there):
                    start = tuple(a + b for a, b in zip(piece.start, first, strict=True))
                    stop = tuple(a + n for a, n in zip(start, view.shape, strict=True))
                    strides = tuple(s * itemsize for s in view.stride)
                    pieces.append(Piece(piece.tensor, Box(start, stop), buffer, view.offset * itemsize, strides))
            for constant in rows.constants[home]:
                for _, view in _through(name, constant.view, seen, there):
                    strides = tuple(s * itemsize for s in view.stride)
                    constants.append(Constant(buffer, view.offset * itemsize, view.shape, strides, constant.fill))
    layout = whole.layout
    made = Layout(
        layout.catalog,
        tuple(own),
        np.array(nbytes, np.int64),
        Pieces.of(pieces, layout.catalog.width),
        tuple(constants),
        aliases=layout.aliases,
        ignored=layout.ignored,
        parallel=parallel,
        rank=rank,
    )
    made.prove_cover()
    return made


def _dealt(held: Sequence[range], cut: Cut) -> list[range]:
    """Of elements `held`, in order, those that one part keeps, in order."""
    total = sum(map(len, held))
    group, kept = -(-total // cut.groups), []
    for begin in range(0, total, group or 1):
        size = min(group, total - begin)
        step = -(-size // cut.parts)
        low, high = (begin + min(size, n * step) for n in (cut.index, cut.index + 1))
        for values, at in zip(held, _starts(held), strict=True):
            kept.append(values[max(0, low - at) : max(0, high - at)])
    return [values for values in kept if len(values)]


def _starts(held: Sequence[range]) -> list[int]:
    return list(itertools.accumulate(map(len, held), initial=0))[:-1]


def _check(name: str, full: View, held: Sequence[Share], mine: Own) -> None:
    declared = tuple(max((s.local[d] + s.shape[d] for s in held), default=0) for d in range(len(full.shape)))
    if len(mine.shape) != len(full.shape) or (0 not in mine.shape and declared != mine.shape) or (held and 0 in mine.shape):
        raise LayoutError(
            f"{name}: has shape {mine.shape} on this rank; of the checkpoint's {full.shape} its placements make it {declared}",
            next_step="is this the model that the checkpoint's config.json describes?",
        )
    if not View(0, mine.shape, mine.stride).dense and 0 not in mine.shape:
        raise LayoutError(f"{name}: its {mine.shape} elements lie scattered, with strides {mine.stride}")


def _through(name: str, held: View, seen: View, there: View) -> Iterator[tuple[tuple[int, ...], View]]:
    """What of `held` shows in `seen`, an equally shaped view of the same memory, and where it lies `there`."""
    try:
        for cell in overlap(seen, held):
            yield from boxes(cell, there, len(held.shape))
    except Inexpressible as problem:
        raise LayoutError(f"{name}: what this rank holds of it can't be described: {problem}") from problem


@dataclass(frozen=True, slots=True)
class _Filled:
    """One piece (`tensor`, from index `start`) or constant (`fill`) of a buffer, in elements."""

    view: View
    tensor: int = -1
    start: tuple[int, ...] = ()
    fill: bytes = b""


@dataclass(frozen=True, slots=True)
class _ByBuffer:
    """A layout's pieces and constants by buffer name."""

    pieces: Mapping[str, list[_Filled]]
    constants: Mapping[str, list[_Filled]]
    itemsize: Mapping[str, int]

    @classmethod
    def of(cls, layout: Layout) -> _ByBuffer:
        pieces: dict[str, list[_Filled]] = {name: [] for name in layout.buffer_names}
        constants: dict[str, list[_Filled]] = {name: [] for name in layout.buffer_names}
        itemsize: dict[str, int] = {}
        columns, width = layout.pieces, layout.catalog.width
        for row in range(len(columns)):
            tensor = int(columns.tensor[row])
            name, size = layout.buffer_names[int(columns.buffer[row])], int(layout.catalog.itemsize[tensor])
            box, cut = layout.box_of(row), width - len(layout.catalog.shapes[tensor])
            strides = tuple(s // size for s in columns.stride[row, cut:].tolist())
            view = View(int(columns.offset[row]) // size, box.shape, strides)
            pieces[name].append(_Filled(view, tensor, box.start))
            itemsize[name] = size
        for constant in layout.constants:
            name, size = layout.buffer_names[constant.buffer], len(constant.fill)
            view = View(constant.offset // size, constant.shape, tuple(s // size for s in constant.strides))
            constants[name].append(_Filled(view, fill=constant.fill))
            itemsize[name] = size
        return cls(pieces, constants, itemsize)
