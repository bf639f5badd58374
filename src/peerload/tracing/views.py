"""Strided views of one storage: what two of them share, exactly, as boxes of both.

A storage offset is written in mixed radix, the radices being all strides in play. In these digits every view is a few boxes,
so intersection and difference are digit by digit. This needs each stride to divide the next larger one, which holds for
dense tensors and everything sliced, split, transposed, stacked or reshaped out of them; anything else is `Inexpressible`.
Offsets and strides count elements. Pure: standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

#: More boxes than this out of one box mean that an operation shuffles elements rather than blocks (heads are blocks).
MOST_BOXES: Final = 256


class Inexpressible(Exception):
    """The relation of two views is no small set of strided boxes; the message says why."""


@dataclass(frozen=True, slots=True)
class View:
    """Index k of dimension d lies `stride[d]` elements further, from `offset`. Strides are not negative."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the highest element touched."""
        last = self.offset
        for size, stride in zip(self.shape, self.stride, strict=True):
            last += (size - 1) * stride
        return last + 1

    @property
    def dense(self) -> bool:
        """Does it touch every element of [offset, stop) once?"""
        span = 1
        for stride, size in sorted((s, n) for n, s in zip(self.shape, self.stride, strict=True) if n > 1):
            if stride != span:
                return False
            span *= size
        return True

    def at(self, index: Sequence[int]) -> int:
        """Storage offset of one element."""
        return self.offset + sum(i * s for i, s in zip(index, self.stride, strict=True))


@dataclass(frozen=True, slots=True)
class Level:
    """One loop of a `Cell`: `size` steps; each moves `step_a` along dimension `dim_a` of the one view, same for b."""

    size: int
    dim_a: int
    step_a: int
    dim_b: int
    step_b: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Elements that views a and b share: from index `first_a` of a, which is `first_b` of b, over nested `levels`."""

    first_a: tuple[int, ...]
    first_b: tuple[int, ...]
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class _Digits:
    """A box in mixed radix. Per level: lowest digit, number of digits, the view's dimension that moves it (-1: none) and
    how far one digit moves it. `first` is the view's index at the lowest corner."""

    low: tuple[int, ...]
    size: tuple[int, ...]
    dim: tuple[int, ...]
    step: tuple[int, ...]
    first: tuple[int, ...]

    def narrowed(self, low: Sequence[int], size: Sequence[int]) -> _Digits:
        first = list(self.first)
        for level, dim in enumerate(self.dim):
            if dim >= 0:
                first[dim] += self.step[level] * (low[level] - self.low[level])
        return _Digits(tuple(low), tuple(size), self.dim, self.step, tuple(first))


