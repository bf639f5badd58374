"""What a target rank has yet to receive: boxes of its layout's pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import Hole
from ..model.boxes import IntArray, volumes
from ..model.layout import Layout


@dataclass(frozen=True, eq=False)
class Wants:
    """Boxes that a target rank has yet to receive: start[n, width], stop[n, width] inside the layout's pieces `piece[n]`."""

    layout: Layout
    piece: IntArray
    start: IntArray
    stop: IntArray

    @classmethod
    def of(cls, layout: Layout) -> Wants:
        """Everything the layout's loader has to write. Raises ManifestError if two pieces share a byte."""
        layout.prove_disjoint()
        rows = layout.written
        pieces = layout.pieces
        return cls(layout, rows, pieces.start[rows], pieces.stop[rows])

    def __len__(self) -> int:
        return len(self.piece)

    @property
    def tensor(self) -> IntArray:
        return self.layout.pieces.tensor[self.piece]

    @cached_property
    def nbytes(self) -> int:
        return int((volumes(self.start, self.stop) * self.layout.catalog.itemsize[self.tensor]).sum())

    def hole(self, row: int, start: IntArray, stop: IntArray, reason: str) -> Hole:
        spec = self.layout.catalog[int(self.tensor[row])]
        return Hole(spec.name, self.layout.rank, box_text(start, stop, len(spec.shape)), reason)


def box_text(start: IntArray, stop: IntArray, ndim: int) -> str:
    """As `[0:4, 2:6]`: the last `ndim` dimensions."""
    cut = len(start) - ndim
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start[cut:].tolist(), stop[cut:].tolist(), strict=True)) + "]"


def rows_in(ours: Layout, theirs: Layout) -> IntArray:
    """Our catalog row for each of their catalog rows, -1 for tensors we don't have. A tied tensor that they lack under
    our name is found under its other name."""
    if ours.catalog == theirs.catalog:
        rows = np.arange(len(theirs.catalog))
    else:
        rows = np.fromiter((ours.catalog.row.get(n, -1) for n in theirs.catalog.names), np.int64, len(theirs.catalog))
    held = set(np.unique(theirs.pieces.tensor).tolist()) if ours.aliases else set()
    for alias, name in ours.aliases.items():
        other = theirs.catalog.row.get(alias)
        if other in held and theirs.catalog.row.get(name) not in held:
            rows = rows.copy()
            rows[other] = ours.catalog.row[name]
    return rows
