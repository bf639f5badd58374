"""Which of several holders supplies which part of a wanted box: the choice inside a plan.

Where the offered pieces tile a wanted box exactly, only the holder of each part is chosen, the least loaded one. Where
they overlap (seeds of different layouts, block scales that two ranks share), one family of pieces that tiles the box is
taken, or else what is still missing is cut out of one piece after another.

Pure: standard library and NumPy only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from ..model.boxes import Box, IntArray, volumes
from ..model.offer import Offer


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Intersections of wants and pieces: want[n], layout[n] (index into `holders`), piece[n], start[n, D], stop[n, D].

    holders[k]: the offers that hold layout k. tier[k]: 0 for peers, 1 for the last resort. Rows come grouped by want."""

    want: IntArray
    layout: IntArray
    piece: IntArray
    start: IntArray
    stop: IntArray
    holders: tuple[tuple[int, ...], ...]
    tier: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Copies as columns, and what nobody covers: (want, start, stop) of each hole."""

    want: IntArray
    offer: IntArray
    piece: IntArray
    start: IntArray
    stop: IntArray
    holes: list[tuple[int, IntArray, IntArray]]


def choose(
    cells: Cells, start: IntArray, stop: IntArray, itemsize: IntArray, offers: Sequence[Offer], load: Sequence[int], salt: str
) -> Choice:
    """Cover each wanted box [start[w], stop[w]) with parts of cells and give each part a holder.

    itemsize[w]: bytes per element; load[i]: bytes already asked of offer i. Deterministic for equal arguments."""
    group = _group(cells)
    tier = np.array(cells.tier, np.int64)[cells.layout]
    lead = group.rows[group.first]  # one cell for each distinct box
    want = cells.want[lead]
    best = np.full(len(start), np.iinfo(np.int64).max)
    np.minimum.at(best, cells.want, tier)
    group_tier = np.minimum.reduceat(tier[group.rows], group.first) if len(group.first) else np.zeros(0, np.int64)
    usable = group_tier == best[want]
    box_volume = volumes(start, stop)
    total = np.bincount(want[usable], volumes(cells.start[lead], cells.stop[lead])[usable], len(start)).astype(np.int64)
    simple = (total == box_volume) & ~_overlapping(want[usable], cells.start[lead][usable], cells.stop[lead][usable], len(start))

    picked = np.flatnonzero(usable & simple[want])
    parts = [(picked, cells.start[lead[picked]], cells.stop[lead[picked]])]
    holes: list[tuple[int, IntArray, IntArray]] = []
    spread = _Spread(offers, load, salt)
    begin = np.searchsorted(want, np.arange(len(start)), "left").tolist()
    end = np.searchsorted(want, np.arange(len(start)), "right").tolist()
    covers: dict[bytes, _Cover] = {}
    for w in np.flatnonzero(~simple).tolist():
        cover = _cover_of(cells, group, range(begin[w], end[w]), start[w], stop[w], spread, covers)
        chosen = cover.choose(spread, int(itemsize[w]))
        holes += [(w, np.array(b.start, np.int64), np.array(b.stop, np.int64)) for b in cover.missing]
        if len(chosen.groups):
            parts.append((begin[w] + chosen.groups, chosen.start, chosen.stop))
    groups, low, high = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    size = volumes(low, high) * itemsize[want[groups]]
    member, offer = spread.assign(cells, group, groups, size)
    order = np.lexsort((np.arange(len(groups)), want[groups]))
    return Choice(want[groups][order], offer[order], cells.piece[member][order], low[order], high[order], holes)


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Cells with the same want and box: rows[first[g]:first[g + 1]] are cell numbers; by ascending want."""

    rows: IntArray
    first: IntArray

    def members(self, g: int) -> IntArray:
        return self.rows[self.first[g] : self.first[g + 1] if g + 1 < len(self.first) else None]


def _group(cells: Cells) -> _Groups:
    keys = [c for column in (cells.start.T, cells.stop.T) for c in column if len(c) and (c != c[0]).any()]
    rows = np.lexsort((*keys, cells.want)) if keys or len(cells.want) else np.zeros(0, np.int64)
    new = np.ones(len(rows), np.bool_)
    if len(rows):
        new[1:] = cells.want[rows][1:] != cells.want[rows][:-1]
        for key in keys:
            new[1:] |= key[rows][1:] != key[rows][:-1]
    return _Groups(rows, np.flatnonzero(new))


