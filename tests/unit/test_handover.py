"""Handing over descriptors to readers that are many, silent or slow, and taking them from givers that mean no good."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from peerload.deadline import Deadline
from peerload.errors import SourceUnreachable
from peerload.memory.arena import Arena
from peerload.memory.region import Region
from peerload.planning.batch import Batch
from peerload.testing.transport_conformance import strided
from peerload.transport import descriptors as handover
from peerload.transport.descriptors import FDS_IN_MESSAGE, Connection, Handover
from peerload.transport.local import LocalTransport


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def settled(count: int) -> int:
    """How many descriptors are open, as soon as it is `count`: threads close theirs a moment later."""
    deadline = soon()
    while open_descriptors() != count and deadline.remaining_s:
        time.sleep(0.01)
    return open_descriptors()


def soon() -> Deadline:
    return Deadline.after(20)


def take(served: Handover, wanted: range = range(1000)) -> list[int]:
    """What a reader gets, as the numbers of the descriptors."""
    with closing(Connection(served.address, served.token, soon())) as connection:
        got = connection.receive(wanted)
        for fd in got.values():
            os.close(fd)
        return sorted(got)


@contextmanager
def serving(offered: Callable[[], dict[int, int]]) -> Iterator[Handover]:
    with closing(Handover(offered)) as served:
        yield served


def some(count: int) -> dict[int, int]:
    return {number: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for number in range(count)}


def knock(address: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(f"\0{address}")
    return peer


def test_more_descriptors_than_a_message_takes_arrive_and_none_leaks() -> None:
    before = open_descriptors()
    with serving(lambda: some(2 * FDS_IN_MESSAGE + 1)) as served:
        assert take(served) == list(range(2 * FDS_IN_MESSAGE + 1))
        assert take(served, range(3)) == [0, 1, 2]
    assert settled(before) == before


def test_readers_that_say_nothing_hold_nobody_up() -> None:
    with serving(lambda: some(1)) as served:
        silent = [knock(served.address) for _ in range(20)]
        begun_s = time.monotonic()
        assert take(served) == [0]
        assert time.monotonic() - begun_s < handover.PATIENCE_S / 2
        for peer in silent:
            peer.close()


def test_readers_that_take_nothing_hold_nobody_up() -> None:
    before = open_descriptors()
    with serving(lambda: some(600)) as served:
        deaf = [knock(served.address) for _ in range(3)]
        for peer in deaf:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            peer.send(served.token.encode())
        assert take(served) == list(range(600))
        for peer in deaf:
            peer.close()
    assert settled(before) == before


def test_who_never_says_who_he_is_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PATIENCE_S", 0.1)
    with serving(lambda: some(1)) as served, closing(knock(served.address)) as silent:
        silent.settimeout(20)
        assert silent.recv(1) == b""


def test_more_connections_than_are_served_cost_only_those_who_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SERVED", 5)
    with serving(lambda: some(1)) as served, closing(Connection(served.address, served.token, soon())) as loyal:
        for fd in loyal.receive({0}).values():
            os.close(fd)
        silent = [knock(served.address) for _ in range(12)]
        assert take(served) == [0]
        assert loyal.alive()
        for peer in silent:
            peer.close()


FEW_DESCRIPTORS = """
import os, resource, sys
from peerload.memory.arena import Arena
from peerload.transport.local import LocalTransport
arena = Arena(4096)
address = arena.allocate(7)
arena.write(address, b"weights")
transport = LocalTransport(threads=1)
transport.register([arena.region()])
description = transport.describe()
most = len(os.listdir("/proc/self/fd")) + 10
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
print(address, description.decode(), flush=True)
sys.stdin.read()
"""


def test_a_seed_that_runs_out_of_descriptors_is_readable_afterwards() -> None:
    command = [sys.executable, "-c", FEW_DESCRIPTORS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as seed:
        assert seed.stdin is not None
        assert seed.stdout is not None
        assert seed.stderr is not None
        address, description = seed.stdout.readline().split(b" ", 1)
        told = json.loads(description)
        crowd = [knock(told["socket"]) for _ in range(40)]
        time.sleep(0.5)
        for peer in crowd:
            peer.close()
        with closing(LocalTransport(threads=1)) as reader, Arena(4096) as arena:
            here = arena.allocate(7)
            reader.register([arena.region()])
            reader.read(reader.connect(description, "seed", soon()), strided(int(address), here, 7, [], [], []), soon())
            assert arena.read(here, 7) == b"weights"
        seed.stdin.close()
        said = seed.stderr.read().decode()
    assert "Traceback" not in said
    assert said.count("no new reader can connect") == 1


def test_a_seed_that_cannot_open_all_its_memory_leaks_none_of_it() -> None:
    with ExitStack() as stack:
        seed = stack.enter_context(closing(LocalTransport(threads=1)))
        seed.register([stack.enter_context(Arena(4096)).region() for _ in range(40)])
        told = json.loads(seed.describe())
        with closing(knock(told["socket"])) as stranger:  # once it is sent away, the seed's thread has all that it opens
            stranger.send(b"stranger")
            stranger.settimeout(20)
            assert stranger.recv(1) == b""
        before, limit = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
        with closing(knock(told["socket"])) as peer:
            time.sleep(0.2)  # accepted
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 20, limit[1]))
                peer.send(told["token"].encode())
                peer.settimeout(20)
                assert peer.recv(1) == b"", "it was served"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert settled(before) == before


class Giver:
    """Answers each reader with these messages, again and again if `forever`."""

    def __init__(self, answers: list[tuple[object, int]], pause_s: float = 0.0, forever: bool = False) -> None:
        self._answers, self._pause_s, self._forever = answers, pause_s, forever
        self.address = f"giver-{os.getpid()}-{id(self):x}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            peer, _ = self._listener.accept()
            with peer:
                peer.recv(64)
                while self._answers:
                    for message, count in self._answers:
                        data = message if isinstance(message, bytes) else json.dumps(message).encode()
                        socket.send_fds(peer, [data], [0] * count)
                        time.sleep(self._pause_s)
                    if not self._forever:
                        break
                peer.recv(64)
        except OSError:
            pass  # the reader has had enough

    def close(self) -> None:
        self._listener.close()


NONSENSE: list[tuple[list[tuple[object, int]], bool]] = [
    ([({"numbers": list(range(200)), "more": True}, 200)], True),
    ([({"numbers": [], "more": True}, 0)], True),
    ([({"numbers": [0, 1], "more": False}, 1)], False),
    ([({"numbers": [0], "more": False}, 2)], False),
    ([({"numbers": ["0"], "more": False}, 1)], False),
    ([({"numbers": 5, "more": False}, 1)], False),
    ([({"numbers": [0], "more": True}, 1), ({"more": 1}, 3)], False),
    ([(b"[" * 5000, 4)], False),
    ([(b"\xff", 4)], False),
]


@pytest.mark.parametrize(("answers", "forever"), NONSENSE)
def test_a_giver_of_nonsense_is_refused_and_nothing_leaks(answers: list[tuple[object, int]], forever: bool) -> None:
    before = open_descriptors()
    with (
        closing(Giver(answers, forever=forever)) as giver,
        closing(Connection(giver.address, "token", soon())) as connection,
        pytest.raises(ValueError, match=r"\w"),
    ):
        connection.receive(range(10_000))
    assert settled(before) == before


@pytest.mark.parametrize("answers", [[], [({"numbers": [], "more": True}, 0)]])
def test_a_giver_that_takes_its_time_has_until_the_deadline(answers: list[tuple[object, int]]) -> None:
    begun_s = time.monotonic()
    with closing(Giver(answers, pause_s=0.2, forever=True)) as giver:
        with closing(Connection(giver.address, "token", Deadline.after(0.7))) as connection, pytest.raises(TimeoutError):
            connection.receive(range(3))
        assert time.monotonic() - begun_s < 5


def test_a_process_that_never_accepts_has_until_the_deadline() -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as listener:
        listener.bind(f"\0never-{os.getpid()}")
        listener.listen(0)
        crowd = [knock(f"never-{os.getpid()}")]  # its queue is full now
        with pytest.raises(TimeoutError):
            Connection(f"never-{os.getpid()}", "token", Deadline.after(0.3))
        for peer in crowd:
            peer.close()


def test_descriptors_that_were_not_described_are_closed() -> None:
    before = open_descriptors()
    with closing(LocalTransport(threads=1)) as seed, closing(LocalTransport(threads=1)) as reader, Arena(4096) as arena:
        here = arena.allocate(4)
        seed.register([arena.region()])
        description = json.loads(seed.describe())
        with Arena(4096) as more:
            seed.register([more.region()])
            peer = reader.connect(json.dumps(description).encode(), "seed", soon())
            reader.register([Region(here, 4)])
            reader.read(peer, Batch.of_runs(*(strided(here, here, 0, [], [], []).runs())), soon())
            # arenas: 2; the seed: listener, two ends of its stop, selector, the peer; the reader: socket, process, one memfd
            assert settled(before + 2 + 5 + 3) == before + 2 + 5 + 3
        with pytest.raises(SourceUnreachable):
            reader.connect(json.dumps({**description, "token": "f" * 32}).encode(), "seed", soon())
