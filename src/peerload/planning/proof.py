"""Why a plan is right: every wanted element is written exactly once, out of a piece that holds it, with equal dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import PlanError
from ..model.boxes import BoolArray, IntArray, first_overlap, volumes
from ..model.offer import Offer
from .wants import Wants, box_text, rows_in


def first(mask: BoolArray) -> int | None:
    """The first row for which `mask` holds."""
    return int(np.argmax(mask)) if mask.any() else None


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """Of these copies, whose columns are those of `Plan`. Each method raises PlanError for what it says. `check` calls all, in an
    order in which each may trust those before it."""

    wants: Wants
    offers: Sequence[Offer]
    want: IntArray
    offer: IntArray
    piece: IntArray
    start: IntArray
    stop: IntArray

    def check(self) -> None:
        self.wants_are_disjoint()
        self.rows_exist()
        self.copies_lie_in_wants()
        mapped: dict[int, IntArray] = {}  # by layout, which many offers share
        for i, offer in enumerate(self.offers):
            rows = np.flatnonzero(self.offer == i)
            if len(rows):
                if id(offer.layout) not in mapped:
                    mapped[id(offer.layout)] = rows_in(self.wants.layout, offer.layout)
                self.tensors_are_the_wanted(offer, rows, mapped[id(offer.layout)])
                self.copies_lie_in_pieces(offer, rows)
        self.all_is_written_once()

    def wants_are_disjoint(self) -> None:
        """No two bytes of the layout's pieces are one, and no two wants overlap."""
        wants = self.wants
        wants.layout.prove_disjoint()
        twice = first_overlap(wants.piece, wants.start, wants.stop)
        if twice is not None:
            hole = wants.hole(twice[1], wants.start[twice[1]], wants.stop[twice[1]], f"is wanted again by want {twice[0]}")
            raise PlanError("invalid plan: wants overlap", holes=(hole,))

    def rows_exist(self) -> None:
        """Columns have one length, and name wants and offers that are there."""
        n = len(self.want)
        shape = (n, self.wants.layout.catalog.width)
        if not (len(self.offer) == len(self.piece) == n and self.start.shape == self.stop.shape == shape):
            raise PlanError("invalid plan: columns differ in length")
        for column, limit in ((self.want, len(self.wants)), (self.offer, len(self.offers))):
            self._refuse((column < 0) | (column >= limit), "names a want or an offer that does not exist")

    def copies_lie_in_wants(self) -> None:
        low, high = self.wants.start[self.want], self.wants.stop[self.want]
        outside = np.any((self.start < low) | (self.stop > high) | (self.start >= self.stop), axis=1)
        self._refuse(outside, "lies outside the wanted box")

    def tensors_are_the_wanted(self, offer: Offer, rows: IntArray, ours_of: IntArray) -> None:
        """Copies `rows`, all of this offer, read pieces it has, of the wanted tensor, in its dtype. ours_of: see `rows_in`."""
        pieces, ours, theirs = offer.layout.pieces, self.wants.layout.catalog, offer.layout.catalog
        unknown = (self.piece[rows] < 0) | (self.piece[rows] >= len(pieces))
        self._refuse(unknown, f"names a piece that {offer.source} does not have", rows)
        read, wanted = pieces.tensor[self.piece[rows]], self.wants.tensor[self.want[rows]]
        self._refuse(ours_of[read] != wanted, f"reads another tensor of {offer.source}", rows)
        if theirs is ours:
            return
        for mine, other in dict.fromkeys(zip(wanted.tolist(), read.tolist(), strict=True)):
            if ours.dtypes[mine] != theirs.dtypes[other]:
                self._refuse(read == other, f"would read {theirs.dtypes[other]} into {ours.dtypes[mine]}", rows)

    def copies_lie_in_pieces(self, offer: Offer, rows: IntArray) -> None:
        width, pieces = self.start.shape[1], offer.layout.pieces
        common = min(width, pieces.start.shape[1])
        low, high = np.zeros((len(rows), width), np.int64), np.ones((len(rows), width), np.int64)
        low[:, width - common :] = pieces.start[self.piece[rows], -common:]
        high[:, width - common :] = pieces.stop[self.piece[rows], -common:]
        outside = np.any((self.start[rows] < low) | (self.stop[rows] > high), axis=1)
        self._refuse(outside, f"lies outside the piece that {offer.source} holds", rows)

    def all_is_written_once(self) -> None:
        """No two copies of a want overlap, and together they have its volume."""
        wants, clash = self.wants, first_overlap(self.want, self.start, self.stop)
        if clash is not None:
            self._refuse(np.arange(len(self.want)) == clash[1], f"writes elements that copy {clash[0]} writes too")
        written = np.bincount(self.want, volumes(self.start, self.stop), len(wants)).astype(np.int64)
        short = first(written != volumes(wants.start, wants.stop))
        if short is not None:
            reason = f"only {written[short]} of its elements are written"
            hole = wants.hole(short, wants.start[short], wants.stop[short], reason)
            raise PlanError("invalid plan: a wanted box is not covered", holes=(hole,))

    def _refuse(self, mask: BoolArray, problem: str, rows: IntArray | None = None) -> None:
        """For the first copy for which `mask` holds, if any. rows: the copies that `mask` is about; None: all."""
        at = first(mask)
        if at is None:
            return
        row = at if rows is None else int(rows[at])
        want, layout = int(self.want[row]), self.wants.layout
        known = 0 <= want < len(self.wants)
        name = layout.catalog.names[int(self.wants.tensor[want])] if known else f"want {want}"
        box = box_text(self.start[row], self.stop[row], layout.catalog.width)
        raise PlanError(f"invalid plan: copy {row} of {name}{box} for rank {layout.rank} {problem}")