def _overlapping(want: IntArray, start: IntArray, stop: IntArray, wants: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Per want: do two of its distinct boxes intersect? Rows come grouped by want."""
    found = np.zeros(wants, np.bool_)
    for ahead in range(1, len(want)):
        same = want[ahead:] == want[:-ahead]
        if not same.any():
            break
        near = np.flatnonzero(same)
        hit = ((start[near + ahead] < stop[near]) & (start[near] < stop[near + ahead])).all(axis=1)
        found[want[near[hit]]] = True
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Boxes of groups: groups[n] counted from a want's first, start[n, D], stop[n, D]; and the offers that hold each."""

    groups: IntArray
    start: IntArray
    stop: IntArray
    holders: list[list[int]]
    volumes: list[int]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Box]], holders: Sequence[list[int]], width: int) -> _Parts:
        start = np.array([b.start for _, b in parts], np.int64).reshape(len(parts), width)
        stop = np.array([b.stop for _, b in parts], np.int64).reshape(len(parts), width)
        groups = np.array([i for i, _ in parts], np.int64)
        return cls(groups, start, stop, [holders[i] for i, _ in parts], [b.volume for _, b in parts])


@dataclass(frozen=True, slots=True, eq=False)
class _Cover:
    """How a box can be covered: `ways` to choose from, each of which covers all but `missing`."""

    ways: list[_Parts]
    missing: list[Box]

    def choose(self, spread: _Spread, itemsize: int) -> _Parts:
        """The way whose busiest source is least busy; its bytes count as expected, so that the next box looks elsewhere."""
        expected, tie = spread.expected, spread.tie
        best = self.ways[0]
        if len(self.ways) > 1:
            best = min(self.ways, key=lambda way: max(min(expected[o] for o in holders) for holders in way.holders))
        for holders, volume in zip(best.holders, best.volumes, strict=True):
            expected[min(holders, key=lambda o: (expected[o], tie[o]))] += volume * itemsize
        return best


def _cover_of(
    cells: Cells, group: _Groups, groups: range, start: IntArray, stop: IntArray, spread: _Spread, known: dict[bytes, _Cover]
) -> _Cover:
    """Equal boxes met by equal cells, as in equal layers, are worked out once."""
    first = group.first[groups.start : groups.stop]
    rows = group.rows[first[0] : group.first[groups.stop] if groups.stop < len(group.first) else None] if len(first) else first
    lead, layouts = group.rows[first], cells.layout[rows]
    columns = (start, stop, cells.start[lead], cells.stop[lead], layouts, first - first[:1])
    key = b"".join(column.tobytes() for column in columns)
    if key not in known:
        boxes = [Box(tuple(a), tuple(b)) for a, b in zip(cells.start[lead].tolist(), cells.stop[lead].tolist(), strict=True)]
        edges = [*(first - first[:1]).tolist(), len(rows)]
        held = [sorted(set(layouts[a:b].tolist())) for a, b in pairwise(edges)]
        known[key] = _cover(cells, boxes, held, Box(tuple(start.tolist()), tuple(stop.tolist())), spread)
    return known[key]


