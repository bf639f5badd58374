"""The bytes are proven after they moved: what target ranks measured against what the seeds announced.

A seed announces a digest for each box it holds (`Claims`); a target rank measures the boxes it copied (`Measured`). Ranks
exchange their measurements as bytes and each computes the same `Verdict` from the same arguments, without I/O. A claim is
checked wherever measured boxes, of whichever ranks, tile its box exactly: their digests must add up to it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

import numpy as np

from .digest import PRIME, DigestArray, tensor_keys
from .errors import ManifestError, VerifyError
from .geometry import BoolArray, Box, IntArray, pad_left, volumes
from .manifest import Catalog, Offer, SourceId, TensorSpec, frozen, is_derived
from .tiling import Tilings, dense

_MAGIC: Final = b"PLM1"


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Box start[i]..stop[i] ([n, width]) of catalog row tensor[i] has digest[i], says sources[source[i]]."""

    catalog: Catalog
    tensor: IntArray
    start: IntArray
    stop: IntArray
    digest: DigestArray
    source: IntArray
    sources: tuple[str, ...]

    @classmethod
    def of(cls, catalog: Catalog, offers: Sequence[Offer]) -> Claims:
        """What offers announce about tensors of `catalog`; tensors are matched by name, dtype and shape. Offers without
        digests say nothing."""
        width, heard = catalog.width, [o for o in offers if o.binding.digests is not None]
        columns: list[tuple[IntArray, ...]] = []
        digests: list[DigestArray] = []
        known: dict[int, IntArray] = {}
        for i, offer in enumerate(heard):
            theirs, pieces = offer.layout.catalog, offer.layout.pieces
            if id(theirs) not in known:
                known[id(theirs)] = _rows_of(catalog, theirs)
            tensor = known[id(theirs)][pieces.tensor]
            rows = np.flatnonzero(tensor >= 0)
            cut = max(0, pieces.start.shape[1] - width)
            start, stop = pad_left(pieces.start[rows, cut:], width, 0), pad_left(pieces.stop[rows, cut:], width, 1)
            columns.append((tensor[rows], start, stop, np.full(len(rows), i)))
            assert offer.binding.digests is not None
            digests.append(offer.binding.digests[rows])
        names = tuple(str(o.source) for o in heard)
        if not columns:
            none, boxes = np.zeros(0, np.int64), np.zeros((0, width), np.int64)
            return cls(catalog, none, boxes, boxes, np.zeros(0, np.uint64), none, names)
        tensor, start, stop, source = (np.concatenate(c) for c in zip(*columns, strict=True))
        return cls(catalog, tensor, start, stop, np.concatenate(digests), source, names)

    def __len__(self) -> int:
        return len(self.tensor)


