"""Seeds on GPUs in a process of their own: rank i of an instance on GPU i modulo the number of GPUs."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from typing import Self

import numpy as np

from peerload.config import Config
from peerload.coordinator.client import CoordinatorClient
from peerload.job.rank import Member, Rank
from peerload.job.seed import Seed
from peerload.memory.arena import Arena
from peerload.model.catalog import ModelKey, Parallel
from peerload.model.layout import Layout
from peerload.testing.gpu import DeviceArena
from peerload.testing.instances import content
from peerload.testing.layouts import Model, layout
from peerload.testing.processes import Child, orders

CONFIG = Config(registration="arena", fallback="fail", deadline_s=60.0)


class GpuRank:
    """Device memory for every buffer of a layout. Owns it."""

    def __init__(self, made: Layout, gpu: str) -> None:
        sizes = made.buffer_nbytes.tolist()
        self.layout, self.gpu = made, gpu
        self.arena = DeviceArena(gpu, Arena.room(sizes))
        self.address = np.array([self.arena.allocate(n) for n in sizes], np.int64)

    def write(self, model: Model, parallel: Parallel) -> None:
        must = content(model, parallel, self.layout.rank)
        for name, address in zip(self.layout.buffer_names, self.address.tolist(), strict=True):
            self.arena.write(address, must[name].tobytes())

    def differences(self, model: Model, parallel: Parallel) -> list[str]:
        must = content(model, parallel, self.layout.rank)
        columns = zip(self.layout.buffer_names, self.address.tolist(), self.layout.buffer_nbytes.tolist(), strict=True)
        return [name for name, address, nbytes in columns if self.arena.read(address, nbytes) != must[name].tobytes()]


class GpuSeeds(Child):
    """All ranks of `instance`, offered until the block is left or they are killed. Asked to "flip", they change the first byte of
    every buffer and tell nobody."""

    def __init__(self, url: str, name: str, model: Model, parallel: Parallel, gpus: int, instance: str = "seed") -> None:
        super().__init__(
            f"{__name__}:serve",
            *(url, name, model, parallel, gpus, instance),
            name=f"the GPU seeds of {instance}",
            python=sys.executable,  # not forked: CUDA must begin in the process that uses it
            environment={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            grace_s=30.0,
        )

    def __enter__(self) -> Self:
        self.begun(90)
        return self


def serve(url: str, name: str, model: Model, parallel: Parallel, gpus: int, instance: str, link: Connection) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(CoordinatorClient(url, timeout_s=5.0))
        ranks = []
        for i in range(parallel.tp * parallel.pp):
            rank = GpuRank(layout(model, parallel, i), f"cuda:{i % gpus}")
            stack.enter_context(closing(rank.arena))
            rank.write(model, parallel)
            key, member, regions = ModelKey(name, model.name), Member(instance, i), [rank.arena.region()]
            offered = Rank(key, rank.layout, rank.address, regions, member, CONFIG, client, rank.gpu)
            stack.enter_context(Seed(offered))
            ranks.append(rank)
        link.send("ready")
        for order in orders(link):
            if order == "flip":
                for rank in ranks:
                    for address, nbytes in zip(rank.address.tolist(), rank.layout.buffer_nbytes.tolist(), strict=True):
                        if nbytes:
                            rank.arena.write(address, bytes([rank.arena.read(address, 1)[0] ^ 1]))
            link.send("done")
