"""The verdict on bytes that have moved: where what the target ranks measured is not what the seeds announced.

A claim is checked wherever measured boxes, of whichever ranks, tile its box exactly: their digests must add up to it. Every rank
computes the same verdict from the same arguments, without I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..model.boxes import BoolArray, Box, IntArray
from ..model.catalog import frozen
from .claims import Claims, Measured
from .digest import PRIME, DigestArray
from .tiling import Tilings, dense


class State(IntEnum):
    """Of a measured box: in no exact tiling of an announced box; in one that adds up; in one that doesn't."""

    UNPROVEN = 0
    PROVEN = 1
    WRONG = 2


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Bytes that are not the seeds'. `box` of `tensor` was announced by `claimed_by` (none: replicas measured differently
    and nobody announced the box); `ranks` hold suspect parts of it, which they read from `sources`."""

    tensor: str
    box: Box
    ranks: tuple[int, ...]
    sources: tuple[str, ...]
    claimed_by: tuple[str, ...]

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        said = f"is not what {', '.join(self.claimed_by)} announced" if self.claimed_by else "differs between these ranks"
        return f"{self.tensor}{self.box}, held by rank {ranks} and read from {', '.join(self.sources)}, {said}"


@dataclass(frozen=True, slots=True)
class Contradiction:
    """The seeds `sources` announce digests for `box` of `tensor` that can't all be true: they hold different weights."""

    tensor: str
    box: Box
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.tensor}{self.box}: {' and '.join(self.sources)} announce different weights"


@dataclass(frozen=True, eq=False)
class Verdict:
    """state: [n] `State` of each row of `measured`. digest: sum modulo PRIME over the `digest_tensors` logical tensors that
    the measured boxes tile whole; it depends on the weights alone, not on layouts."""

    measured: Measured
    state: IntArray
    mismatches: tuple[Mismatch, ...]
    contradictions: tuple[Contradiction, ...]
    digest: int
    digest_tensors: int

    def nbytes(self, state: State) -> int:
        """Bytes of measured boxes in that state; what several ranks hold counts for each."""
        return int(self.measured.nbytes[self.state == state].sum())

    def wrong(self, rank: int) -> IntArray:
        """Which of that rank's measurements, in its own order, must be read again."""
        return np.flatnonzero(self.state[self.measured.rank == rank] == State.WRONG)


def compare(claims: Claims, measured: Measured) -> Verdict:
    """Check every claim that measured boxes tile. Boxes that several ranks hold are counted once, and must agree."""
    return _Comparison(claims, measured).verdict()


