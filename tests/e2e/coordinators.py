"""What tests of the coordinator share: an offer, a coordinator in a process of its own, ranks likewise, a network that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from peerload.coordinator.ballot import Round
from peerload.deadline import Deadline
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.model.offer import Binding, Endpoint, Offer, SourceId

MODEL = ModelKey("org/llama", "r1")
#: Rank 0 has voted, rank 1 of 2 has not.
OPEN = {Round("target", 0): (1,)}

#: A rank that takes part in the rounds of the group "target", and says what came of it.
RANK = """
import sys
from peerload.coordinator.client import CoordinatorClient
from peerload.deadline import Deadline
from peerload.errors import PeerloadError
url, rank, size, rounds, deadline_s = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
with CoordinatorClient(url) as client:
    for number in range(rounds):
        try:
            print(client.agree("target", number, rank, size, b"%d" % rank, Deadline.after(deadline_s)), flush=True)
        except PeerloadError as error:
            print(type(error).__name__, error.message, flush=True)
"""
COORDINATOR = """
import sys
from peerload.coordinator.server import serve
running = serve(*sys.argv[1:])
print(running.address, flush=True)
running.wait()
"""


def layout(rank: int = 0, tp: int = 2) -> Layout:
    catalog = Catalog.of([TensorSpec("w", "BF16", (8, 4)), TensorSpec("norm", "BF16", (4,))])
    rows = 8 // tp
    pieces = [
        Piece(0, Box((rank * rows, 0), ((rank + 1) * rows, 4)), 0, 0, (8, 2)),
        Piece(1, Box((0,), (4,)), 0, rows * 8, (2,)),
    ]
    return Layout(catalog, ("arena",), np.array([rows * 8 + 8]), Pieces.of(pieces, 2), parallel=Parallel(tp), rank=rank)


def offer(instance: str = "seed", rank: int = 0, generation: str = "g1", tp: int = 2, endpoint: bytes = b"pid 1") -> Offer:
    binding = Binding(
        SourceId(instance, rank, generation),
        np.array([4096]),
        (Endpoint("local", endpoint),),
        np.array([7, 9], np.uint64),
        host="boot",
        attributes={"engine": "transformers"},
    )
    return Offer(layout(rank, tp), binding)


@contextmanager
def process(store: str, listen: str = "127.0.0.1:0", log: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A coordinator of its own process, and its address. `log` gets what it says on standard error."""
    words = [sys.executable, "-c", COORDINATOR, listen, store]
    with (
        (log or Path(os.devnull)).open("w") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors if log else None, text=True) as running,
    ):
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def kill(running: subprocess.Popen[str]) -> None:
    os.kill(running.pid, signal.SIGKILL)
    running.wait(10)


@contextmanager
def rank_process(url: str, rank: int, size: int, rounds: int = 1, deadline_s: float = 30.0) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", RANK, url, *map(str, (rank, size, rounds, deadline_s))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def answer(rank: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = Deadline.after(timeout_s)
    while not condition():
        deadline.check("waiting in a test")
        time.sleep(0.02)


def rss_mb(running: subprocess.Popen[str]) -> float:
    lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Network:
    """A TCP port in front of `server` (HOST:PORT). While it is `deaf`, the server's answers are lost; requests arrive."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self.deaf = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    host, port = self._server.split(":")
                    far = socket.create_connection((host, int(port)))
                except OSError:
                    near.close()
                    continue
                self._connections += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(one, other, one is far), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if not (answers and self.deaf):
                    other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._listening, *self._connections):
            end.close()
