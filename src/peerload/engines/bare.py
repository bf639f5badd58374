"""Ranks without an engine: buffers in an arena of their own. What `peerload seed` serves and `peerload pull` fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import Self

import numpy as np

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..errors import CommitError
from ..job.load import Job, Member, load
from ..memory.arena import Arena
from ..memory.placing import regions_within
from ..memory.region import Region
from ..model.boxes import IntArray
from ..model.catalog import ModelKey
from ..model.layout import Layout
from ..model.offer import Offer
from ..receipt import Receipt
from ..transport.files import FilesTransport
from ..transport.local import LocalTransport
from ..transport.registry import opened_transports


@dataclass(frozen=True, slots=True, eq=False)
class BareRank:
    """Untouched memory for every buffer of `layout`, at `address` [buffers]. Owns `arena`."""

    layout: Layout
    address: IntArray
    arena: Arena

    @classmethod
    def of(cls, layout: Layout) -> Self:
        sizes = layout.buffer_nbytes.tolist()
        arena = Arena(Arena.room(sizes))
        return cls(layout, np.array([arena.place(n) for n in sizes], np.int64), arena)

    def regions(self, registration: str) -> list[Region]:
        return regions_within(self.arena.region(), self.address, self.layout.buffer_nbytes, registration)


@contextmanager
def bare_ranks(
    layouts: Sequence[Layout],
    model: ModelKey,
    member: Member,
    config: Config,
    coordinator: CoordinatorClient,
    *,
    reserve: Sequence[Offer] = (),
    on_bytes: Callable[[int, int, int], None] = lambda *_: None,
) -> Iterator[list[tuple[BareRank, Receipt]]]:
    """Load every rank in this process, each on a thread of its own; yields ranks with receipts. Their memory is freed when
    the block ends; the transports of the load are closed by then.

    `member` names the instance; its size is that of the whole instance, or 1 for ranks that load by themselves.
    on_bytes(rank, done, wanted). Raises what `load` raises, the cause before ranks that only heard of it."""
    with ExitStack() as stack:
        ranks = []
        for layout in layouts:
            ranks.append(BareRank.of(layout))
            stack.callback(ranks[-1].arena.close)
        loading = ExitStack()
        opened = stack.enter_context(loading).enter_context(opened_transports(config))
        # With one rank there is nobody else who might start a transport that pins memory while pages are being replaced.
        alone = len(layouts) == 1 or all(isinstance(t, LocalTransport | FilesTransport) for t in opened.values())
        given_up = Event()

        def fill(rank: BareRank) -> Receipt:
            number = rank.layout.rank

            def report(_phase: str, done: int, wanted: int) -> None:
                if given_up.is_set():
                    raise CommitError(f"rank {number} was stopped")
                on_bytes(number, done, wanted)

            job = Job(
                model,
                rank.layout,
                rank.address,
                rank.regions(config.registration),
                replace(member, rank=number),
                opened,
                config,
                coordinator=coordinator,
                arena=rank.arena if alone else None,
                reserve=reserve,
                on_bytes=report,
            )
            return load(job)

        with ThreadPoolExecutor(len(ranks), "peerload-rank") as pool:
            try:
                futures = [pool.submit(fill, rank) for rank in ranks]
                wait(futures)
            except BaseException:  # Ctrl-C: memory may go only when nobody writes to it
                given_up.set()
                raise
        errors = [error for f in futures if (error := f.exception()) is not None]
        if errors:
            raise min(errors, key=lambda e: isinstance(e, CommitError))
        loading.close()  # nothing of a seed stays open or mapped
        yield [(rank, f.result()) for rank, f in zip(ranks, futures, strict=True)]
