"""Which of many boxes tile which other boxes exactly: along one axis by sorting, in general by a bounded search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..model.boxes import BoolArray, IntArray, volumes
from .digest import DigestArray, fold

_LOW: Final = np.uint64(0xFFFFFFFF)
#: Limits of the search: pairs of target and cell that are looked at for one tensor, cells of the common grid, and steps.
_PAIRS: Final = 1 << 20
_GRID: Final = 4096
_STEPS: Final = 5000


def dense(*columns: IntArray) -> IntArray:
    """A number for each distinct row of the columns (non-negative integers), in lexicographic order; [n]."""
    keys: list[IntArray] = []
    room = 0
    for column in columns:  # mixed radix, as many columns to one key as fit 62 bits
        radix = int(column.max(initial=0)) + 1
        if radix == 1:
            continue
        if keys and room // radix:
            keys[-1] = keys[-1] * radix + column
            room //= radix
        else:
            keys.append(column)
            room = (1 << 62) // radix
    if not keys:
        return np.zeros(len(columns[0]), np.int64)
    if len(keys) == 1:
        return np.unique(keys[0], return_inverse=True)[1].astype(np.int64)
    order = np.lexsort(keys[::-1])
    new = np.zeros(len(order), np.bool_)
    for key in keys:
        new[1:] |= np.diff(key[order]) != 0
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(new)
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Target target[i] is tiled by the cells order[low[i]:high[i]]; their digests sum to total[i] (modulo 2^61 - 1), and
    disputed[i] of them are disputed."""

    order: IntArray
    target: IntArray
    low: IntArray
    high: IntArray
    total: DigestArray
    disputed: IntArray

    def members(self, i: int) -> IntArray:
        return self.order[self.low[i] : self.high[i]]

    def cells(self, rows: BoolArray) -> BoolArray:
        """[cells], True for those in one of the tilings picked by `rows`."""
        edge = np.zeros(len(self.order) + 1, np.int64)
        np.add.at(edge, self.low[rows], 1)
        np.add.at(edge, self.high[rows], -1)
        inside = np.zeros(len(self.order), np.bool_)
        inside[self.order] = np.cumsum(edge[:-1]) > 0
        return inside


