"""A slow and dumb judge of plans: what every byte of every buffer must be.

Every byte of every logical tensor gets its own number (arange over the whole model), so a byte that lands in a wrong
place is seen, whatever its dtype. `shards` cuts the tensors by the *meaning* of a model's splits, index by index;
`scattered` by a layout's boxes. Nothing here shares code with the planner or with the placing of layouts. Meant for
models of some ten thousand bytes; `machine.py` has the memory that such numbers live in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import ITEMSIZE, Catalog, Parallel
from peerload.model.layout import Layout

from .layouts import Blocks, Chunked, FirstRank, Heads, Model, Padded, Param, Part, Replicated, Split

#: What a cell holds before anybody wrote to it, and when a loader filled it with zero.
UNTOUCHED, ZERO = -1, -2


def numbered(catalog: Catalog, aliases: Mapping[str, str] | None = None) -> dict[str, IntArray]:
    """Per logical tensor, the numbers of its bytes: shape [*tensor, itemsize]. Tied tensors have the same numbers."""
    tensors: dict[str, IntArray] = {}
    first = 0
    for spec in catalog:
        shape = (*spec.shape, ITEMSIZE[spec.dtype])
        size = int(np.prod(shape))
        tensors[spec.name] = np.arange(first, first + size).reshape(shape)
        first += size
    for name, other in (aliases or {}).items():
        tensors[name] = tensors[other]
    return tensors


def _dealt(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """torch.chunk, padded with empty chunks."""
    each = -(-len(items) // size)
    return [items[i * each : (i + 1) * each] for i in range(size)]


def _held(split: Split, extent: int, rank: int, size: int) -> list[int | None]:
    """The indices a rank keeps along the split's axis; None is a zero."""
    indices = list(range(extent))
    match split:
        case Replicated():
            return [*indices]
        case Chunked():
            units = [indices[i : i + split.unit] for i in range(0, extent, split.unit)]
            return [i for u in _dealt(range(len(units)), size)[rank] for i in units[u]]
        case Heads():
            per = extent // split.heads
            if size <= split.heads:
                mine = list(_dealt(range(split.heads), size)[rank])
            else:  # every head laid out `size` times, a run of `heads` for each rank: its first one counts
                mine = [[h for h in range(split.heads) for _ in range(size)][rank * split.heads]]
            return [i for h in mine for i in indices[h * per : (h + 1) * per]]
        case Blocks():
            rows = _held(split.weight, split.weight_extent, rank, size)
            touched = {row // split.block for row in rows if row is not None}
            return [*sorted(touched)]
        case Padded():
            padded: list[int | None] = list(indices)
            while len(padded) % (split.multiple * size):
                padded.append(None)
            each = len(padded) // size
            return padded[rank * each : (rank + 1) * each]
        case FirstRank():
            return [*indices] if rank == 0 else [None] * extent
    raise TypeError(f"no meaning is written down for {split}")


def _part(part: Part, tensor: IntArray, rank: int, size: int) -> IntArray:
    """The rank's share of one tensor (of one expert), the bytes of elements last."""
    if not part.shape:
        return tensor.reshape(1, -1)
    axis = part.split.axis
    region = range(*part.region) if part.region else range(part.shape[axis])
    lanes = []
    for i in _held(part.split, len(region), rank, size):
        lane = tensor.take([0 if i is None else region[i]], axis=axis)
        lanes.append(np.full_like(lane, ZERO) if i is None else lane)
    return np.concatenate(lanes, axis=axis) if lanes else tensor.take([], axis=axis)


def _param(param: Param, prefix: str, tensors: Mapping[str, IntArray], parallel: Parallel, rank: int) -> dict[str, IntArray]:
    def one(expert: int, rank: int, size: int) -> IntArray:
        lanes = []
        for part in param.parts:
            tensor = tensors[prefix + part.tensor.format(e=expert)]
            if param.experts and "{e}" not in part.tensor:
                tensor = tensor[expert]
            lane = _part(part, tensor, rank, size)
            if lane.shape[0]:
                lanes.append(lane)
        whole = np.concatenate(lanes) if lanes else np.zeros(0, np.int64)
        return np.swapaxes(whole, 0, 1) if param.transposed and whole.ndim == 3 else whole

    if not param.experts:
        return {prefix + param.name: one(0, rank, parallel.tp).ravel()}
    groups = _dealt(range(parallel.tp), parallel.ep)  # which ranks share experts
    mine = next(i for i, ranks in enumerate(groups) if rank in ranks)
    size, my_rank = len(groups[mine]), groups[mine].index(rank)
    held = {e: one(e, my_rank, size).ravel() for e in _dealt(range(param.experts), parallel.ep)[mine]}
    if "{e}" in param.name:
        return {prefix + param.name.format(e=e): numbers for e, numbers in held.items()}
    return {prefix + param.name: np.concatenate([np.zeros(0, np.int64), *held.values()])}


def shards(model: Model, tensors: Mapping[str, IntArray], parallel: Parallel, rank: int) -> dict[str, IntArray]:
    """What each buffer of a rank must contain, byte by byte, by the meaning of the model's splits."""
    stage, tp_rank = divmod(rank, parallel.tp)
    names = [(stack, name) for stack in model.layers for name in stack.names()]
    here = np.array_split(np.arange(len(names)), parallel.pp)[stage]
    params: list[tuple[Param, str]] = [(p, "") for p in model.before] if stage == 0 else []
    params += [(p, names[i][1]) for i in here for p in names[i][0].params]
    if stage == parallel.pp - 1:
        params += [(p, "") for p in model.after + (model.tied if parallel.pp > 1 else ())]
    buffers: dict[str, IntArray] = {}
    for param, prefix in params:
        buffers.update(_param(param, prefix, tensors, parallel, tp_rank))
    return {name: numbers for name, numbers in buffers.items() if len(numbers)}


def grid(first: int, counts: Sequence[int], steps: Sequence[int]) -> IntArray:
    """Addresses of all indices below `counts`, last index fastest."""
    at = np.array([first])
    for count, step in zip(counts, steps, strict=True):
        at = (at[:, None] + np.arange(count) * step).ravel()
    return at


def elements_at(layout: Layout, piece: int, box: Box) -> IntArray:
    """Byte offsets, inside the piece's buffer, of the elements of a box."""
    held, p = layout.box_of(piece), layout.pieces
    strides = p.stride[piece, p.stride.shape[1] - len(held.start) :].tolist()
    first = int(p.offset[piece]) + sum((a - b) * s for a, b, s in zip(box.start, held.start, strides, strict=True))
    return grid(first, box.shape, strides)


def scattered(layout: Layout, tensors: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """What each buffer of a layout must contain by its own boxes and constants; the rest stays untouched."""
    buffers = [np.full(n, UNTOUCHED) for n in layout.buffer_nbytes.tolist()]
    for i, buffer in enumerate(layout.pieces.buffer.tolist()):
        spec, box = layout.tensor_of(i), layout.box_of(i)
        elements = tensors[spec.name][box.slices()].reshape(box.volume, -1)
        buffers[buffer][elements_at(layout, i, box)[:, None] + np.arange(elements.shape[1])] = elements
    for c in layout.constants:
        buffers[c.buffer][grid(c.offset, c.shape, c.strides)[:, None] + np.arange(len(c.fill))] = [ZERO - b for b in c.fill]
    return dict(zip(layout.buffer_names, buffers, strict=True))
