"""Tied parameters: one buffer, known under each of its names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ...model.catalog import Catalog
from ...model.layout import Layout, Pieces


def with_aliases(layout: Layout, groups: Iterable[Sequence[str]]) -> Layout:
    """groups: the names of each buffer. Where one of several is the only checkpoint tensor in it, the others mean that tensor:
    they are added to the catalog if it lacks them, and get the same pieces."""
    aliases: dict[str, str] = {}
    for buffer, names in enumerate(groups):
        stored = set(layout.pieces.tensor[layout.pieces.buffer == buffer].tolist()) if len(names) > 1 else set()
        if len(stored) == 1 and (name := layout.catalog.names[stored.pop()]) in names:
            aliases.update((other, name) for other in names if other != name)
    if not aliases:
        return layout
    row, pieces = layout.catalog.row, layout.pieces
    extra = [layout.catalog[row[name]]._replace(name=alias) for alias, name in aliases.items() if alias not in row]
    catalog = Catalog.of([*layout.catalog, *extra])
    tensor, source = [pieces.tensor], [np.arange(len(pieces))]
    for alias, name in aliases.items():
        same = np.flatnonzero(pieces.tensor == row[name])
        tensor.append(np.full(len(same), catalog.row[alias]))
        source.append(same)
    at = np.concatenate(source)
    return replace(
        layout,
        catalog=catalog,
        pieces=Pieces(
            np.concatenate(tensor), pieces.start[at], pieces.stop[at], pieces.buffer[at], pieces.offset[at], pieces.stride[at]
        ),
        aliases=aliases,
    )
