"""One rank of an instance: which weights it holds, where they lie, and how peers are reached. Loads and seeds begin with it.

    rank = Rank(model, layout, address, arena, Member("replica-1"), config, coordinator)
    receipt = load(Job(rank))
    with Seed(rank, proven=receipt.digests):
        serve()

Each of the two opens transports of its own, registers the memory with them, and closes them when it is over. So no connection,
descriptor or registration of a load outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..memory.arena import Arena
from ..memory.placing import regions_within
from ..memory.region import Region
from ..memory.space import Space, space_on
from ..model.boxes import IntArray
from ..model.catalog import ModelKey
from ..model.layout import Layout
from ..transport.base import Transport
from ..transport.registry import opened_transports

#: Opens the transports of a configuration for memory on a device. The end of the block closes them.
Opening = Callable[[Config, str], AbstractContextManager[Mapping[str, Transport]]]


@dataclass(frozen=True, slots=True)
class Member:
    """Rank `rank` of the `size` ranks of `instance`. All ranks of a load commit, or none does.

    launch: the same for all ranks of one life of the instance and new in the next (a run id), so that nobody takes part
    in a vote of the past."""

    instance: str
    rank: int = 0
    size: int = 1
    launch: str = ""

    @property
    def group(self) -> str:
        """Under which its ranks agree at the coordinator."""
        return f"{self.instance}/{self.launch}"


@dataclass(frozen=True, slots=True, eq=False)
class Rank:
    """The buffers of `layout` of `model`, at `address` [buffers] in `memory` on `device`. The caller owns the memory and the
    coordinator's client (None: a load reads only its own checkpoint), and keeps both while a load or a seed of this rank lasts.

    memory: the arena that holds all the buffers, or what to register of memory that others have allocated. An arena may get pages
    of a seed on this host in place of its own (`config.attach`), so it must be known to no device.
    opening: opens the transports; `kept_open` shares some between ranks, `wrapped` puts something in between."""

    model: ModelKey
    layout: Layout
    address: IntArray
    memory: Arena | Sequence[Region]
    member: Member
    config: Config
    coordinator: CoordinatorClient | None = None
    device: str = "cpu"
    opening: Opening = opened_transports

    @property
    def arena(self) -> Arena | None:
        """Whose pages may be shared between processes; None: everything is copied."""
        return self.memory if isinstance(self.memory, Arena) and self.config.attach else None

    @property
    def space(self) -> Space:
        """Raises HostError for a device that can't be used."""
        return space_on(self.device)

    def regions(self) -> list[Region]:
        """What to register of the memory as it is now: an arena's descriptor may have been given up."""
        if not isinstance(self.memory, Arena):
            return list(self.memory)
        return regions_within(self.memory.region(), self.address, self.layout.buffer_nbytes, self.config.registration)

    def opened(self) -> AbstractContextManager[Mapping[str, Transport]]:
        """Its transports, with nothing registered yet, for the length of a block. Raises ConfigError and HostError."""
        return self.opening(self.config, self.device)


def kept_open(transports: Mapping[str, Transport]) -> Opening:
    """These, which their owner closes."""
    return lambda _config, _device: nullcontext(transports)


def wrapped(wrap: Callable[[Transport], Transport]) -> Opening:
    """Each transport of the configuration as `wrap` returns it."""

    @contextmanager
    def opening(config: Config, device: str) -> Iterator[Mapping[str, Transport]]:
        with opened_transports(config, device) as opened:
            yield {name: wrap(transport) for name, transport in opened.items()}

    return opening
