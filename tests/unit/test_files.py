"""Files as sources: what has changed since it was described is never served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peerload.batch import Batch
from peerload.deadline import Deadline
from peerload.errors import SourceLost, SourceStale, SourceUnreachable
from peerload.memory import Arena
from peerload.testing.transport_conformance import strided
from peerload.transport.descriptions import decode
from peerload.transport.files import FileSet, FilesTransport

SOON = Deadline.after(3600)


class Scene:
    def __init__(self, folder: Path, transport: FilesTransport, arena: Arena) -> None:
        self.paths = [folder / "a.bin", folder / "b.bin", folder / "empty.bin"]
        for path, data in zip(self.paths, (b"a" * 4096, b"bcd" * 1000, b""), strict=True):
            path.write_bytes(data)
        self.files = FileSet.of(self.paths)
        self.transport, self.arena = transport, arena
        self.here = arena.allocate(8192)
        transport.register([arena.region()])

    def connect(self) -> str:
        return self.transport.connect(self.files.encode(), "disk", SOON)

    def whole(self, i: int) -> Batch:
        return strided(self.files.base[i], self.here, self.files.nbytes[i], [], [], [])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Arena(8192) as arena:
        transport = FilesTransport(threads=2)
        yield Scene(tmp_path, transport, arena)
        transport.close()


def test_files_have_an_address_space_of_their_own(scene: Scene) -> None:
    peer = scene.connect()
    scene.transport.read(peer, scene.whole(1), SOON)
    assert scene.arena.read(scene.here, 3000) == b"bcd" * 1000
    between = strided(scene.files.base[0], scene.here, 4097, [], [], [])
    with pytest.raises(SourceLost, match=r"src\[0\]"):
        scene.transport.read(peer, between, SOON)


def test_one_batch_reads_several_files(scene: Scene) -> None:
    src, dst, run = np.array(scene.files.base[:2]), scene.here + np.array([0, 10]), np.array([10, 30])
    scene.transport.read(scene.connect(), Batch.of_runs(src, dst, run), SOON)
    assert scene.arena.read(scene.here, 40) == b"a" * 10 + b"bcd" * 10


def test_a_file_that_was_rewritten_is_stale(scene: Scene) -> None:
    peer = scene.connect()
    scene.paths[1].write_bytes(b"xyz" * 1000)
    os.utime(scene.paths[1], ns=(1, 1))
    with pytest.raises(SourceStale, match=r"b\.bin has changed"):
        scene.transport.read(peer, scene.whole(1), SOON)
    scene.transport.read(peer, scene.whole(0), SOON)
    with pytest.raises(SourceUnreachable, match=r"b\.bin"):
        scene.connect()


def test_a_file_that_shrank_is_lost(scene: Scene) -> None:
    peer = scene.connect()
    os.truncate(scene.paths[0], 100)
    with pytest.raises(SourceLost, match=r"a\.bin"):
        scene.transport.read(peer, scene.whole(0), SOON)


def test_a_file_that_is_not_there_is_named(scene: Scene) -> None:
    scene.paths[0].unlink()
    with pytest.raises(SourceUnreachable, match=r"a\.bin: No such file"):
        scene.connect()


def test_a_set_of_files_survives_the_wire(scene: Scene) -> None:
    assert decode(FileSet, scene.files.encode(), "disk") == scene.files
