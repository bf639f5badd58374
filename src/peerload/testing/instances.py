"""Instances that hold synthetic models, in real processes: seeds to read from, to kill and to change, targets that load.

    with SeedProcess(Life(url=url, model=model, parallel=Parallel(tp=2), instance="seed")) as seed:
        results = load_ranks(Life(url=url, model=model, parallel=Parallel(tp=4), instance="target"))
        seed.kill()

What every byte must be is known from `oracle.py`, which shares no code with the planner.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..engines.bare import BareRank
from ..job.load import Job, load
from ..job.rank import Member, Rank, kept_open, wrapped
from ..job.seed import Seed
from ..memory.arena import Arena
from ..memory.placing import Placed, regions_for
from ..memory.region import Region
from ..model.boxes import IntArray
from ..model.catalog import ModelKey, Parallel
from ..model.layout import Layout
from ..model.offer import Binding, Endpoint, Offer, SourceId
from ..receipt import Receipt
from ..transport.base import Transport
from ..transport.files import FileSet
from ..transport.registry import opened_transports
from .layouts import Model, catalog, checkpoint, layout
from .oracle import numbered, scattered, shards
from .processes import Child, orders, wait_for_end

Bytes = npt.NDArray[np.uint8]

SINGLE: Final = Parallel()
CONFIG: Final = Config(transport="local", fallback="fail", deadline_s=30.0, threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One life of an instance, or of some ranks of it. `ranks`: those in this process (default: all). `name`: of the model
    at the coordinator.

    memory: where a seed's buffers lie: "arena" (one memfd), "plain" (one private block) or "blocks" (a private block for
    each buffer). version: which weights; equal versions are equal bytes. launch: as in `Member`."""

    url: str
    model: Model
    parallel: Parallel = SINGLE
    instance: str
    name: str = "synthetic"
    ranks: tuple[int, ...] = ()
    config: Config = CONFIG
    memory: str = "arena"
    version: int = 0
    ttl_s: float = 30.0
    digests: bool = True
    launch: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.name, self.model.name)

    @property
    def size(self) -> int:
        return self.parallel.tp * self.parallel.pp

    @property
    def here(self) -> Sequence[int]:
        return self.ranks or range(self.size)


@lru_cache(maxsize=4)
def _numbers(model: Model) -> Mapping[str, IntArray]:
    return numbered(catalog(model), dict(model.aliases))


def _bytes(numbers: IntArray, version: int) -> Bytes:
    """The value of each numbered byte; what is not of a tensor is zero."""
    mixed = (numbers + 1 + version * 7919) * np.int64(0x9E3779B1)
    return np.where(numbers < 0, 0, (mixed >> 17) & 0xFF).astype(np.uint8)


@lru_cache(maxsize=16)
def content(model: Model, parallel: Parallel, rank: int, version: int = 0) -> Mapping[str, Bytes]:
    """What each buffer of a rank must hold."""
    return {name: _bytes(n, version) for name, n in shards(model, _numbers(model), parallel, rank).items()}


def on_disk(model: Model, directory: Path, version: int = 0, files: int = 2) -> Offer:
    """The model's tensors written to files, as an offer of last resort."""
    made = checkpoint(model, files)
    paths = []
    for name, numbers in scattered(made, _numbers(model)).items():
        paths.append(directory / name)
        paths[-1].write_bytes(_bytes(numbers, version).tobytes())
    described = FileSet.of(paths)
    source = SourceId(str(directory), 0, "disk")
    return Offer(made, Binding(source, np.array(described.base), (Endpoint("files", described.encode()),)))


@dataclass(slots=True)
class Result:
    """How one rank's load ended. `wrong`: buffers that don't hold what they must."""

    rank: int
    receipt: Receipt | None
    error: BaseException | None
    wrong: list[str]
    seconds: float


def load_ranks(
    life: Life,
    *,
    wrap: Callable[[int, Transport], Transport] = lambda _, transport: transport,
    reserve: Sequence[Offer] = (),
    on_bytes: Callable[[int, int, int], None] = lambda *_: None,
    size: int = 0,
) -> list[Result]:
    """Load the ranks of `life` that are here, each on a thread with a client and transports of its own, as if it were a
    process. wrap(rank, transport) may put something in between. size: of the group that commits (default: all ranks)."""

    def one(rank: int) -> Result:
        begun_s = time.perf_counter()
        bare = BareRank.of(layout(life.model, life.parallel, rank))
        with ExitStack() as stack:
            stack.callback(bare.arena.close)
            client = stack.enter_context(CoordinatorClient(life.url, timeout_s=3.0))
            member = Member(life.instance, rank, size or life.size, life.launch)
            here = bare.rank(life.key, member, life.config, client, wrapped(lambda transport: wrap(rank, transport)))
            job = Job(here, reserve, on_bytes=lambda _, done, wanted: on_bytes(rank, done, wanted))
            receipt, error = None, None
            try:
                receipt = load(job)
            except BaseException as raised:  # the caller judges
                error = raised
            return Result(rank, receipt, error, differences(life, bare), time.perf_counter() - begun_s)

    with ThreadPoolExecutor(len(life.here)) as pool:
        return list(pool.map(one, life.here))


