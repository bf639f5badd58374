"""What a probe saw, as a `Layout`: boxes with strides wherever elements are copies, else opaque with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ...model.boxes import Box, IntArray
from ...model.catalog import Catalog, Parallel, TensorSpec
from ...model.layout import Constant, Layout, Opaque, Piece, Pieces
from .boxes import Strided, strided_boxes, strided_runs
from .run import CONSTANT, EMPTY, OPAQUE, Probed, Seen

#: A tensor that takes more boxes is shuffled element by element; nobody would copy it that way.
MOST_BOXES: Final = 4096


def decoded_layout(probed: Probed, parallel: Parallel = Parallel(), rank: int = 0, *, tag: str = "") -> Layout:  # noqa: B008
    """One buffer for each tensor of the model that isn't empty or another one's memory; a scattered tensor's buffer spans its
    gaps. Cast tensors join the catalog as `<name> as <dtype>`. tag: of opaque regions, what must be equal for their bytes to
    be exchanged."""
    writer = _Writer(probed, tag, list(probed.catalog))
    buffers = {name: seen for name, seen in probed.buffers.items() if seen.kind != EMPTY and not seen.shares}
    nbytes = [writer.add(buffer, name, seen) for buffer, (name, seen) in enumerate(buffers.items())]
    catalog = Catalog.of(writer.tensors)
    return Layout(
        catalog,
        tuple(buffers),
        np.array(nbytes, np.int64),
        Pieces.of(writer.pieces, catalog.width),
        tuple(writer.constants),
        tuple(writer.opaques),
        parallel=parallel,
        rank=rank,
    )


def told_boxes(probed: Probed, seen: Seen) -> str:
    """Where a tensor's elements come from, for people: the first few boxes, where each lies and by which strides, in elements.
    Of packed units that have changed places: in units, which the boxes' last dimension counts."""
    elements = _elements(seen)
    if elements is None:
        found = list(_boxes(probed, seen.ids, np.arange(len(seen.ids), dtype=np.int64), packed=True))
    else:
        found = list(_boxes(probed, elements, seen.where))
    unit = "" if elements is not None else f" of {probed.numbering.bits}-bit units"
    told = [f"{probed.catalog.names[row]}{_box(b)} at {b.at} by {b.step}" for row, b in found[:2]]
    return f"{len(found)} boxes{unit}: {'; '.join(told)}{'; ...' if len(found) > 2 else ''}"


@dataclass(eq=False)
class _Writer:
    """Rows of the layout so far."""

    probed: Probed
    tag: str
    tensors: list[TensorSpec]
    pieces: list[Piece] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    opaques: list[Opaque] = field(default_factory=list)

    def add(self, buffer: int, name: str, seen: Seen) -> int:
        """Returns the buffer's bytes."""
        where, itemsize = seen.where, seen.itemsize
        nbytes = (int(where[-1]) + 1) * itemsize
        elements = _elements(seen)
        boxes = [] if seen.kind == OPAQUE or elements is None else list(_boxes(self.probed, elements, where))
        if seen.kind == OPAQUE:
            self._opaque(buffer, name, nbytes, seen.reason)
        elif elements is None:
            self._opaque(buffer, name, nbytes, told_boxes(self.probed, seen))
        elif len(boxes) > MOST_BOXES:
            self._opaque(buffer, name, nbytes, f"its elements are shuffled: {len(boxes)} boxes")
        else:
            self._fill(buffer, seen, elements, where, itemsize)
            for row, box in boxes:
                strides = tuple(s * itemsize for s in box.step)
                self.pieces.append(Piece(self._tensor(row, seen), _box(box), buffer, box.at * itemsize, strides))
        return nbytes

    def _opaque(self, buffer: int, name: str, nbytes: int, reason: str) -> None:
        self.opaques.append(Opaque(name, self.tag, buffer, 0, nbytes, (), reason))

    def _fill(self, buffer: int, seen: Seen, elements: IntArray, where: IntArray, itemsize: int) -> None:
        """Constants, and what nobody writes as what the constructor left there."""
        values = np.where(elements == CONSTANT, seen.last, seen.last if seen.made is None else seen.made)
        blank = elements < 0
        for value in np.unique(values[blank]).tolist():
            for first, shape, step in strided_runs(where[blank & (values == value)]):
                strides = (step[0] * itemsize, step[1] * itemsize)
                self.constants.append(Constant(buffer, first * itemsize, shape, strides, value.to_bytes(itemsize, "little")))

    def _tensor(self, row: int, seen: Seen) -> int:
        spec = self.probed.catalog[row]
        if spec.name not in seen.casts:
            return row
        cast = TensorSpec(f"{spec.name} as {seen.dtype}", seen.dtype, spec.shape)
        if cast not in self.tensors:
            self.tensors.append(cast)
        return self.tensors.index(cast)


def _box(strided: Strided) -> Box:
    return Box(strided.first, tuple(a + n for a, n in zip(strided.first, strided.size, strict=True)))


def _elements(seen: Seen) -> IntArray | None:
    """Of packed tensors, ids of whole elements (their first units'); None where units changed places."""
    if seen.split == 1:
        return seen.ids
    ids = seen.ids.reshape(-1, seen.split)
    whole = (ids == ids[:, :1] + np.arange(seen.split)) & (ids[:, :1] >= 0)
    same = (ids == ids[:, :1]) & (ids < 0)
    return ids[:, 0] if (whole.all(axis=1) | same.all(axis=1)).all() else None


def _boxes(probed: Probed, ids: IntArray, where: IntArray, *, packed: bool = False) -> Iterator[tuple[int, Strided]]:
    """(catalog row, box) of all ids that are units of the checkpoint. packed: in units, the last dimension counting them."""
    numbering = probed.numbering
    copied = np.flatnonzero(ids >= 0)
    rows = numbering.tensor_of(ids[copied])
    for row in np.unique(rows).tolist():
        mine = copied[rows == row]
        unit, split, shape = ids[mine] - numbering.start[row], int(numbering.split[row]), probed.catalog.shapes[row]
        if packed:
            shape = (*shape[:-1], shape[-1] * split) if shape else (split,)
        for box in strided_boxes(unit if packed else unit // split, where[mine], shape):
            yield row, box
