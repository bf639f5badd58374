"""Casts while loading: made when the bytes are there.

What the wire carries and what a seed offers is the checkpoint's own dtype, so that every layout has something for every other.
A parameter in another dtype has memory for its bytes beside it: its `Shadow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from torch import Tensor

from ...errors import LayoutError
from ...model.catalog import Catalog
from ...model.layout import Layout, Pieces

#: Between these, a cast is what the engine's loader means by loading; anything else makes other values.
_FLOATS: Final = frozenset(("BF16", "F16", "F32", "F64"))


@dataclass(frozen=True, slots=True)
class Shadow:
    """A parameter that isn't kept in the checkpoint's dtype, and memory of our own that holds it in that dtype."""

    parameter: Tensor
    memory: Tensor

    def publish(self) -> None:
        """Cast the parameter's values into the memory."""
        self.memory.copy_(self.parameter)

    def accept(self) -> None:
        """Cast what has arrived in the memory into the parameter."""
        self.parameter.copy_(self.memory)


def as_stored(layout: Layout, casts: Mapping[str, str]) -> Layout:
    """The layout of the shadows: what holds casts holds the checkpoint's tensors instead. casts: cast tensor -> checkpoint
    tensor. Raises LayoutError, naming the parameter, for casts that no shadow can stand for."""
    if not casts:
        return layout
    old, pieces = layout.catalog, layout.pieces
    kept = [row for row, name in enumerate(old.names) if name not in casts]
    new = Catalog.of(old[row] for row in kept)
    at = np.array([new.row[casts.get(name, name)] for name in old.names])
    tensor = at[pieces.tensor]
    here, there = old.itemsize[pieces.tensor], new.itemsize[tensor]
    nbytes = layout.buffer_nbytes.copy()
    for buffer in np.unique(pieces.buffer[[old.names[t] in casts for t in pieces.tensor.tolist()]]).tolist():
        rows = np.flatnonzero(pieces.buffer == buffer)
        found = sorted({(new.dtypes[tensor[row]], old.dtypes[pieces.tensor[row]]) for row in rows.tolist()})
        if len(found) > 1 or any(c.buffer == buffer for c in layout.constants):
            raise LayoutError(f"{layout.buffer_names[buffer]}: the engine casts a part of it, or constants, to {found[0][1]}")
        if not _FLOATS.issuperset(found[0]):
            raise LayoutError(f"{layout.buffer_names[buffer]}: the engine casts {found[0][0]} to {found[0][1]}")
        nbytes[buffer] = nbytes[buffer] // here[rows[0]] * there[rows[0]]
    offset = pieces.offset // here * there
    stride = pieces.stride // here[:, None] * there[:, None]
    moved = Pieces(tensor, pieces.start, pieces.stop, pieces.buffer, offset, stride)
    return replace(layout, catalog=new, buffer_nbytes=nbytes, pieces=moved)
