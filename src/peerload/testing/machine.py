"""Fake processes whose memory holds the numbers of `oracle.py`, and the doing of plans in them.

`carry_out` does what a plan says, `run_steps` what its lowering says; both check that each run stays inside one buffer
and count how often each byte is written. `load_exactly` is the whole judgement. No code is shared with `plan` or `lower`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import ITEMSIZE, Parallel
from peerload.model.layout import Layout
from peerload.model.offer import Binding, Offer, SourceId
from peerload.planning.batch import Batch
from peerload.planning.lower import Lowered, lower
from peerload.planning.plan import Plan, make_plan
from peerload.transport.base import Limits

from .layouts import Model, catalog, checkpoint, layouts
from .oracle import UNTOUCHED, ZERO, elements_at, grid, numbered, scattered, shards

#: Transports to lower for, each with its staging memory in bytes: every run an operation; staging; strided.
LOWERINGS = (
    (Limits(strided=False, operation_nbytes=0), 0),
    (Limits(strided=False, operation_nbytes=64, max_operations=5, max_batch_nbytes=512), 512),
    (Limits(strided=True, operation_nbytes=64, max_batch_nbytes=256), 0),
)


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
        order = order[self.nbytes[order] > 0]
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
            at = grid(int(self.address[c.buffer]) + c.offset, c.shape, c.strides)
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
        to = int(target.address[layout.pieces.buffer[piece]]) + elements_at(layout, piece, box)
        at = int(source.address[theirs.pieces.buffer[held]]) + elements_at(theirs, held, box)
        target.write(to, source.read(at, ITEMSIZE[mine.dtype]))


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
        at = grid(int(batch.src[i]), count, batch.src_step[i].tolist())
        yield at, grid(int(batch.dst[i]), count, batch.dst_step[i].tolist()), run


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


@cache
def numbers(model: Model) -> Mapping[str, IntArray]:
    return numbered(catalog(model), dict(model.aliases))


@cache
def running(model: Model, parallel: Parallel, name: str = "seed") -> Instance:
    """An instance whose buffers were filled by the meaning of the model, not by its pieces."""
    contents = [shards(model, numbers(model), parallel, rank) for rank in range(parallel.tp * parallel.pp)]
    return Instance.holding(layouts(model, parallel), contents, np.random.default_rng(len(name)), name)


@cache
def on_disk(model: Model, files: int = 2) -> Instance:
    """The checkpoint as a source: files instead of processes."""
    made = checkpoint(model, files)
    return Instance.holding([made], [scattered(made, numbers(model))], np.random.default_rng(files), "disk")


def load_exactly(
    wanted: Layout, expected: Mapping[str, IntArray], instances: Sequence[Instance], reserve: Sequence[Instance] = ()
) -> Plan:
    """Plan, lower and carry out one rank's load; AssertionError unless exactly the expected bytes arrive, each once.

    `expected`: per buffer, the number of every byte."""
    offers, last = ([o for one in some for o in one.offers] for some in (instances, reserve))
    plan = make_plan(wanted, offers, reserve=last, salt=str(wanted.rank))
    need = int(wanted.piece_nbytes[wanted.written].sum())
    _equal("bytes of the plan", plan.nbytes, need)
    sources = behind(plan, [*instances, *reserve])
    memory = fresh(wanted)
    carry_out(plan, sources, memory)
    _equal("the plan's outcome", memory.differences(wanted, expected), [])
    for limits, staging_nbytes in LOWERINGS:
        memory = fresh(wanted)
        lowered = lower(plan, limits, memory.address, staging_nbytes)
        run_steps(lowered, sources, memory)
        _equal(f"the outcome of lowering for {limits}", memory.differences(wanted, expected), [])
        _equal("useful bytes", lowered.nbytes, need)
        if staging_nbytes == 0:
            _equal("bytes on the wire", lowered.wire_nbytes, need)
        elif lowered.staging_nbytes > staging_nbytes or max((s.operations for s in lowered.steps), default=0) > 5:
            raise AssertionError(f"lowering overstepped {limits}")
    return plan


def fresh(layout: Layout) -> Memory:
    """A target rank before its load: its own constants are written, nothing else."""
    memory = Memory.allocate(layout, np.random.default_rng(layout.rank))
    memory.fill_constants(layout)
    return memory


def _equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{what}: found {found}, expected {expected}")
