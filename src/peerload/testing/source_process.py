"""A process that holds known bytes and lets a transport read them: the other side of transport tests and benchmarks.

    with SourceProcess("local", [1 << 20, 100], memory="plain") as source:
        peer = transport.connect(source.description, "source")

What each of its buffers holds is said by `content`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from ..config import Config
from ..errors import HostError
from ..memory.arena import Arena, copy
from ..memory.placing import Placed, placed, regions_for
from ..memory.region import Region
from ..planning.batch import Batch
from ..transport.registry import open_transport
from .gpu import DeviceArena
from .processes import Child, orders

Bytes = npt.NDArray[np.uint8]

#: What lies between two buffers of one allocation, at least.
_GAP: Final = 64


def content(index: int, nbytes: int) -> Bytes:
    """What buffer `index` of every source process holds."""
    return np.random.default_rng(index).integers(0, 256, nbytes, np.uint8)


class SourceProcess(Child):
    """Buffers of `nbytes` each, registered with `transport` under the strategy `registration`. `description` and `address`
    (one for each buffer) say where they are.

    memory: "memfd" puts them into an arena, "frozen" into one that is frozen, "huge" into one of huge pages, "plain" into
    private memory; "cuda:N" into memory of that GPU, "torch cuda:N" lets PyTorch allocate each as a tensor there. There is one
    allocation for every two buffers, or a single one for the strategy that wants one.
    random: False fills with zeros, which is quicker."""

    def __init__(
        self, transport: str, nbytes: Sequence[int], *, memory: str = "memfd", registration: str = "arena", random: bool = True
    ) -> None:
        self.nbytes = list(nbytes)
        buffers = _Buffers(memory, registration, random)
        super().__init__(f"{__name__}:_serve", transport, self.nbytes, buffers, name=f"the source process of {transport}")

    def __enter__(self) -> Self:
        self._told(self.begun())
        return self

    def register_more(self, nbytes: int) -> int:
        """Have one more buffer made and registered; returns its index. `description` and `address` are new then."""
        self._told(self.ask(nbytes))
        self.nbytes.append(nbytes)
        return len(self.nbytes) - 1

    def close_transport(self) -> None:
        """Have it withdraw its memory and live on."""
        self._told(self.ask("close"))

    def _told(self, answer: tuple[bytes, list[int]]) -> None:
        self.description, self.address = answer


def _serve(transport: str, nbytes: Sequence[int], buffers: _Buffers, link: Connection) -> None:
    """An order is the size of one more buffer, or "close"."""
    with closing(open_transport(transport, Config(threads=1, interface="lo"), buffers.device)) as opened:
        at_once = len(nbytes) if buffers.registration == "arena" else 2
        for i in range(0, len(nbytes), max(at_once, 1)):
            opened.register(buffers.make(nbytes[i : i + at_once]))
        link.send((opened.describe(), buffers.address))
        for order in orders(link):
            if order == "close":
                opened.close()
                link.send((b"", buffers.address))
            else:
                opened.register(buffers.make([order]))
                link.send((opened.describe(), buffers.address))


@dataclass(slots=True)
class _Buffers:
    """Buffers in memory of a kind, filled. They live as long as this object."""

    memory: str
    registration: str
    random: bool
    _made: list[Placed] = field(default_factory=list)
    _kept: list[object] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.memory.split()[-1] if "cuda" in self.memory else "cpu"

    @property
    def address(self) -> list[int]:
        return [buffer.address for buffer in self._made]

    def make(self, sizes: Sequence[int]) -> list[Region]:
        """Allocate and fill one more buffer of each size; returns what to register for them."""
        if self.memory.startswith("torch"):
            made = self._tensors(sizes)
        elif self.device != "cpu":
            made = self._on_device(sizes)
        else:
            made = self._plain(sizes) if self.memory == "plain" else self._in_arena(sizes)
        self._made += made
        return regions_for(made, self.registration)

    def _content(self, i: int, nbytes: int) -> Bytes:
        """Of the `i`-th buffer that is made now."""
        return content(len(self._made) + i, nbytes) if self.random else np.zeros(nbytes, np.uint8)

    def _tensors(self, sizes: Sequence[int]) -> list[Placed]:
        import torch

        tensors = [torch.from_numpy(self._content(i, n)).to(self.device) for i, n in enumerate(sizes)]
        self._kept.append(tensors)
        return [placed(tensor) for tensor in tensors]

    def _on_device(self, sizes: Sequence[int]) -> list[Placed]:
        arena = DeviceArena(self.device, sum(n + _GAP for n in sizes))
        self._kept.append(arena)
        address = [arena.allocate(n) for n in sizes]
        for i, (a, n) in enumerate(zip(address, sizes, strict=True)):
            arena.write(a, self._content(i, n).tobytes())
        return [Placed(a, n, arena.region()) for a, n in zip(address, sizes, strict=True)]

    def _in_arena(self, sizes: Sequence[int]) -> list[Placed]:
        arena = Arena(max(sum(n + _GAP for n in sizes), Arena.room(sizes)))
        self._kept.append(arena)
        address = [arena.place(n) if self.memory == "frozen" else arena.allocate(n) for n in sizes]
        made = self._filled(address, sizes, arena.region())
        if self.memory == "frozen" and not arena.freeze():
            raise HostError("the kernel refuses to freeze an arena")
        if self.memory == "huge" and not arena.collapse():
            raise HostError("no huge pages")
        return made

    def _plain(self, sizes: Sequence[int]) -> list[Placed]:
        block = np.zeros(sum(n + _GAP for n in sizes), np.uint8)
        self._kept.append(block)
        ends = np.cumsum([n + _GAP for n in sizes])
        address = [int(block.ctypes.data + end - n - _GAP) for n, end in zip(sizes, ends, strict=True)]
        return self._filled(address, sizes, Region(block.ctypes.data, block.size))

    def _filled(self, address: Sequence[int], sizes: Sequence[int], region: Region) -> list[Placed]:
        for i, (a, n) in enumerate(zip(address, sizes, strict=True)):
            _fill(a, self._content(i, n))
        return [Placed(a, n, region) for a, n in zip(address, sizes, strict=True)]


def _fill(address: int, data: Bytes) -> None:
    if data.size:
        one = np.ones(1, np.int64)
        copy(Batch.of_runs(one * data.ctypes.data, one * address, one * data.size))
