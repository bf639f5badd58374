"""What a storage holds: boxes of checkpoint tensors, constants and computed regions, and where in it they lie.

`Contents` keeps them in clusters of overlapping extents, so that a write costs what lies under it and not what the storage
holds (fused experts: hundreds of boxes in one storage). Offsets and strides count elements. Pure: standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .views import View, boxes, overlap, without


@dataclass(frozen=True, slots=True)
class Taint:
    """Values that are no copy of checkpoint elements: computed from the checkpoint tensors `covers`, or, when there are none,
    made by the engine itself. `reason` names the operation or the origin."""

    covers: frozenset[str]
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """Elements of one storage, in one of three kinds: the box of logical tensor `name` that begins at `start`; or, `name`
    being empty, computed values (`taint`) or a constant (`fill`: one element's bytes).
    `view` says where they lie, with the tensor's own dimensions."""

    name: str
    start: tuple[int, ...]
    view: View
    fill: bytes = b""
    taint: Taint | None = None

    def at(self, start: tuple[int, ...], view: View) -> Held:
        """A part of it, or the same elements elsewhere."""
        return Held(self.name, start, view, self.fill, self.taint)


@dataclass(slots=True)
class _Cluster:
    """All that lies within [start, stop); nothing reaches out of it."""

    start: int
    stop: int
    held: list[Held]


@dataclass(slots=True)
class Contents:
    """The `Held` of one storage; no two share an element."""

    _starts: list[int] = field(default_factory=list)
    _clusters: list[_Cluster] = field(default_factory=list)

    def __iter__(self) -> Iterator[Held]:
        for cluster in self._clusters:
            yield from cluster.held

    def near(self, view: View) -> list[Held]:
        """Those whose extent meets the view's extent."""
        start, stop = view.offset, view.stop
        low, high = self._range(start, stop)
        if high - low == 1 and len(self._clusters[low].held) == 1:
            return self._clusters[low].held[:]
        near = [held for cluster in self._clusters[low:high] for held in cluster.held]
        return [held for held in near if held.view.offset < stop and start < held.view.stop]

    def add(self, new: Iterable[Held]) -> None:
        """Note what lies where nothing was."""
        for held in new:
            self._insert(held.view.offset, held.view.stop, [held])

    def replace(self, mine: View, new: list[Held]) -> None:
        """The elements of `mine` hold `new` from here on. Raises Inexpressible, and then nothing has changed."""
        low, high = self._range(mine.offset, mine.stop)
        dense, left = high > low and mine.dense, []
        for cluster in self._clusters[low:high]:
            for old in cluster.held:
                if not (dense and mine.offset <= old.view.offset and old.view.stop <= mine.stop):
                    left += _outside(old, mine)
        del self._clusters[low:high], self._starts[low:high]
        self.add(left)
        self.add(new)

    def clear(self) -> None:
        self._starts.clear()
        self._clusters.clear()

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        """The clusters that meet [start, stop), as a range of their list."""
        low = bisect_right(self._starts, start)
        if low and self._clusters[low - 1].stop > start:
            low -= 1
        return low, max(low, bisect_left(self._starts, stop))

    def _insert(self, start: int, stop: int, held: list[Held]) -> None:
        low, high = self._range(start, stop)
        if high > low:
            merged = self._clusters[low:high]
            start, stop = min(start, merged[0].start), max(stop, *(c.stop for c in merged))
            held = [h for c in merged for h in c.held] + held
        self._clusters[low:high] = [_Cluster(start, stop, held)]
        self._starts[low:high] = [start]


def _outside(old: Held, mine: View) -> list[Held]:
    """What is left of `old` outside a view."""
    if old.view.offset >= mine.stop or mine.offset >= old.view.stop:
        return [old]
    cells = without(old.view, mine)
    return [old.at(add(old.start, first), view) for c in cells for first, view in boxes(c, old.view, len(old.start))]


def cut(held: Held, seen: View, target: View) -> Held | None:
    """What of `held` is visible through `seen`, laid out in `target`, if `seen` is a plain slice of it."""
    first = _slice(seen, held.view)
    return None if first is None else held.at(add(held.start, first), target)


def part(held: Held, seen: View, target: View) -> Iterator[tuple[tuple[int, ...], View]]:
    """What of `held` is visible through `seen`, laid out in `target` (indexed like `seen`): (start, view)."""
    first = _slice(seen, held.view)
    if first is not None:
        yield add(held.start, first), target
        return
    for cell in overlap(seen, held.view):
        for first, view in boxes(cell, target, len(held.start)):
            yield add(held.start, first), view


def _slice(inner: View, outer: View) -> tuple[int, ...] | None:
    """The index in `outer` where `inner` begins, if one is a plain slice of the other: same dimensions and strides."""
    if inner.stride != outer.stride or not outer.shape:
        return () if inner == outer else None
    rest, first = inner.offset - outer.offset, [0] * len(outer.shape)
    if rest:
        if rest < 0:
            return None
        for dim in sorted(range(len(first)), key=outer.stride.__getitem__, reverse=True):
            if outer.stride[dim]:
                first[dim], rest = divmod(rest, outer.stride[dim])
        if rest:
            return None
    for begin, size, most in zip(first, inner.shape, outer.shape, strict=True):
        if begin + size > most:
            return None
    return tuple(first)


def add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def moved(view: View, by: int) -> View:
    return View(view.offset + by, view.shape, view.stride)


def count(held: Iterable[Held]) -> int:
    """Elements in all."""
    return sum(math.prod(h.view.shape) for h in held)
