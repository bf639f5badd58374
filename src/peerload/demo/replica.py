"""One rank of a transformers instance that needs no mode: it finds peers or loads from disk, then is a seed itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..engines.checkpoint import Checkpoint
from ..engines.transformers.open import OpenModel, open_model
from ..job.load import Job, load
from ..job.rank import Member, Rank, wrapped
from ..job.seed import Seed
from ..model.catalog import Parallel
from ..receipt import Receipt
from ..transport.base import Transport


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """A model that serves. engine_s: seconds its engine took to build it, without weights."""

    opened: OpenModel
    receipt: Receipt
    engine_s: float
    seed: Seed | None


@contextmanager
def replica(
    directory: str,
    parallel: Parallel,
    member: Member,
    config: Config,
    *,
    attributes: Mapping[str, str] | None = None,
    on_opened: Callable[[], None] = lambda: None,
    on_bytes: Callable[[str, int, int], None] = lambda *_: None,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
) -> Iterator[Replica]:
    """This rank's model with its weights in place, offered to others (unless `source` is off) until the block ends.

    Needs the process group of `parallel`. on_opened is called when the engine has built its model and no weight has
    moved yet; on_bytes as in `Job`; wrap may put something between us and each transport. Raises what `open_model` and
    `load` raise."""
    begun_s = time.perf_counter()
    checkpoint = Checkpoint.open(directory)
    opened = open_model(directory, checkpoint.catalog, parallel, rank=member.rank)
    assert opened.arena is not None, "open_model was asked for an arena"
    arena = opened.arena
    engine_s = time.perf_counter() - begun_s

    with ExitStack() as stack:
        stack.callback(arena.close)
        on_opened()
        client = stack.enter_context(CoordinatorClient(config.url))
        model = checkpoint.key(config.model_name, config.revision)
        rank = Rank(model, opened.layout, opened.address, arena, member, config, client)
        receipt = load(Job(replace(rank, opening=wrapped(wrap)), [checkpoint.offer()], on_bytes=on_bytes))
        opened.accept()
        seed = None
        if config.source:
            seed = stack.enter_context(Seed(rank, files=opened.files.contents, attributes=attributes, proven=receipt.digests))
        yield Replica(opened, receipt, engine_s, seed)
