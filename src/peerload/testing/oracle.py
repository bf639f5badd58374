"""A slow and dumb judge of plans: memory in which every byte carries the number of the model's byte that lies there.

Every byte of every logical tensor gets its own number (arange over the whole model), so a byte that lands in a wrong
place is seen, whatever its dtype. `shards` cuts the tensors by the *meaning* of a model's splits, index by index;
`scattered` by a layout's boxes; `carry_out` and `run_steps` do what a plan or its lowering says,
and check that each run stays inside one buffer and no byte is written twice. Nothing here shares code with `plan` or `lower`,
nor with the placing of layouts. Meant for models of some ten thousand bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peerload.batch import Batch
from peerload.geometry import Box, IntArray
from peerload.lower import Lowered
from peerload.manifest import ITEMSIZE, Binding, Catalog, Layout, Offer, Parallel, SourceId
from peerload.plan import Plan

from .layouts import Blocks, Cut, FirstRank, Heads, Model, Padded, Param, Part, Split, Whole

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
        case Whole():
            return [*indices]
        case Cut():
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


def _grid(first: int, counts: Sequence[int], steps: Sequence[int]) -> IntArray:
    """Addresses of all indices below `counts`, last index fastest."""
    at = np.array([first])
    for count, step in zip(counts, steps, strict=True):
        at = (at[:, None] + np.arange(count) * step).ravel()
    return at


def _elements(layout: Layout, piece: int, box: Box) -> IntArray:
    """Byte offsets, inside the piece's buffer, of the elements of a box."""
    held, p = layout.box_of(piece), layout.pieces
    strides = p.stride[piece, p.stride.shape[1] - len(held.start) :].tolist()
    first = int(p.offset[piece]) + sum((a - b) * s for a, b, s in zip(box.start, held.start, strides, strict=True))
    return _grid(first, box.shape, strides)


