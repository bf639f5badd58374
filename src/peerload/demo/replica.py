"""One rank of a transformers instance that needs no mode: it finds peers or loads from disk, then is a seed itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..engines.checkpoint import Checkpoint
from ..engines.transformers.open import OpenModel, open_model
from ..job.load import Job, Member, load
from ..job.seed import Seed
from ..memory.placing import regions_within
from ..memory.region import Region
from ..model.catalog import Parallel
from ..receipt import Receipt
from ..transport.base import Transport
from ..transport.registry import opened_transports


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

    def regions() -> list[Region]:
        return regions_within(arena.region(), opened.address, opened.layout.buffer_nbytes, config.registration)

    with ExitStack() as stack:
        stack.callback(arena.close)
        on_opened()
        client = stack.enter_context(CoordinatorClient(config.url))
        model = checkpoint.key(config.model_name, config.revision)
        with opened_transports(config) as transports:  # closed after the load: nothing of a seed stays open or mapped
            job = Job(
                model,
                opened.layout,
                opened.address,
                regions(),
                member,
                {n: wrap(t) for n, t in transports.items()},
                config,
                coordinator=client,
                arena=arena,
                reserve=[checkpoint.offer()],
                on_bytes=on_bytes,
            )
            receipt = load(job)
            opened.accept()
        seed = None
        if config.source:
            serving = stack.enter_context(opened_transports(config))
            for transport in serving.values():
                transport.register(regions())
            seed = Seed(
                model,
                opened.layout,
                opened.address,
                coordinator=client,
                transports=serving,
                instance=member.instance,
                files=opened.files.contents,
                attributes=attributes,
                arena=arena if config.attach else None,
                digests=config.verifies,
                proven=receipt.digests,
                threads=config.threads,
            )
            stack.enter_context(seed)
        yield Replica(opened, receipt, engine_s, seed)