def _cover(cells: Cells, boxes: Sequence[Box], held: Sequence[Sequence[int]], box: Box, spread: _Spread) -> _Cover:
    """Every way in which one family of pieces tiles `box`, or else one way that reaches as far as the boxes do. held[i]: the
    layouts that have boxes[i]. The last resort tiles a box only where no peer has a part of it."""
    tiers = [min(cells.tier[k] for k in layouts) for layouts in held]
    holders = [
        [o for k in layouts if cells.tier[k] == t for o in cells.holders[k]] for layouts, t in zip(held, tiers, strict=True)
    ]
    families: dict[str, list[int]] = {}
    for i, layouts in enumerate(held):
        for k in layouts:
            if cells.tier[k] == min(tiers):
                family = families.setdefault(str(spread.offers[cells.holders[k][0]].layout.parallel), [])
                family += [i] if i not in family[-1:] else []
    width = len(box.start)
    tilings = [family for family in families.values() if _tiles(box, [boxes[i] for i in family])]
    if tilings:
        return _Cover([_Parts.of([(i, boxes[i]) for i in family], holders, width) for family in sorted(tilings)], [])
    left: list[Box] = [box]
    parts: list[tuple[int, Box]] = []
    for i in sorted(range(len(boxes)), key=lambda i: (tiers[i], -boxes[i].volume, boxes[i])):
        met = [common for part in left if (common := part.intersect(boxes[i])) is not None]
        if met:
            parts += [(i, common) for common in met]
            left = [rest for part in left for rest in part.subtract(boxes[i])]
    return _Cover([_Parts.of(parts, holders, width)], left)


def _tiles(box: Box, boxes: Sequence[Box]) -> bool:
    disjoint = all(a.intersect(b) is None for i, a in enumerate(boxes) for b in boxes[:i])
    return disjoint and sum(b.volume for b in boxes) == box.volume


class _Spread:
    """Bytes asked of each offer, and who is asked next: the least loaded, ties broken by salt."""

    def __init__(self, offers: Sequence[Offer], load: Sequence[int], salt: str) -> None:
        self.offers = offers
        self.load = list(load)
        self.expected = list(load)
        ranked = sorted(range(len(offers)), key=lambda i: blake2b(f"{salt}/{offers[i].source}".encode(), digest_size=8).digest())
        self.tie = [0] * len(offers)
        for place, i in enumerate(ranked):
            self.tie[i] = place

    def _holders(self, cells: Cells, members: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(offer, cell) for every offer of the lowest tier that holds one of these equal cells."""
        tier = min(cells.tier[cells.layout[m]] for m in members)
        seen: set[int] = set()
        for member in members:
            if cells.tier[cells.layout[member]] == tier:
                for offer in cells.holders[cells.layout[member]]:
                    if offer not in seen:
                        seen.add(offer)
                        yield offer, member

    def assign(self, cells: Cells, group: _Groups, groups: IntArray, size: IntArray) -> tuple[IntArray, IntArray]:
        """For each part (a group, `size` bytes): the cell it is cut from and the offer that supplies it.

        Parts with the same set of holders are dealt with together, sets without a choice first, large parts first."""
        member, offer = group.rows[group.first[groups]], np.zeros(len(groups), np.int64)
        ends = np.append(group.first[1:], len(group.rows))
        count = (ends - group.first)[groups]
        # A set of layouts is recognised by the sum of random words, one for each layout.
        words = np.random.default_rng(0).integers(0, 2**63, len(cells.holders), dtype=np.uint64)
        if len(groups) == 0:
            return member, offer
        summed = np.add.reduceat(words[cells.layout[group.rows]], group.first)[groups]
        _, example, inverse = np.unique(summed, return_index=True, return_inverse=True)
        holders = [dict(self._holders(cells, group.members(int(groups[e])).tolist())) for e in example]
        for k in sorted(range(len(example)), key=lambda k: (len(holders[k]), k)):
            rows = np.flatnonzero(inverse == k)
            if len(holders[k]) == 1:
                only = next(iter(holders[k]))
                offer[rows] = only
                self.load[only] += int(size[rows].sum())
                continue
            heap = [(self.load[o], self.tie[o], o) for o in holders[k]]
            heapq.heapify(heap)
            for row in rows[np.argsort(-size[rows], kind="stable")].tolist():
                load, tie, chosen = heap[0]
                offer[row] = chosen
                heapq.heapreplace(heap, (load + int(size[row]), tie, chosen))
            for load, _, o in heap:
                self.load[o] = load
        layout_of = np.full(len(self.offers), -1)
        for k, held in enumerate(cells.holders):
            layout_of[list(held)] = k
        # Among a group's equal cells, the one that lies in the chosen offer's layout.
        for row in np.flatnonzero(count > 1).tolist():
            same = group.members(int(groups[row]))
            member[row] = same[int(np.argmax(cells.layout[same] == layout_of[offer[row]]))]
        return member, offer