class _Comparison:
    """Cells are distinct measured boxes, targets are distinct boxes to tile: announced ones, and every measured tensor whole.
    Both are numbered; rows are rows of `measured`."""

    def __init__(self, claims: Claims, measured: Measured) -> None:
        self.claims, self.measured = claims, measured
        catalog, n, k = measured.catalog, len(measured), len(claims)
        touched = np.unique(measured.tensor)
        tensor = np.concatenate([measured.tensor, claims.tensor, touched])
        start = np.concatenate([measured.start, claims.start, np.zeros((len(touched), catalog.width), np.int64)])
        stop = np.concatenate([measured.stop, claims.stop, catalog.shape[touched]])
        box = dense(tensor, *start.T, *stop.T)

        self.cell_row, self.cell_of = _first_and_number(box[:n])
        low, high = _extremes(measured.digest, self.cell_of, len(self.cell_row))
        self.disputed = low != high
        self.target_row, target_of = _first_and_number(box[n:])
        self.target_row += n
        claimant = target_of[:k]
        low_claim, high_claim = _extremes(claims.digest, claimant, len(self.target_row))
        self.claimed = np.bincount(claimant, minlength=len(self.target_row)) > 0
        self.contradicted = self.claimed & (low_claim != high_claim)
        self.claim = low_claim
        self.whole = np.zeros(len(self.target_row), np.bool_)
        self.whole[target_of[k:]] = True
        self.claims_of = _Lists(claimant, len(self.target_row))
        self.rows_of = _Lists(self.cell_of, len(self.cell_row))

        self.tilings = Tilings(
            tensor, start, stop, self.cell_row, self.target_row, np.where(self.disputed, np.uint64(0), low), self.disputed
        )
        self.tensor, self.start, self.stop = tensor, start, stop
        self.proven = np.zeros(n, np.bool_)
        self.suspect = np.zeros(n, np.bool_)
        self.total: dict[int, int] = {}  # tensor -> its digest
        self.doubts: list[tuple[int, IntArray]] = []  # target, rows that don't add up to it

    def verdict(self) -> Verdict:
        for found in self.tilings.along_axes():
            plain = self.claimed[found.target] & ~self.contradicted[found.target] & (found.disputed == 0)
            good = plain & (found.total == self.claim[found.target])
            self.proven |= found.cells(good)[self.cell_of]
            self._note_totals(found.target, found.total, found.disputed)
            for i in np.flatnonzero(self.claimed[found.target] & ~good):
                self._judge(int(found.target[i]), found.members(int(i)))
        settled = self._settled()
        lacking = self.whole & ~np.isin(self.tensor[self.target_row], list(self.total))
        for target, members in self.tilings.searched(settled, self.claimed, lacking):
            if not self.disputed[members].any():
                total = int(self.tilings.digest[members].astype(object).sum()) % PRIME
                self._note_totals(np.array([target]), np.array([total], np.uint64), np.zeros(1, np.int64))
            if self.claimed[target]:
                self._judge(target, members)
        for cell in np.flatnonzero(self.disputed & ~self._settled()):
            self._doubt(-1, self.rows_of[int(cell)])
        return self._conclude()

    def _settled(self) -> BoolArray:
        """[cells], of which a row has been proven or is suspect."""
        settled = np.zeros(len(self.cell_row), np.bool_)
        settled[self.cell_of[self.proven | self.suspect]] = True
        return settled

    def _note_totals(self, target: IntArray, total: DigestArray, disputed: IntArray) -> None:
        rows = np.flatnonzero(self.whole[target] & (disputed == 0))
        self.total.update(zip(self.tensor[self.target_row[target[rows]]].tolist(), total[rows].tolist(), strict=True))

    def _judge(self, target: int, members: IntArray) -> None:
        """A tiling that needs thought. One disputed cell among its members can be settled: the others say what it must be."""
        if self.contradicted[target]:
            return  # seeds disagree about this very box: it proves nothing
        rows = np.concatenate([self.rows_of[int(c)] for c in members])
        disputed = members[self.disputed[members]]
        total = int(self.tilings.digest[members].astype(object).sum())  # disputed ones count as 0
        missing = (int(self.claim[target]) - total) % PRIME
        if len(disputed) == 0:
            right = np.full(len(rows), missing == 0)
        elif len(disputed) == 1:
            inside = self.cell_of[rows] == disputed[0]
            right = ~inside | (self.measured.digest[rows] == missing)
            right &= (self.measured.digest[rows[inside]] == missing).any()
        else:
            right = np.zeros(len(rows), np.bool_)
        self.proven[rows[right]] = True
        if not right.all():
            self._doubt(target, rows[~right])

    def _doubt(self, target: int, rows: IntArray) -> None:
        self.suspect[rows] = True
        self.doubts.append((target, rows))

    def _conclude(self) -> Verdict:
        measured, claims = self.measured, self.claims
        mismatches: dict[Mismatch, None] = {}
        contradictions = {self._contradiction(int(t)): None for t in np.flatnonzero(self.contradicted)}
        for target, rows in self.doubts:
            wrong = rows[~self.proven[rows]]
            if len(wrong) == 0:  # every part is what somebody announced, so the seeds contradict each other
                contradictions[self._contradiction(target, rows)] = None
                continue
            said = claims.source[self.claims_of[target]] if target >= 0 else np.zeros(0, np.int64)
            mismatches[
                Mismatch(
                    *self._place(int(self.target_row[target]) if target >= 0 else int(wrong[0])),
                    tuple(np.unique(measured.rank[wrong]).tolist()),
                    tuple(sorted({str(measured.sources[s]) for s in measured.source[wrong].tolist()})),
                    tuple(sorted({claims.sources[s] for s in said.tolist()})),
                )
            ] = None
        state = np.where(self.proven, State.PROVEN, np.where(self.suspect, State.WRONG, State.UNPROVEN))
        return Verdict(
            measured, frozen(state), tuple(mismatches), tuple(contradictions), sum(self.total.values()) % PRIME, len(self.total)
        )

    def _contradiction(self, target: int, rows: IntArray | None = None) -> Contradiction:
        said = {self.claims.sources[s] for s in self.claims.source[self.claims_of[target]].tolist()}
        if rows is not None:
            said |= {str(self.measured.sources[s]) for s in self.measured.source[rows].tolist()}
        return Contradiction(*self._place(int(self.target_row[target])), tuple(sorted(said)))

    def _place(self, row: int) -> tuple[str, Box]:
        spec = self.measured.catalog[int(self.tensor[row])]
        cut = self.measured.catalog.width - len(spec.shape)
        return spec.name, Box(tuple(self.start[row, cut:].tolist()), tuple(self.stop[row, cut:].tolist()))


class _Lists:
    """The positions at which each number below `n` occurs."""

    def __init__(self, numbers: IntArray, n: int) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._edge = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=n))])

    def __getitem__(self, number: int) -> IntArray:
        return self._order[self._edge[number] : self._edge[number + 1]]


def _first_and_number(ids: IntArray) -> tuple[IntArray, IntArray]:
    """First position of each distinct id, and the number of each position's id among them."""
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)
    return first.astype(np.int64), number.astype(np.int64)


def _extremes(digest: DigestArray, group: IntArray, n: int) -> tuple[DigestArray, DigestArray]:
    low, high = np.full(n, np.iinfo(np.uint64).max, np.uint64), np.zeros(n, np.uint64)
    np.minimum.at(low, group, digest)
    np.maximum.at(high, group, digest)
    return low, high
