"""A process that holds known bytes and lets a transport read them: the other side of transport tests and benchmarks.

    with SourceProcess("local", [1 << 20, 100], memory="plain") as source:
        peer = transport.connect(source.description, "source")

Run as a module it is that process: it answers on descriptor 1 (anything else printed goes to standard error), one JSON
document a line, and ends when standard input does.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from ..config import Config
from ..errors import HostError
from ..memory.arena import Arena, copy
from ..memory.placing import Placed, placed, regions_for
from ..memory.region import Region
from ..planning.batch import Batch
from ..transport.base import Transport
from ..transport.registry import open_transport
from .gpu import DeviceArena

Bytes = npt.NDArray[np.uint8]


def content(index: int, nbytes: int) -> Bytes:
    """What buffer `index` of every source process holds."""
    return np.random.default_rng(index).integers(0, 256, nbytes, np.uint8)


class SourceProcess:
    """Buffers of `nbytes` each, registered with `transport` under the strategy `registration`.

    memory: "memfd" puts them into an arena, "frozen" into one that is frozen, "huge" into one of huge pages, "plain" into
    private memory; "cuda:N" into memory of that GPU, "torch cuda:N" lets PyTorch allocate each as a tensor there. There is one
    allocation for every two buffers, or a single one for the strategy that wants one.
    random: False fills with zeros,
    which is quicker."""

    def __init__(
        self, transport: str, nbytes: Sequence[int], *, memory: str = "memfd", registration: str = "arena", random: bool = True
    ) -> None:
        self._order = {
            "transport": transport,
            "nbytes": list(nbytes),
            "memory": memory,
            "registration": registration,
            "random": random,
        }
        self.nbytes = list(nbytes)

    def __enter__(self) -> SourceProcess:
        command = [sys.executable, "-m", __name__, json.dumps(self._order)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._hear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(20)

    @property
    def pid(self) -> int:
        return self._process.pid

    def register_more(self, nbytes: int) -> int:
        """Have one more buffer made and registered; returns its index. `description` and `address` are new then."""
        self._say(f"more {nbytes}")
        self.nbytes.append(nbytes)
        return len(self.nbytes) - 1

    def close_transport(self) -> None:
        """Have it withdraw its memory and live on."""
        self._say("close")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(20)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the source process ended with {self._process.wait(20)}; its standard error says why")
        told = json.loads(line)
        self.description: bytes = base64.b64decode(told["description"])
        self.address: list[int] = told["address"]


def _serve(order: str, orders: IO[str], answers: IO[str]) -> None:
    told = json.loads(order)
    gpu = "cuda" in told["memory"]
    transport = open_transport(told["transport"], Config(threads=1, interface="lo"), told["memory"].split()[-1] if gpu else "cpu")
    buffers: list[Placed] = []
    kept: list[object] = []
    joint = told["registration"] == "arena"

    def make_on_gpu(sizes: list[int]) -> None:
        if told["memory"].startswith("torch"):
            import torch

            for n in sizes:
                tensor = torch.from_numpy(content(len(buffers), n)).to(told["memory"].split()[-1])
                kept.append(tensor)
                buffers.append(placed(tensor))
        else:
            arena = DeviceArena(told["memory"], sum(n + 64 for n in sizes))
            kept.append(arena)
            for n in sizes:
                address = arena.allocate(n)
                arena.write(address, content(len(buffers), n).tobytes())
                buffers.append(Placed(address, n, arena.region()))
        transport.register(regions_for(buffers[-len(sizes) :], told["registration"]))

    def make(sizes: list[int]) -> None:
        if gpu:
            make_on_gpu(sizes)
            return
        room = sum(n + 64 for n in sizes)
        arena = Arena(max(room, Arena.room(sizes)))
        if told["memory"] in ("memfd", "frozen", "huge"):
            kept.append(arena)
            address = [arena.place(n) if told["memory"] == "frozen" else arena.allocate(n) for n in sizes]
            block = arena.region()
        else:
            array = np.zeros(room, np.uint8)
            kept.append(array)
            ends = np.cumsum([n + 64 for n in sizes])
            address = [int(array.ctypes.data + end - n - 64) for n, end in zip(sizes, ends, strict=True)]
            block = Region(array.ctypes.data, room)
        for a, n in zip(address, sizes, strict=True):
            _fill(a, content(len(buffers), n) if told["random"] else np.zeros(n, np.uint8))
            buffers.append(Placed(a, n, block))
        if told["memory"] == "frozen" and not arena.freeze():
            raise HostError("the kernel refuses to freeze an arena")
        if told["memory"] == "huge" and not arena.collapse():
            raise HostError("no huge pages")
        transport.register(regions_for(buffers[-len(sizes) :], told["registration"]))

    def answer(transport: Transport | None) -> None:
        description = transport.describe() if transport is not None else b""
        told = {"description": base64.b64encode(description).decode(), "address": [b.address for b in buffers]}
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    sizes = told["nbytes"]
    for i in range(0, len(sizes), len(sizes) if joint else 2):
        make(sizes[i:] if joint else sizes[i : i + 2])
    answer(transport)
    for line in orders:
        verb, *rest = line.split()
        if verb == "more":
            make([int(rest[0])])
        else:
            transport.close()
        answer(transport if verb == "more" else None)
    transport.close()


def _fill(address: int, data: Bytes) -> None:
    if data.size:
        one = np.ones(1, np.int64)
        copy(Batch.of_runs(one * data.ctypes.data, one * address, one * data.size))


if __name__ == "__main__":
    spoken = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(spoken, "w") as answers:
        _serve(sys.argv[1], sys.stdin, answers)
