"""Does this rank hold what the checkpoint on disk has? Asked before weights are offered under that checkpoint's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from typing import Final

import numpy as np
import torch

from ...config import Config
from ...errors import ConfigError
from ...integrity.digest import Columns, cut_boxes
from ...job.load import Job, load
from ...job.rank import Member, Rank, kept_open
from ...memory.placing import placed, regions_for
from ...memory.space import HOST, Space
from ...model.boxes import IntArray, volumes
from ...model.catalog import ModelKey
from ...model.layout import Layout, Pieces
from ...transport.files import FilesTransport
from ..checkpoint import Checkpoint

#: Boxes compared of each piece of a rank's layout, at most and of all its pieces together, and elements of one.
_SAMPLES: Final = 16
_ALL_SAMPLES: Final = 1 << 16
_SAMPLE: Final = 64
#: Bytes read from disk at once, and of the largest box when everything is compared.
_CHUNK_NBYTES: Final = 64 << 20
_BOX_NBYTES: Final = 1 << 20


def require_equal(
    layout: Layout, address: IntArray, space: Space, checkpoint: Checkpoint, *, every: bool = False, threads: int = 0
) -> None:
    """Compare the buffers of `layout`, at `address` in `space`, with the checkpoint: random boxes of every tensor, the same ones
    each time, or with `every` all bytes. Raises ConfigError, naming tensor and elements, for what differs, and what `load` raises
    if the checkpoint can't be read."""
    pieces = layout.pieces
    every_piece = np.arange(len(pieces))
    where = address[pieces.buffer] + pieces.offset
    columns = (every_piece, pieces.tensor, pieces.start, pieces.stop, where, pieces.stride)
    itemsize = layout.catalog.itemsize[pieces.tensor]
    boxes = cut_boxes(columns, itemsize, _BOX_NBYTES) if every else _sampled(layout, columns)
    with closing(FilesTransport(threads=threads)) as files:
        for held in _chunks(boxes, itemsize):
            stored, _memory = _read(layout, held, checkpoint, files)
            different = _differing(layout, (space, held), (HOST, stored), threads)
            if len(different):
                row = different[0]
                place = (space, _row(held, row)), (HOST, _row(stored, row))
                raise _refused(layout, *place, checkpoint, f"{len(different)} of {len(held[0])}", threads)


def _row(columns: Columns, row: int) -> Columns:
    owner, tensor, start, stop, address, stride = (c[row : row + 1] for c in columns)
    return owner, tensor, start, stop, address, stride


def _differing(layout: Layout, ours: tuple[Space, Columns], theirs: tuple[Space, Columns], threads: int) -> IntArray:
    """Rows of the boxes that don't hold the same bits in both places."""
    mine, stored = (space.digest(layout.catalog, *columns[1:], threads) for space, columns in (ours, theirs))
    return np.flatnonzero(mine != stored)


def _sampled(layout: Layout, columns: Columns) -> Columns:
    """Short runs of elements at random places of each piece."""
    seed = hashlib.blake2b(repr((layout.rank, layout.catalog.names)).encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(seed, "little"))
    times = min(_SAMPLES, max(1, _ALL_SAMPLES // max(1, len(columns[0]))))
    owner, tensor, begin, end, where, stride = (np.repeat(c, times, axis=0) for c in columns)
    extent = end - begin
    size = np.ones_like(extent)
    size[:, -1:] = np.minimum(extent[:, -1:], _SAMPLE)
    first = random.integers(0, extent - size + 1)
    return owner, tensor, begin + first, begin + first + size, where + (first * stride).sum(axis=1), stride


def _chunks(boxes: Columns, itemsize: IntArray) -> Iterator[Columns]:
    done = np.cumsum(volumes(boxes[2], boxes[3]) * itemsize[boxes[0]])
    last = int(done[-1]) if len(done) else 0
    edges = np.searchsorted(done, np.arange(1, last // _CHUNK_NBYTES + 1) * _CHUNK_NBYTES).tolist()
    for first, stop in zip([0, *edges], [*edges, len(done)], strict=True):
        if first < stop:
            yield tuple(c[first:stop] for c in boxes)  # type: ignore[misc]


def _read(layout: Layout, boxes: Columns, checkpoint: Checkpoint, files: FilesTransport) -> tuple[Columns, torch.Tensor]:
    """The same boxes out of the checkpoint, and the memory that holds them."""
    owner, tensor, start, stop, _, _ = boxes
    extent, itemsize = stop - start, layout.catalog.itemsize[tensor]
    stride = np.cumprod(np.concatenate([itemsize[:, None], extent[:, :0:-1]], axis=1), axis=1)[:, ::-1]
    room = -(-volumes(start, stop) * itemsize // 8) * 8
    offset = np.cumsum(room) - room
    memory = torch.empty(int(room.sum()), dtype=torch.uint8)
    address = np.array([memory.data_ptr()], np.int64)
    pieces = Pieces(tensor, start, stop, np.zeros(len(tensor), np.int64), offset, stride)
    wanted = Layout(layout.catalog, ("",), np.array([memory.nbytes]), pieces)
    regions, config = regions_for([placed(memory)], "per-tensor"), Config(verify="off")
    opening = kept_open({files.name: files})
    rank = Rank(ModelKey("checkpoint"), wanted, address, regions, Member("comparison"), config, opening=opening)
    load(Job(rank, [checkpoint.offer()]))
    return (owner, tensor, start, stop, address[0] + offset, stride), memory


def _refused(
    layout: Layout, ours: tuple[Space, Columns], theirs: tuple[Space, Columns], checkpoint: Checkpoint, places: str, threads: int
) -> ConfigError:
    """Of one box that differs: says which of its elements do."""
    spec = layout.tensor_of(int(ours[1][0][0]))
    item = layout.catalog.itemsize[ours[1][1]]
    (space, mine), (host, stored) = (
        (space, cut_boxes((np.zeros(1, np.int64), *columns[1:]), item, int(item[0]))) for space, columns in (ours, theirs)
    )
    different = _differing(layout, (space, mine), (host, stored), threads)
    low, high = mine[2][different].min(axis=0), mine[3][different].max(axis=0)
    width = len(spec.shape)
    where = ", ".join(f"{a}:{b}" for a, b in zip(low[-width:].tolist(), high[-width:].tolist(), strict=True)) if width else ""
    return ConfigError(
        f"{spec.name}[{where}] on rank {layout.rank} isn't what the checkpoint {checkpoint.directory} has ({len(different)} of"
        f" {len(mine[0])} elements here; {places} places compared differ)",
        next_step="weights that were trained or cast need a name of their own: set `revision` in the configuration",
    )