def _replace(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _radices(*views: View) -> tuple[int, ...]:
    """All strides in play, descending, ending in 1."""
    strides = {s for v in views for n, s in zip(v.shape, v.stride, strict=True) if n > 1} | {1}
    if 0 in strides:
        raise Inexpressible("one element stands at several indices (an expanded tensor)")
    radices = sorted(strides, reverse=True)
    for big, small in itertools.pairwise(radices):
        if big % small:
            raise Inexpressible(f"strides {big} and {small} do not divide each other")
    return tuple(radices)


def _digits(view: View, radices: tuple[int, ...]) -> list[_Digits]:
    """The view as disjoint boxes of digits."""
    rest, low = view.offset, []
    for radix in radices:
        digit, rest = divmod(rest, radix)
        low.append(digit)
    n, nothing = len(radices), (0,) * len(radices)
    boxes = [_Digits(tuple(low), (1,) * n, (-1,) * n, nothing, (0,) * len(view.shape))]
    for stride, dim in sorted((s, d) for d, s in enumerate(view.stride) if view.shape[d] > 1):
        level = radices.index(stride)
        boxes = [b for box in boxes for b in _spread(box, radices, dim, level, view.shape[dim], 1)]
    return boxes


def _spread(box: _Digits, radices: tuple[int, ...], dim: int, level: int, size: int, step: int) -> Iterator[_Digits]:
    """The box swept by `size` positions of `dim` (each `step` indices) at `level`; what exceeds a digit carries upward."""
    if size == 1:
        yield box
        return
    if box.size[level] > 1:
        raise Inexpressible("two dimensions run over the same elements")
    low = box.low[level]
    room = radices[level - 1] // radices[level] if level else low + size
    rows: list[tuple[int, int, int, int]] = []  # first row, rows, lowest digit, digits
    full, end = (1 if low else 0), (low + size) // room
    if low + size <= room:
        rows.append((0, 1, low, size))
    else:
        if low:
            rows.append((0, 1, low, room - low))
        if end > full:
            rows.append((full, end - full, 0, room))
        if (low + size) % room:
            rows.append((end, 1, 0, (low + size) % room))
    for row, count, digit, digits in rows:
        first = _replace(box.first, dim, box.first[dim] + step * (row * room + digit - low))
        part = _Digits(
            _replace(box.low, level, digit),
            _replace(box.size, level, digits),
            _replace(box.dim, level, dim),
            _replace(box.step, level, step),
            first,
        )
        yield from _spread(_carry(part, radices, level - 1, row), radices, dim, level - 1, count, step * room)


def _carry(box: _Digits, radices: tuple[int, ...], level: int, amount: int) -> _Digits:
    """The box moved up by `amount` digits of `level`."""
    while amount:
        room = radices[level - 1] // radices[level] if level else 0
        if box.size[level] > 1:
            raise Inexpressible("two dimensions run over the same elements")
        amount, digit = divmod(box.low[level] + amount, room) if level else (0, box.low[0] + amount)
        box = _Digits(_replace(box.low, level, digit), box.size, box.dim, box.step, box.first)
        level -= 1
    return box


def _meet(a: _Digits, b: _Digits) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Lowest digits and numbers of digits that two boxes share."""
    low = tuple(map(max, a.low, b.low))
    size = tuple(min(x + n, y + m) - z for x, n, y, m, z in zip(a.low, a.size, b.low, b.size, low, strict=True))
    return None if min(size) < 1 else (low, size)


def overlap(a: View, b: View) -> list[Cell]:
    """The elements that two views share, as disjoint cells. Raises Inexpressible."""
    if a.offset >= b.stop or b.offset >= a.stop:
        return []
    if a == b:
        levels = tuple(Level(n, d, 1, d, 1) for d, n in enumerate(a.shape) if n > 1)
        return [Cell((0,) * len(a.shape), (0,) * len(b.shape), levels)]
    radices = _radices(a, b)
    cells: list[Cell] = []
    for x, y in itertools.product(_digits(a, radices), _digits(b, radices)):
        common = _meet(x, y)
        if common is None:
            continue
        p, q = x.narrowed(*common), y.narrowed(*common)
        levels = tuple(Level(n, p.dim[i], p.step[i], q.dim[i], q.step[i]) for i, n in enumerate(common[1]) if n > 1)
        cells.append(Cell(p.first, q.first, levels))
    return cells


def without(a: View, b: View) -> list[Cell]:
    """The elements of a that b doesn't touch, as disjoint cells whose second view is a itself. Raises Inexpressible."""
    radices = _radices(a, b)
    left = _digits(a, radices)
    for hole in _digits(b, radices):
        left = [piece for box in left for piece in _cut(box, hole)]
    return [
        Cell(x.first, x.first, tuple(Level(n, x.dim[i], x.step[i], x.dim[i], x.step[i]) for i, n in enumerate(x.size) if n > 1))
        for x in left
    ]


def _cut(box: _Digits, hole: _Digits) -> Iterator[_Digits]:
    common = _meet(box, hole)
    if common is None:
        yield box
        return
    low, size = list(box.low), list(box.size)
    for level, (start, count) in enumerate(zip(*common, strict=True)):
        before, after = start - low[level], low[level] + size[level] - start - count
        if before:
            yield box.narrowed(low, [*size[:level], before, *size[level + 1 :]])
        if after:
            yield box.narrowed([*low[:level], start + count, *low[level + 1 :]], [*size[:level], after, *size[level + 1 :]])
        low[level], size[level] = start, count


def boxes(cell: Cell, target: View, ndim: int) -> Iterator[tuple[tuple[int, ...], View]]:
    """A cell as boxes of b laid out in `target`, a view indexed like a: for each, its first index in b (`ndim`
    dimensions) and where it lies. Raises Inexpressible when that takes more than MOST_BOXES."""
    keep: list[tuple[int, int] | None] = [None] * ndim  # per dimension of b: size, stride in target
    loose: list[tuple[int, int, int, int]] = []  # size, dimension of b, step in b, stride in target
    runs: dict[int, list[tuple[int, int, int]]] = {}  # per dimension of b, innermost first: size, step, stride
    for level in reversed(cell.levels):
        stride = level.step_a * target.stride[level.dim_a]
        chain = runs.setdefault(level.dim_b, [])
        if chain and level.step_b == chain[-1][0] * chain[-1][1] and stride == chain[-1][0] * chain[-1][2]:
            chain[-1] = (chain[-1][0] * level.size, chain[-1][1], chain[-1][2])
        else:
            chain.append((level.size, level.step_b, stride))
    for dim, chain in runs.items():
        for size, step, stride in chain:
            if step == 1:
                keep[dim] = (size, stride)
            else:
                loose.append((size, dim, step, stride))
    count = math.prod(size for size, _, _, _ in loose)
    if count > MOST_BOXES:
        raise Inexpressible(f"it takes {count} boxes")
    shape = tuple(k[0] if k else 1 for k in keep)
    strides = tuple(k[1] if k else 0 for k in keep)
    origin = target.at(cell.first_a)
    for index in itertools.product(*(range(size) for size, _, _, _ in loose)):
        first, offset = list(cell.first_b), origin
        for k, (_, dim, step, stride) in zip(index, loose, strict=True):
            first[dim] += k * step
            offset += k * stride
        yield tuple(first), View(offset, shape, strides)
