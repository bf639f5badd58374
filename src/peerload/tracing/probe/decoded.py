"""What a probe saw of a tensor, as boxes of the checkpoint, in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...model.boxes import Box, IntArray
from .boxes import Strided, strided_boxes
from .run import Probed, Seen


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
