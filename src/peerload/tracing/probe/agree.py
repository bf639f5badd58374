"""Does a traced layout say the same as a probe of the same model, element by element?

    differences = agree(traced.layout, probe(build, load, catalog))    # no `finish`: both are of the load-time layout
    assert not differences, differences

Buffers of the layout are named like tensors of the probe. The layout's catalog may hold more than the probe's: a tensor
`<name> as F32` stands for a cast of `<name>`, any other for values that only the engine can compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ...model.boxes import BoolArray, IntArray
from ...model.layout import Layout
from .codes import Patterns
from .run import COMPUTED, CONSTANT, COPY, OPAQUE, UNWRITTEN, Probed, Seen

#: A byte that the layout says nothing about.
_UNSAID = UNWRITTEN


def agree(layout: Layout, probed: Probed, covers: Mapping[str, Collection[str]] = MappingProxyType({})) -> list[str]:
    """Differences, each naming the buffer, its first element that differs and both origins; none when the two agree.

    Checked for every buffer of `layout`: size, dtype, and for each element which checkpoint element it holds, cast or not,
    or which constant. Where the layout has a value computed by the engine, the probe must not see a plain constant. covers:
    logical name -> the checkpoint tensors that such a value is computed from; where the probe had groups of them, it must not
    depend on others.
    Tensors that the probe has and the layout lacks must hold nothing of the checkpoint, or share another one's memory.
    """
    claims = _Expected.of(layout, probed, covers)
    differences = []
    for buffer, name in enumerate(layout.buffer_names):
        seen = probed.buffers.get(name)
        if seen is None:
            differences.append(f"{name}: the model that was probed has no such tensor")
        else:
            differences += claims.compare(buffer, seen)
    missing = probed.buffers.keys() - set(layout.buffer_names)
    for name in sorted(missing):
        seen = probed.buffers[name]
        if seen.kind in (COPY, OPAQUE) and not seen.shares:
            what = probed.origin(int(seen.ids[np.argmax(seen.ids >= 0)])) if seen.kind == COPY else seen.reason
            differences.append(f"{name}: missing from the layout, but the probe sees {what} in it")
    return differences


@dataclass(frozen=True, eq=False)
class _Expected:
    """A layout's pieces and constants by buffer, its tensors as rows of the probe's catalog: COMPUTED for the others. group: the
    probe's that has all that such a tensor is computed from, by logical name."""

    layout: Layout
    probed: Probed
    row: IntArray
    cast: frozenset[int]
    pieces: dict[int, list[int]]
    group: Mapping[str, int]

    @classmethod
    def of(cls, layout: Layout, probed: Probed, covers: Mapping[str, Collection[str]]) -> _Expected:
        known, catalog = probed.catalog.row, layout.catalog
        rows, cast = np.full(len(catalog), COMPUTED, np.int64), set()
        for i, name in enumerate(catalog.names):
            plain = name.rpartition(" as ")[0]
            if name in known:
                rows[i] = known[name]
            elif plain in known:
                rows[i] = known[plain]
                cast.add(i)
        pieces: dict[int, list[int]] = {}
        for piece in layout.written.tolist():
            pieces.setdefault(int(layout.pieces.buffer[piece]), []).append(piece)
        group = {name: g for name, bases in covers.items() for g, held in enumerate(probed.groups) if held.issuperset(bases)}
        return cls(layout, probed, rows, frozenset(cast), pieces, group)

    def compare(self, buffer: int, seen: Seen) -> list[str]:
        layout, name = self.layout, self.layout.buffer_names[buffer]
        size = int(layout.buffer_nbytes[buffer]) // max(1, seen.numel)
        if size * seen.numel != layout.buffer_nbytes[buffer] or seen.offset is not None or not seen.numel:
            lie = "side by side" if seen.offset is None else "scattered"
            return [f"{name}: {layout.buffer_nbytes[buffer]} bytes in the layout, {seen.numel} elements {lie} in the probe"]
        claimed = np.full(seen.numel, _UNSAID, np.int64)
        fills = np.zeros(seen.numel, np.uint64)
        differences = []
        for piece in self.pieces.get(buffer, []):
            tensor = int(layout.pieces.tensor[piece])
            spec, row = layout.catalog[tensor], int(self.row[tensor])
            at, element = _places(layout, piece)
            if layout.catalog.itemsize[tensor] != size or (at % size).any():
                differences.append(f"{name}: {layout.describe(piece)} has elements of another size, or not aligned")
                continue
            told = self.probed.catalog.names[row] if row >= 0 else ""
            if row >= 0 and (tensor in self.cast) != (told in seen.casts) and seen.kind == COPY:
                differences.append(
                    f"{name}: the layout holds {spec.name}, in the probe it is {'' if told in seen.casts else 'not '}cast"
                )
            split = self.probed.numbering.split[row] if row >= 0 else 1
            start = self.probed.numbering.start[row] if row >= 0 else 0
            claimed[at // size] = start + element * split if row >= 0 else COMPUTED
            if row < 0 and spec.name in self.group:
                other = ~seen.steady[self.group[spec.name]][at // size]
                if other.any():
                    differences.append(
                        f"{name}: {int(other.sum())} elements of {spec.name} depend on more than it is computed from"
                    )
        for constant in layout.constants:
            if constant.buffer != buffer:
                continue
            at = _spread(constant.offset, constant.shape, constant.strides) // size
            claimed[at], fills[at] = CONSTANT, int.from_bytes(constant.fill, "little")
        wrong = _differ(claimed, fills, seen, self._given(claimed))
        if wrong.any():
            first = int(np.argmax(wrong))
            unit = int(seen.ids[first * seen.split])
            value = f" {int(seen.last[first]):#x}" if unit == CONSTANT else ""
            told = self._told(int(claimed[first]), int(fills[first]))
            differences.append(
                f"{name}: {int(wrong.sum())} of {seen.numel} elements differ, first {first} (in memory order): "
                f"the layout says {told}, the probe {self.probed.origin(unit)}{value}"
            )
        return differences

    def _given(self, claimed: IntArray) -> BoolArray:
        """Elements claimed for tensors whose values were fixed: the probe can only see a constant."""
        fixed = np.array(sorted(self.probed.numbering.fixed), np.int64)
        tensor = self.probed.numbering.tensor_of(np.maximum(claimed, 0))
        given: BoolArray = np.isin(tensor, fixed) & (claimed >= 0)
        return given

    def _told(self, claim: int, fill: int) -> str:
        if claim == CONSTANT:
            return f"a constant {fill:#x}"
        return "nothing" if claim == _UNSAID else self.probed.origin(claim)


def _differ(claimed: IntArray, fills: Patterns, seen: Seen, given: BoolArray) -> BoolArray:
    """[elements]."""
    ids = seen.ids.reshape(seen.numel, seen.split)
    copied = (ids == claimed[:, None] + np.arange(seen.split)).all(axis=1)
    steady = np.isin(ids, (CONSTANT, UNWRITTEN)).all(axis=1)
    untouched = (ids == UNWRITTEN).all(axis=1)
    right = np.where(claimed >= 0, copied, False)
    right |= given & steady & ~untouched
    right |= (claimed == COMPUTED) & ~steady
    right |= (claimed == CONSTANT) & steady & ~untouched & (seen.last == fills)
    if seen.made is not None:
        right |= (claimed == CONSTANT) & untouched & (seen.made == fills)
    wrong: BoolArray = ~right
    return wrong


def _places(layout: Layout, piece: int) -> tuple[IntArray, IntArray]:
    """Byte offsets in the buffer, and row-major element numbers in the tensor, of every element of a piece."""
    pieces, shape = layout.pieces, layout.catalog.shape[layout.pieces.tensor[piece]]
    size = tuple((pieces.stop[piece] - pieces.start[piece]).tolist())
    weight = np.append(np.cumprod(shape[:0:-1])[::-1], 1)
    at = _spread(int(pieces.offset[piece]), size, tuple(pieces.stride[piece].tolist()))
    element = _spread(int((pieces.start[piece] * weight).sum()), size, tuple(weight.tolist()))
    return at, element


def _spread(first: int, shape: tuple[int, ...], step: tuple[int, ...]) -> IntArray:
    """`first` + sum of index * step, for all indices in row-major order."""
    where = np.array([first], np.int64)
    for size, stride in zip(shape, step, strict=True):
        where = (where[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return where