def _rows_of(ours: Catalog, theirs: Catalog) -> IntArray:
    """Our row of each of their tensors, -1 where we have none of that name, dtype and shape."""
    if ours == theirs:
        return np.arange(len(theirs))
    rows = (ours.row.get(spec.name, -1) for spec in theirs)
    return np.array([r if r >= 0 and ours[r] == spec else -1 for r, spec in zip(rows, theirs, strict=True)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Rank rank[i] holds box start[i]..stop[i] of catalog row tensor[i], read from sources[source[i]], with digest[i].

    sources: with the generation that was read; an empty one is a rank's own checkpoint."""

    catalog: Catalog
    rank: IntArray
    tensor: IntArray
    start: IntArray
    stop: IntArray
    digest: DigestArray
    source: IntArray
    sources: tuple[SourceId, ...]

    def __post_init__(self) -> None:
        n, width = len(self.tensor), self.catalog.width
        if not len(self.rank) == len(self.digest) == len(self.source) == n:
            raise ValueError("columns differ in length")
        if not self.start.shape == self.stop.shape == (n, width):
            raise ValueError(f"boxes must have {width} dimensions")

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def nbytes(self) -> IntArray:
        """[n]"""
        return volumes(self.start, self.stop) * self.catalog.itemsize[self.tensor]

    @classmethod
    def join(cls, parts: Sequence[Measured]) -> Measured:
        """All rows, part after part, so that each rank's keep their order. At least one part; their catalogs may differ in
        derived tensors, of which the whole has all."""
        whole = Catalog.of(dict.fromkeys(spec for part in parts for spec in part.catalog))
        parts = [part._in(whole) for part in parts]
        sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
        number = {source: i for i, source in enumerate(sources)}
        renumbered = [np.array([number[s] for s in p.sources] or [0], np.int64)[p.source] for p in parts]
        rank, tensor, start, stop = (np.concatenate([getattr(p, c) for p in parts]) for c in ("rank", "tensor", "start", "stop"))
        digest = np.concatenate([p.digest for p in parts])
        return cls(whole, rank, tensor, start, stop, digest, np.concatenate(renumbered), sources)

    def skewed(self) -> frozenset[str]:
        """Instances that were read before and after their weights changed, or they restarted: either one rank in two
        generations, or ranks that have changed a different number of times."""
        found: dict[tuple[str, int], set[str]] = {}
        changes: dict[str, set[int]] = {}
        for source in self.sources:
            found.setdefault((source.instance, source.rank), set()).add(source.generation)
            changes.setdefault(source.instance, set()).add(source.changes)
        skewed = {instance for (instance, _), generations in found.items() if len(generations) > 1}
        return frozenset(skewed | {instance for instance, counts in changes.items() if len(counts) > 1})

    def _in(self, whole: Catalog) -> Measured:
        """The same rows, numbered as in a catalog that has all of ours."""
        start, stop = pad_left(self.start, whole.width, 0), pad_left(self.stop, whole.width, 1)
        tensor = _rows_of(whole, self.catalog)[self.tensor]
        return Measured(whole, self.rank, tensor, start, stop, self.digest, self.source, self.sources)

    def encode(self) -> bytes:
        """For the exchange between ranks: about 10 bytes a row, the digests above all."""
        common, derived = _split(self.catalog)
        sources = [(s.instance, s.rank, s.generation) for s in self.sources]
        head = {"rows": len(self), "catalog": _fingerprint(common), "derived": derived, "sources": sources}
        text = json.dumps(head).encode()
        tensor = _rows_of(Catalog.of([*common, *derived]), self.catalog)[self.tensor] if derived else self.tensor
        table = np.column_stack([self.rank, tensor, self.source, self.start, self.stop]).astype("<i8")
        # Differences down each column are mostly zeros and small repeats, which pack well.
        packed = zlib.compress(np.diff(table, axis=0, prepend=0).T.tobytes(), 1)
        return b"".join([_MAGIC, struct.pack("<I", len(text)), text, self.digest.astype("<u8").tobytes(), packed])

    @classmethod
    def decode(cls, data: bytes, catalog: Catalog) -> Measured:
        """catalog: of the rank that reads this. Raises VerifyError for bytes that `encode` can't have made, or that are about
        a catalog which differs in more than derived tensors."""
        common, _ = _split(catalog)
        try:
            (size,) = struct.unpack_from("<I", data, len(_MAGIC))
            at = len(_MAGIC) + 4 + size
            head = json.loads(data[at - size : at])
            n, theirs = max(0, int(head["rows"])), head["catalog"]
            sources = tuple(SourceId(str(name), int(number), str(generation)) for name, number, generation in head["sources"])
            digest = np.frombuffer(data, "<u8", n, at).astype(np.uint64)
            derived = [TensorSpec(str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in head["derived"]]
            catalog = Catalog.of([*common, *derived])
            width, shape = 3 + 2 * catalog.width, catalog.shape
            raw = zlib.decompressobj().decompress(data[at + 8 * n :], 8 * n * width + 1) if n else b""
            steps = np.frombuffer(raw, "<i8").reshape(width, n)
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error, ManifestError) as error:
            raise VerifyError(f"a rank's measurements are garbled: {type(error).__name__}: {error}") from error
        if not data.startswith(_MAGIC) or theirs != _fingerprint(common):
            raise VerifyError(
                "a rank measured another list of tensors than this one plans with",
                next_step="start all ranks of an instance with the same version, model and revision",
            )
        table = np.cumsum(steps, axis=1, dtype=np.int64)
        rank, tensor, source = table[:3]
        start, stop = table[3 : 3 + catalog.width].T.copy(), table[3 + catalog.width :].T.copy()
        inside = (tensor >= 0) & (tensor < len(catalog)) & (source >= 0) & (source < len(sources))
        inside &= (rank >= 0) & (digest < PRIME)
        if not inside.all() or (start < 0).any() or (stop <= start).any() or (stop > shape[tensor]).any():
            raise VerifyError("a rank's measurements name a box outside its tensor, or a digest out of range")
        return cls(catalog, rank, tensor, start, stop, digest, source, sources)


def _split(catalog: Catalog) -> tuple[Catalog, list[TensorSpec]]:
    """What all ranks of an instance have, and the derived tensors, which may be a rank's own."""
    derived = [spec for spec in catalog if is_derived(spec.name)]
    return (Catalog.of(s for s in catalog if not is_derived(s.name)), derived) if derived else (catalog, derived)


def _fingerprint(catalog: Catalog) -> str:
    return f"{len(catalog)}:{hashlib.blake2b(tensor_keys(catalog).tobytes(), digest_size=16).hexdigest()}"


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

    @property
    def ok(self) -> bool:
        """Nothing speaks against the bytes. `unproven_nbytes` says how much nothing speaks for."""
        return not self.mismatches and not self.contradictions

    def nbytes(self, state: State, rank: int | None = None) -> int:
        """Bytes of measured boxes in that state, of one rank or of all; what several ranks hold counts for each."""
        rows = self.state == state
        if rank is not None:
            rows &= self.measured.rank == rank
        return int(self.measured.nbytes[rows].sum())

    @cached_property
    def proven_nbytes(self) -> int:
        return self.nbytes(State.PROVEN)

    @cached_property
    def unproven_nbytes(self) -> int:
        return self.nbytes(State.UNPROVEN)

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