class Tilings:
    """tensor[n], start[n, D], stop[n, D] are boxes; rows `cell_row` of them are the cells, distinct boxes that may tile,
    rows `target_row` the targets, distinct boxes to be tiled. digest, disputed: [cells]."""

    def __init__(
        self,
        tensor: IntArray,
        start: IntArray,
        stop: IntArray,
        cell_row: IntArray,
        target_row: IntArray,
        digest: DigestArray,
        disputed: BoolArray,
    ) -> None:
        self.digest, self._disputed = digest, disputed
        self._cell_row, self._target_row = cell_row, target_row
        self._n = len(cell_row)
        rows = np.concatenate([cell_row, target_row])
        self._tensor, self._start, self._stop = tensor[rows], start[rows], stop[rows]

    def along_axes(self) -> Iterator[Found]:
        """Tilings by an equal box, then those along each axis. A line of cells that overlap each other hides some, which
        `searched` may find."""
        if self._n == 0:
            return
        one = np.zeros(len(self._tensor), np.int64)
        yield self._along(dense(self._tensor, *self._start.T, *self._stop.T), one, one + 1, single=True)
        spans = [dense(a, b) for a, b in zip(self._start.T, self._stop.T, strict=True)]
        for axis in range(len(spans)):
            if spans[axis].any():
                line = dense(self._tensor, *(s for a, s in enumerate(spans) if a != axis))
                yield self._along(line, self._start[:, axis], self._stop[:, axis], single=False)

    def _along(self, line: IntArray, start: IntArray, stop: IntArray, *, single: bool) -> Found:
        n, reach = self._n, int(stop.max()) + 1
        first, last = line * reach + start, line * reach + stop
        order = np.argsort(first[:n], kind="stable")
        begin, end = first[:n][order], last[:n][order]
        gaps = np.concatenate([[0, 0], np.cumsum(begin[1:] != end[:-1])])  # gaps[i]: among cells 0..i-1
        low = np.searchsorted(begin, first[n:])
        high = np.searchsorted(end, last[n:]) + 1
        met = (low < high) & (high <= n)
        target = np.flatnonzero(met)
        low, high = low[met], high[met]
        # Searching is only a guess where cells overlap; these checks make it a proof.
        met = (begin[low] == first[n:][target]) & (end[high - 1] == last[n:][target]) & (gaps[high] == gaps[low + 1])
        if not single:
            met &= high - low > 1
        target, low, high = target[met], low[met], high[met]
        return Found(order, target, low, high, self._sums(order, low, high), self._count(order, low, high))

    def _sums(self, order: IntArray, low: IntArray, high: IntArray) -> DigestArray:
        digest = self.digest[order]
        none = np.zeros(1, np.uint64)
        lower, upper = (np.concatenate([none, np.cumsum(d)]) for d in (digest & _LOW, digest >> np.uint64(32)))
        return fold(lower[high] - lower[low], upper[high] - upper[low])

    def _count(self, order: IntArray, low: IntArray, high: IntArray) -> IntArray:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._disputed[order])])
        count: IntArray = before[high] - before[low]
        return count

    def searched(self, settled: BoolArray, claimed: BoolArray, wanted: BoolArray) -> Iterator[tuple[int, IntArray]]:
        """Other tilings, as (target, cells): for `claimed` targets those with a cell that isn't settled, for `wanted` ones
        any. Bounded: where boxes are too many or too tangled, tilings are missed, never invented."""
        n = self._n
        tensor, volume = self._tensor, volumes(self._start, self._stop)
        size = int(tensor.max(initial=-1)) + 1
        held = np.bincount(tensor[:n], volume[:n], size)
        cells = np.bincount(tensor[:n], minlength=size)
        open_ = np.zeros(size, np.bool_)
        open_[tensor[:n][~settled]] = True
        hopeful = (claimed & open_[tensor[n:]]) | wanted
        hopeful &= (held[tensor[n:]] >= volume[n:]) & (cells[tensor[n:]] > 1)
        targets = np.flatnonzero(hopeful)
        pairs = np.bincount(tensor[n + targets], minlength=size) * cells
        targets = targets[pairs[tensor[n + targets]] <= _PAIRS]
        if len(targets) == 0:
            return
        by_tensor = np.argsort(tensor[:n], kind="stable")
        edge = np.concatenate([[0], np.cumsum(cells)])
        done = settled.copy()
        for target in targets.tolist():
            row, t = n + target, int(tensor[n + target])
            near = by_tensor[edge[t] : edge[t + 1]]
            inside = (self._start[near] >= self._start[row]).all(axis=1) & (self._stop[near] <= self._stop[row]).all(axis=1)
            near = near[inside]
            hull = self._start[near].min(axis=0, initial=1 << 62), self._stop[near].max(axis=0, initial=0)
            if volume[near].sum() < volume[row] or (hull[0] != self._start[row]).any() or (hull[1] != self._stop[row]).any():
                continue
            todo = near[~done[near]].tolist() if claimed[target] else []
            for must in todo or ([-1] if wanted[target] else []):
                if must >= 0 and done[must]:
                    continue
                found = _cover(self._start[near], self._stop[near], near.tolist().index(must) if must >= 0 else None)
                if found is not None:
                    done[near[found]] = True
                    yield target, near[found]


def _cover(start: IntArray, stop: IntArray, must: int | None) -> IntArray | None:
    """Boxes that tile their common hull exactly, box `must` among them; or None. Boxes become bit masks over the grid of all
    their edges, and the lowest free bit decides which boxes may come next."""
    edges = [np.unique(np.concatenate([start[:, a], stop[:, a]])) for a in range(start.shape[1])]
    shape = [len(e) - 1 for e in edges]
    if np.prod(shape) > _GRID:
        return None
    masks: list[int] = []
    for a, b in zip(start, stop, strict=True):
        grid = np.zeros(shape, np.bool_)
        grid[tuple(slice(*np.searchsorted(e, (x, y)).tolist()) for e, x, y in zip(edges, a, b, strict=True))] = True
        masks.append(int.from_bytes(np.packbits(grid.reshape(-1), bitorder="little").tobytes(), "little"))
    full = (1 << int(np.prod(shape))) - 1
    chosen = _fill(masks, full, [] if must is None else [must])
    return None if chosen is None else np.array(chosen)


def _fill(masks: Sequence[int], full: int, chosen: list[int]) -> list[int] | None:
    """Depth first, at most _STEPS boxes tried."""
    taken = 0
    for box in chosen:
        taken |= masks[box]
    stack = [(taken, chosen)]
    for _ in range(_STEPS):
        if not stack:
            return None
        taken, chosen = stack.pop()
        if taken == full:
            return chosen
        free = ~taken & (taken + 1)
        stack.extend((taken | m, [*chosen, i]) for i, m in enumerate(masks) if m & free and not m & taken)
    return None
