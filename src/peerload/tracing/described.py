"""What a recorder saw, as a `Layout`: every element of a tensor is a checkpoint element, a constant or a derived value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..errors import LayoutError
from ..model.catalog import Catalog, Parallel, TensorSpec
from ..model.layout import Constant, Layout, Pieces
from .contents import Contents, Held, moved
from .dtypes import DTYPE_NAMES
from .storages import ENGINE, Storages, view_of
from .views import Inexpressible, View, boxes, overlap


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """Values that only the engine's own loader can make out of the checkpoint tensors `covers`. `parameter` (the first one
    when there are several) has them; `reason` is the operation ("cast BF16 to F32", "aten::exp of ...")."""

    parameter: str
    covers: tuple[str, ...]
    reason: str


@dataclass(slots=True)
class Describer:
    """Builds a layout, one buffer for each tensor added. engine: name and version, part of the names of computed tensors.

    derived: what the layout adds to the catalog, by logical name. specs: the same, as tensors."""

    storages: Storages
    catalog: Catalog
    parallel: Parallel
    rank: int
    engine: str
    buffers: dict[str, int] = field(default_factory=dict)  # their bytes
    derived: dict[str, Derived] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    pieces: list[tuple[str, tuple[int, ...], View, int, int]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def add(self, path: str, tensor: Tensor) -> None:
        """The next buffer: pieces and constants for every element of one tensor. Raises LayoutError, naming it."""
        buffer = len(self.buffers)
        mine = moved(view_of(tensor), -int(tensor.storage_offset()))
        if not mine.dense:
            raise LayoutError(f"{path}: its {tuple(tensor.shape)} elements lie scattered, with strides {tuple(tensor.stride())}")
        if tensor.dtype not in DTYPE_NAMES:
            raise LayoutError(f"{path}: its dtype {tensor.dtype} has no name in a checkpoint")
        size = tensor.element_size()
        storage = self.storages.storage(tensor)
        if storage is None:
            raise LayoutError(f"{path}: the engine made it without a checkpoint tensor", next_step="is it in the checkpoint?")
        self.buffers[path] = tensor.numel() * size
        try:
            if storage.itemsize != size:
                raise Inexpressible(f"elements of {storage.itemsize} bytes seen as {tensor.dtype}")  # noqa: TRY301
            held = self.storages.held(tensor)
            computed = [h for h in held if h.taint is not None]
            places = [p for v in (*(h.view for h in computed), *_unwritten(mine, held)) for p in _places(mine, v)]
        except Inexpressible as problem:
            held, computed, places = [], [], [((0,) * len(mine.shape), mine)]
            reasons, covers = {str(problem)}, set(self.storages.covers([tensor]))
        else:
            reasons = {h.taint.reason for h in computed if h.taint is not None}
            covers = {c for h in computed if h.taint is not None for c in h.taint.covers}
            lone = sum(v.numel for _, v in places) - sum(h.view.numel for h in computed)
            if lone:
                reasons.add(f"{lone} of its {tensor.numel()} elements are neither a checkpoint tensor's nor a stated constant")
            if lone or any(h.taint is not None and not h.taint.covers for h in computed):
                covers |= self.storages.covers([tensor])
        for h in held:
            if h.name:
                self._piece(h.name, h.start, h.view, buffer, size, path)
            elif h.taint is None:
                self.constants.append(Constant(buffer, h.view.offset * size, h.view.shape, _bytes(h.view, size), h.fill))
        if places:
            if not covers:
                raise LayoutError(f"{path}: {min(reasons)}, and no checkpoint tensor has a part in it")
            p = self.parallel
            name = f"{path} by {self.engine} tp{p.tp} ep{p.ep} pp{p.pp} rank {self.rank}"
            self.specs[name] = TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            self.derived[name] = Derived(path, tuple(sorted(covers)), "; ".join(sorted(reasons)[:3]))
            for start, view in places:
                self._piece(name, start, view, buffer, size, path)

    def _piece(self, name: str, start: tuple[int, ...], view: View, buffer: int, size: int, path: str) -> None:
        if name not in self.catalog.row and name not in self.specs:
            base, dtypes = self.storages.logical[name]
            chain = [DTYPE_NAMES[d] for d in dtypes]
            self.specs[name] = TensorSpec(name, chain[-1], self.catalog[self.catalog.row[base]].shape)
            self.derived[name] = Derived(path, (base,), f"cast {' to '.join(chain)}")
        self.pieces.append((name, start, view, buffer, size))

    def used(self) -> set[str]:
        """The checkpoint tensors that the buffers hold something of, and the logical ones."""
        used = {name for name, *_ in self.pieces} | {c for d in self.derived.values() for c in d.covers}
        return used | {self.storages.logical[n][0] for n in used if n in self.storages.logical}

    def layout(self, ignored: Mapping[str, str]) -> Layout:
        """Of all that was added. Proves its cover."""
        catalog = Catalog.of([*self.catalog, *self.specs.values()]) if self.specs else self.catalog
        layout = Layout(
            catalog,
            tuple(self.buffers),
            np.array(list(self.buffers.values()), np.int64),
            self._columns(catalog),
            tuple(self.constants),
            ignored=ignored,
            parallel=self.parallel,
            rank=self.rank,
        )
        layout.prove_cover()
        return layout

    def _columns(self, catalog: Catalog) -> Pieces:
        """Thousands of experts: rows go straight into arrays."""
        n, width = len(self.pieces), catalog.width
        start, shape, stride = (np.full((n, width), fill, np.int64) for fill in (0, 1, 0))
        ranks = np.fromiter((len(first) for _, first, *_ in self.pieces), np.int64, n)
        for ndim in set(ranks.tolist()) - {0}:
            rows = np.flatnonzero(ranks == ndim)
            same = [self.pieces[i] for i in rows.tolist()]
            start[rows, width - ndim :] = [first for _, first, *_ in same]
            shape[rows, width - ndim :] = [view.shape for _, _, view, *_ in same]
            stride[rows, width - ndim :] = [view.stride for _, _, view, *_ in same]
        size = np.fromiter((p[4] for p in self.pieces), np.int64, n)
        offset = np.fromiter((p[2].offset for p in self.pieces), np.int64, n) * size
        tensor = np.fromiter((catalog.row[p[0]] for p in self.pieces), np.int64, n)
        buffer = np.fromiter((p[3] for p in self.pieces), np.int64, n)
        return Pieces(tensor, start, start + shape, buffer, offset, stride * size[:, None])


def _bytes(view: View, size: int) -> tuple[int, ...]:
    return tuple(s * size for s in view.stride)


def _unwritten(mine: View, held: Iterable[Held]) -> Iterator[View]:
    """The elements that nothing is known of."""
    held = list(held)
    if sum(h.view.numel for h in held) == mine.numel:
        return
    left = Contents()
    left.add([Held("", (0,) * len(mine.shape), mine, taint=ENGINE)])
    for h in held:
        left.replace(h.view, [])
    yield from (h.view for h in left)


def _places(mine: View, region: View) -> Iterator[tuple[tuple[int, ...], View]]:
    """A region of a tensor as boxes of its own coordinates: (first index, where it lies)."""
    for cell in overlap(region, mine):
        yield from boxes(cell, region, len(mine.shape))