def scattered(layout: Layout, tensors: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """What each buffer of a layout must contain by its own boxes, constants and opaques; the rest stays untouched.

    An opaque region holds numbers made from its name and tag, so that equal tags mean equal bytes."""
    buffers = [np.full(n, UNTOUCHED) for n in layout.buffer_nbytes.tolist()]
    for i, buffer in enumerate(layout.pieces.buffer.tolist()):
        spec, box = layout.tensor_of(i), layout.box_of(i)
        elements = tensors[spec.name][box.slices()].reshape(box.volume, -1)
        buffers[buffer][_elements(layout, i, box)[:, None] + np.arange(elements.shape[1])] = elements
    for c in layout.constants:
        buffers[c.buffer][_grid(c.offset, c.shape, c.strides)[:, None] + np.arange(len(c.fill))] = [ZERO - b for b in c.fill]
    for o in layout.opaques:
        first = -(1 << 40) - sum((i + 1) * 4096 * byte for i, byte in enumerate(f"{o.name} {o.tag}".encode()))
        buffers[o.buffer][o.offset : o.offset + o.nbytes] = first - np.arange(o.nbytes)
    return dict(zip(layout.buffer_names, buffers, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """One process: its buffers somewhere in an address space of numbered cells, and how often each cell was written."""

    base: int
    address: IntArray
    nbytes: IntArray
    cells: IntArray
    writes: IntArray

    @classmethod
    def allocate(cls, layout: Layout, rng: np.random.Generator) -> Memory:
        """Buffers in random order with random gaps, some of none, all untouched."""
        count = len(layout.buffer_names)
        order, gaps = rng.permutation(count), rng.choice([0, 1, 7, 16], count)
        address = np.zeros(count, np.int64)
        base = at = int(rng.integers(1 << 20, 1 << 46))
        for i, gap in zip(order.tolist(), gaps.tolist(), strict=True):
            address[i] = at + gap
            at += gap + int(layout.buffer_nbytes[i])
        return cls(base, address, layout.buffer_nbytes, np.full(at - base, UNTOUCHED), np.zeros(at - base, np.int64))

    @classmethod
    def holding(cls, layout: Layout, content: Mapping[str, IntArray], rng: np.random.Generator) -> Memory:
        memory = cls.allocate(layout, rng)
        for i, name in enumerate(layout.buffer_names):
            memory.buffer(i)[:] = content[name]
        return memory

    def buffer(self, i: int) -> IntArray:
        at = int(self.address[i]) - self.base
        return self.cells[at : at + int(self.nbytes[i])]

    def _cells(self, starts: IntArray, nbytes: int) -> IntArray:
        """Cell numbers of runs; AssertionError if one of them is not inside a single buffer."""
        order = np.argsort(self.address, kind="stable")
        at = np.searchsorted(self.address[order], starts, "right") - 1
        good = (at >= 0) & (starts + nbytes <= (self.address + self.nbytes)[order][at])
        if not good.all():
            raise AssertionError(f"a run of {nbytes} bytes leaves its buffer at {int(starts[np.argmin(good)]) - self.base}")
        cells: IntArray = starts[:, None] - self.base + np.arange(nbytes)
        return cells

    def read(self, starts: IntArray, nbytes: int) -> IntArray:
        """The numbers of runs of `nbytes` that begin at absolute addresses `starts`: [n, nbytes]."""
        return self.cells[self._cells(starts, nbytes)]

    def write(self, starts: IntArray, numbers: IntArray) -> None:
        """Runs `numbers[n, nbytes]` to absolute addresses `starts[n]`."""
        cells = self._cells(starts, numbers.shape[1])
        self.cells[cells] = numbers
        np.add.at(self.writes, cells, 1)

    def fill_constants(self, layout: Layout) -> None:
        """What the target's own loader does."""
        for c in layout.constants:
            at = _grid(int(self.address[c.buffer]) + c.offset, c.shape, c.strides)
            self.write(at, np.tile([ZERO - byte for byte in c.fill], (len(at), 1)))

    def differences(self, layout: Layout, expected: Mapping[str, IntArray]) -> list[str]:
        """Buffers whose content is not the expected one, with the first wrong byte; and bytes written more than once."""
        found = []
        if set(layout.buffer_names) != set(expected):
            found.append(f"buffers differ: {sorted(set(layout.buffer_names) ^ set(expected))}")
        for i, name in enumerate(layout.buffer_names):
            mine, wanted = self.buffer(i), expected.get(name)
            if wanted is None or mine.shape != wanted.shape:
                found.append(f"{name}: {mine.size} bytes, expected {None if wanted is None else wanted.size}")
            elif (mine != wanted).any():
                at = int(np.argmax(mine != wanted))
                found.append(f"{name}: byte {at} is {mine[at]}, expected {wanted[at]}")
        if (self.writes > 1).any():
            found.append(f"{int((self.writes > 1).sum())} bytes were written more than once")
        return found


def carry_out(plan: Plan, sources: Sequence[Memory], target: Memory) -> None:
    """Do a plan's copies element by element, straight from its boxes. `sources[i]` is the memory behind offer i."""
    layout = plan.wants.layout
    for i, (want, offer, held) in enumerate(zip(plan.want.tolist(), plan.offer.tolist(), plan.piece.tolist(), strict=True)):
        piece, theirs, source = int(plan.wants.piece[want]), plan.offers[offer].layout, sources[offer]
        mine, other = layout.tensor_of(piece), theirs.tensor_of(held)
        if (mine.dtype, mine.shape) != (other.dtype, other.shape):
            raise AssertionError(f"copy {i} reads {other} into {mine}")
        cut = plan.start.shape[1] - len(mine.shape)
        box = Box(tuple(plan.start[i, cut:].tolist()), tuple(plan.stop[i, cut:].tolist()))
        to = int(target.address[layout.pieces.buffer[piece]]) + _elements(layout, piece, box)
        at = int(source.address[theirs.pieces.buffer[held]]) + _elements(theirs, held, box)
        target.write(to, source.read(at, ITEMSIZE[mine.dtype]))
    for row, offer, held in plan.opaque:
        wanted, given = layout.opaques[row], plan.offers[offer].layout.opaques[held]
        numbers = sources[offer].read(sources[offer].address[[given.buffer]] + given.offset, given.nbytes)
        target.write(target.address[[wanted.buffer]] + wanted.offset, numbers)


def run_steps(lowered: Lowered, sources: Sequence[Memory], target: Memory) -> None:
    """Do what a transport and a target would: every run of every step, and the cutting to size of staged ones."""
    for step in lowered.steps:
        source = sources[step.offer]
        if step.scatter is None:
            for at, to, nbytes in _runs(step.wire):
                target.write(to, source.read(at, nbytes))
            continue
        size = step.staging_nbytes
        staging = Memory(0, np.zeros(1, np.int64), np.array([size]), np.full(size, UNTOUCHED), np.zeros(size, np.int64))
        for at, to, nbytes in _runs(step.wire):
            staging.write(to, source.read(at, nbytes))
        for at, to, nbytes in _runs(step.scatter):
            target.write(to, staging.read(at, nbytes))


def _runs(batch: Batch) -> Iterator[tuple[IntArray, IntArray, int]]:
    """Per copy, the addresses of its runs on both sides and their length."""
    for i, run in enumerate(batch.run.tolist()):
        count = batch.count[i].tolist()
        at = _grid(int(batch.src[i]), count, batch.src_step[i].tolist())
        yield at, _grid(int(batch.dst[i]), count, batch.dst_step[i].tolist()), run


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """Running processes of one instance: offers and their memories, by rank."""

    offers: tuple[Offer, ...]
    memories: tuple[Memory, ...]

    @classmethod
    def holding(
        cls, layouts: Sequence[Layout], contents: Sequence[Mapping[str, IntArray]], rng: np.random.Generator, name: str = "seed"
    ) -> Instance:
        memories = tuple(Memory.holding(x, c, rng) for x, c in zip(layouts, contents, strict=True))
        offers = tuple(
            Offer(x, Binding(SourceId(name, x.rank, "1"), m.address, ())) for x, m in zip(layouts, memories, strict=True)
        )
        return cls(offers, memories)


def behind(plan: Plan, instances: Sequence[Instance]) -> list[Memory]:
    """The memories behind a plan's offers."""
    memory = {o.source: m for one in instances for o, m in zip(one.offers, one.memories, strict=True)}
    return [memory[o.source] for o in plan.offers]
