"""Every transport against the one conformance class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from peerload.testing.source_process import Bytes, SourceProcess, content
from peerload.testing.transport_conformance import SIZES, Source, TransportConformance, regions_of
from peerload.transport.base import Transport
from peerload.transport.faulty import Faulty
from peerload.transport.files import FileSet, FilesTransport
from peerload.transport.local import LocalTransport
from peerload.transport.memory import MemoryTransport
from peerload.transport.nixl import NixlTransport
from peerload.transport.registry import cma_error, probe

cma = pytest.mark.skipif(cma_error() != 0, reason=f"process_vm_readv: {os.strerror(cma_error())}")
nixl = pytest.mark.skipif(not probe("nixl").available, reason=probe("nixl").reason)


class TestLocalMapped(TransportConformance):
    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        with SourceProcess("local", nbytes, memory="memfd", registration=registration) as process:
            yield process

    def reader(self) -> Transport:
        return LocalTransport(threads=2)


@cma
class TestLocalCma(TestLocalMapped):
    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        with SourceProcess("local", nbytes, memory="plain", registration=registration) as process:
            yield process


@nixl
class TestNixl(TestLocalMapped):
    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        with SourceProcess("nixl", nbytes, memory="plain", registration=registration) as process:
            yield process

    def reader(self) -> Transport:
        return NixlTransport("lo")


@nixl
class TestNixlOverTcp(TestNixl):
    """As between hosts: without shared memory or process_vm_readv, nothing moves unless both processes run."""

    reads_need_the_source = True

    @pytest.fixture(autouse=True)
    def tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")

    def reader(self) -> Transport:
        return NixlTransport("lo", stall_s=1.5)


class TestFaultyWithoutFaults(TestLocalMapped):
    def reader(self) -> Transport:
        return Faulty(LocalTransport(threads=2))


class InProcess:
    """A source in this process, over the memory transport."""

    def __init__(self, transport: MemoryTransport, nbytes: Sequence[int]) -> None:
        self._transport = transport
        self._buffers: list[Bytes] = []
        self.address: list[int] = []
        for n in nbytes:
            self.register_more(n)

    def register_more(self, nbytes: int) -> int:
        index = len(self._buffers)
        self._buffers.append(content(index, nbytes))
        self._transport.register(regions_of(self._buffers[index:]))
        self.address.append(int(self._buffers[index].ctypes.data))
        self.description = self._transport.describe()
        return index

    def kill(self) -> None:
        self._transport.close()


class TestMemory(TransportConformance):
    @pytest.fixture(autouse=True)
    def hall(self) -> None:
        self._hall: dict[str, MemoryTransport] = {}

    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        yield InProcess(MemoryTransport(self._hall), nbytes)

    def reader(self) -> Transport:
        return MemoryTransport(self._hall)


class OnDisk:
    """A source made of files: one for each buffer. It dies by losing its last byte."""

    def __init__(self, folder: Path, nbytes: Sequence[int]) -> None:
        self._folder = folder
        self.paths: list[Path] = []
        for n in nbytes:
            self.register_more(n)

    def register_more(self, nbytes: int) -> int:
        index = len(self.paths)
        self.paths.append(self._folder / f"{index}.bin")
        self.paths[index].write_bytes(content(index, nbytes).tobytes())
        files = FileSet.of(self.paths)
        self.address = list(files.base)
        self.description = files.encode()
        return index

    def kill(self) -> None:
        os.truncate(self.paths[0], SIZES[0] - 1)


class TestFiles(TransportConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self._folder = tmp_path

    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        yield OnDisk(self._folder, nbytes)

    def reader(self) -> Transport:
        return FilesTransport(threads=2)
