"""What a load has received so far: which boxes lie in place, whom they came from, and what their bytes add up to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..integrity.digest import DigestArray, fold
from ..model.boxes import BoolArray, IntArray, volumes
from ..model.layout import Layout
from ..model.offer import SourceId
from ..receipt import Read


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Box start[i]..stop[i] ([n, width]) of layout piece piece[i] came from source number source[i]; digest[i] is that of its
    bytes where hashed[i]."""

    piece: IntArray
    start: IntArray
    stop: IntArray
    source: IntArray
    digest: DigestArray
    hashed: BoolArray

    @classmethod
    def of(cls, piece: IntArray, start: IntArray, stop: IntArray, source: IntArray) -> Rows:
        return cls(piece, start, stop, source, np.zeros(len(piece), np.uint64), np.zeros(len(piece), np.bool_))

    def __len__(self) -> int:
        return len(self.piece)

    def take(self, rows: IntArray | BoolArray) -> Rows:
        """The rows picked by an index or boolean array."""
        return Rows(self.piece[rows], self.start[rows], self.stop[rows], self.source[rows], self.digest[rows], self.hashed[rows])


class Ledger:
    """Rows of one rank's `layout`, no two of which overlap."""

    def __init__(self, layout: Layout) -> None:
        none, boxes = np.zeros(0, np.int64), np.zeros((0, layout.catalog.width), np.int64)
        self.layout = layout
        self._number: dict[SourceId, int] = {}
        self.rows = Rows.of(none, boxes, boxes, none)

    @property
    def sources(self) -> tuple[SourceId, ...]:
        """By number, those of which nothing is left included."""
        return tuple(self._number)

    def numbers(self, sources: Iterable[SourceId]) -> IntArray:
        return np.array([self._number.setdefault(s, len(self._number)) for s in sources], np.int64)

    def add(self, piece: IntArray, start: IntArray, stop: IntArray, source: IntArray) -> None:
        """Boxes that have arrived; source: their numbers."""
        new, old = Rows.of(piece, start, stop, source), self.rows
        self.rows = Rows(*(np.concatenate([getattr(old, c), getattr(new, c)]) for c in Rows.__slots__))

    def drop(self, rows: BoolArray) -> Rows:
        """Forget these rows; returns them."""
        gone, self.rows = self.rows.take(rows), self.rows.take(~rows)
        return gone

    @property
    def nbytes(self) -> IntArray:
        """[n] of each row."""
        rows, layout = self.rows, self.layout
        return volumes(rows.start, rows.stop) * layout.catalog.itemsize[layout.pieces.tensor[rows.piece]]

    def read(self) -> dict[str, Read]:
        """What lies in place, by source."""
        n = len(self._number)
        nbytes, count = np.zeros(n, np.int64), np.bincount(self.rows.source, minlength=n)
        np.add.at(nbytes, self.rows.source, self.nbytes)
        found: dict[str, Read] = {}
        for name, size, operations in zip(map(str, self._number), nbytes.tolist(), count.tolist(), strict=True):
            if operations:
                before = found.get(name, Read(0, 0))
                found[name] = Read(before.nbytes + size, before.operations + operations)
        return found

    def digests(self) -> Mapping[int, int]:
        """Of each piece that lies here whole and is hashed, by its row: the digests of its boxes add up."""
        rows = self.rows.take(self.rows.hashed)
        n, pieces = len(self.layout.pieces), self.layout.pieces
        low, high = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        np.add.at(low, rows.piece, rows.digest & np.uint64(0xFFFFFFFF))
        np.add.at(high, rows.piece, rows.digest >> np.uint64(32))
        held = np.zeros(n, np.int64)
        np.add.at(held, rows.piece, volumes(rows.start, rows.stop))
        whole = np.flatnonzero(held == volumes(pieces.start, pieces.stop))
        return dict(zip(whole.tolist(), fold(low, high)[whole].tolist(), strict=True))


def of_tensors(layout: Layout, piece: IntArray, names: Collection[str]) -> BoolArray:
    """[n] whether layout piece piece[n] is one of a tensor named so."""
    tensors = [layout.catalog.row[name] for name in names]
    return np.isin(layout.pieces.tensor[piece], tensors)
