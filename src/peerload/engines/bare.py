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
from ..job.load import Job, load
from ..job.rank import Member, Opening, Rank, kept_open
from ..memory.arena import Arena
from ..model.boxes import IntArray
from ..model.catalog import ModelKey
from ..model.layout import Layout
from ..model.offer import Offer
from ..receipt import Receipt
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

    def rank(
        self,
        model: ModelKey,
        member: Member,
        config: Config,
        coordinator: CoordinatorClient | None,
        opening: Opening = opened_transports,
    ) -> Rank:
        """Rank `layout.rank` of the instance of `member`."""
        member = replace(member, rank=self.layout.rank)
        return Rank(model, self.layout, self.address, self.arena, member, config, coordinator, opening=opening)


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
    the block ends; the transports of the load, which they share, are closed by then.

    `member` names the instance; its size is that of the whole instance, or 1 for ranks that load by themselves.
    on_bytes(rank, done, wanted). Raises what `load` raises, the cause before ranks that only heard of it."""
    given_up = Event()

    def fill(rank: Rank) -> Receipt:
        number = rank.layout.rank

        def report(_phase: str, done: int, wanted: int) -> None:
            if given_up.is_set():
                raise CommitError(f"rank {number} was stopped")
            on_bytes(number, done, wanted)

        return load(Job(rank, reserve, on_bytes=report))

    with ExitStack() as stack:
        bare = [BareRank.of(layout) for layout in layouts]
        for one in bare:
            stack.callback(one.arena.close)
        with opened_transports(config) as opened, ThreadPoolExecutor(len(bare), "peerload-rank") as pool:
            ranks = [one.rank(model, member, config, coordinator, kept_open(opened)) for one in bare]
            try:
                futures = [pool.submit(fill, rank) for rank in ranks]
                wait(futures)
            except BaseException:  # Ctrl-C: memory may go only when nobody writes to it
                given_up.set()
                raise
        errors = [error for f in futures if (error := f.exception()) is not None]
        if errors:
            raise min(errors, key=lambda e: isinstance(e, CommitError))
        yield [(one, f.result()) for one, f in zip(bare, futures, strict=True)]