def differences(life: Life, bare: BareRank) -> list[str]:
    """Buffers of a rank that don't hold what they must, each with its first wrong byte."""
    found = []
    must = content(life.model, life.parallel, bare.layout.rank, life.version)
    for name, address, nbytes in zip(
        bare.layout.buffer_names, bare.address.tolist(), bare.layout.buffer_nbytes.tolist(), strict=True
    ):
        if nbytes == 0:
            continue
        held = np.frombuffer(bare.arena.view(address, nbytes), np.uint8)
        if (held != must[name]).any():
            at = int(np.argmax(held != must[name]))
            found.append(f"{name}: byte {at} is {held[at]}, must be {must[name][at]}")
    return found


class SeedProcess(Child):
    """The ranks of a `Life` offered by one process, from entering the block until it is left, killed or told otherwise.

    It can be asked to "change": other weights, announced properly; "begin change": never finished; "flip": a bit of the first
    byte of every buffer, told to nobody; "leave": withdraw and stay alive."""

    def __init__(self, life: Life) -> None:
        super().__init__(f"{__name__}:_serve", life, name=f"the seeds of {life.instance}")

    def __enter__(self) -> Self:
        self.begun()
        return self


def _serve(life: Life, link: Connection) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(CoordinatorClient(life.url, timeout_s=3.0))
        opening = kept_open(stack.enter_context(opened_transports(life.config)))
        config = life.config if life.digests else life.config.replace(verify="off")
        seeds: list[tuple[Seed, list[Bytes]]] = []
        leaving = stack.enter_context(ExitStack())
        for rank in life.here:
            made = layout(life.model, life.parallel, rank)
            address, placed, views, arena = _placed(made, life.memory, stack)
            _write(life, made, views, life.version)
            memory = arena or regions_for(placed, life.config.registration)
            member = Member(life.instance, rank, life.size, life.launch)
            seed = Seed(Rank(life.key, made, address, memory, member, config, client, opening=opening), ttl_s=life.ttl_s)
            seeds.append((leaving.enter_context(seed), views))
        link.send("ready")
        version = life.version
        for order in orders(link):
            if order == "flip":
                for _, views in seeds:
                    for view in views:
                        view[:1] ^= 1
            elif order == "leave":
                leaving.close()
            elif order == "begin change":
                for seed, views in seeds:
                    leaving.enter_context(seed.changing())
                    _write(life, seed.offer.layout, views, version + 1)
            elif order == "change":
                version += 1
                for seed, views in seeds:
                    with seed.changing():
                        _write(life, seed.offer.layout, views, version)
            link.send("done")


def _placed(made: Layout, memory: str, stack: ExitStack) -> tuple[IntArray, list[Placed], list[Bytes], Arena | None]:
    """Memory for each buffer: addresses, what to register, the bytes themselves (which keep it alive), and their arena."""
    sizes = made.buffer_nbytes.tolist()
    if memory == "arena":
        bare = BareRank.of(made)
        stack.callback(bare.arena.close)
        views = [np.frombuffer(bare.arena.view(a, n), np.uint8) for a, n in zip(bare.address.tolist(), sizes, strict=True)]
        placed = [Placed(a, n, bare.arena.region()) for a, n in zip(bare.address.tolist(), sizes, strict=True)]
        return bare.address, placed, views, bare.arena
    if memory == "plain":
        block = np.zeros(sum(sizes), np.uint8)
        views = np.split(block, np.cumsum(sizes)[:-1])
        blocks = [Region(block.ctypes.data, block.size)] * len(sizes)
    else:
        views = [np.zeros(n, np.uint8) for n in sizes]
        blocks = [Region(v.ctypes.data, v.size) for v in views]
    address = [v.ctypes.data for v in views]
    return np.array(address), [Placed(a, n, b) for a, n, b in zip(address, sizes, blocks, strict=True)], list(views), None


def _write(life: Life, made: Layout, views: Sequence[Bytes], version: int) -> None:
    must = content(life.model, life.parallel, made.rank, version)
    for name, view in zip(made.buffer_names, views, strict=True):
        if view.size:
            view[:] = must[name]


class TargetProcess(Child):
    """Loads the ranks of a `Life` in a process of its own. Says "begun" at the first byte, and then waits to be killed when
    `stall`; else says its results: (rank, receipt as a dictionary or None, error's type and text or None, wrong buffers)."""

    def __init__(self, life: Life, *, stall: bool = False, size: int = 0) -> None:
        super().__init__(f"{__name__}:_load", life, stall, size, name=f"the target {life.instance}")


def _load(life: Life, stall: bool, size: int, link: Connection) -> None:
    begun = False

    def on_bytes(_rank: int, _done: int, _wanted: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            link.send("begun")
        if stall:
            time.sleep(60)

    results = load_ranks(life, on_bytes=on_bytes, size=size)
    link.send(
        [
            (r.rank, r.receipt and r.receipt.to_dict(), r.error and (type(r.error).__name__, str(r.error)), r.wrong)
            for r in results
        ]
    )
    wait_for_end(link)
