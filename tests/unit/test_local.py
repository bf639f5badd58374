"""What is particular to the local transport: mappings, seals, death, and who is served."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peerload.deadline import Deadline
from peerload.errors import HostError, SourceLost, SourceUnreachable
from peerload.memory.arena import Arena
from peerload.memory.region import Region
from peerload.native._lib import lib
from peerload.planning.batch import Batch
from peerload.testing.source_process import SourceProcess, content
from peerload.testing.transport_conformance import strided
from peerload.transport.descriptions import encode
from peerload.transport.descriptors import Connection, Handover
from peerload.transport.local import LocalTransport
from peerload.transport.local_peer import LocalDescription, why_not
from peerload.transport.probes import cma_error
from peerload.transport.process import boot_id, pid_namespace, start_time

SOON = Deadline.after(3600)


@pytest.fixture
def reader() -> Iterator[LocalTransport]:
    transport = LocalTransport(threads=2)
    yield transport
    transport.close()


@pytest.fixture
def seed() -> Iterator[LocalTransport]:
    transport = LocalTransport(threads=1)
    yield transport
    transport.close()


def block(src: int, dst: int, nbytes: int) -> Batch:
    return strided(src, dst, nbytes, [], [], [])


def told(transport: LocalTransport) -> dict[str, object]:
    return dict(json.loads(transport.describe()))


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def mapped_nbytes(name: str) -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.partition("/")[2].startswith(f"memfd:{name} "):
            low, _, high = line.split()[0].partition("-")
            total += int(high, 16) - int(low, 16)
    return total


@pytest.mark.parametrize("memory", ["memfd", "plain"])
def test_what_is_read_does_not_stay_resident(reader: LocalTransport, memory: str) -> None:
    if memory == "plain" and cma_error():
        pytest.skip("process_vm_readv is forbidden here")
    nbytes = 256 << 20
    with SourceProcess("local", [nbytes], memory=memory, random=False) as source, Arena(nbytes) as arena:
        here = arena.allocate(nbytes, 4096)
        arena.view(here, nbytes)[:] = b"\1" * nbytes
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        before = resident_nbytes()
        reader.read(peer, block(source.address[0], here, nbytes), SOON)
        assert resident_nbytes() - before < 16 << 20
        assert not np.frombuffer(arena.view(here, nbytes), np.uint8).any()


def test_a_seed_that_withdraws_is_lost_at_once(reader: LocalTransport) -> None:
    with SourceProcess("local", [4096]) as source, Arena(4096) as arena:
        here = arena.allocate(4096)
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        source.close_transport()
        with pytest.raises(SourceLost, match="closed its transport or died"):
            reader.read(peer, block(source.address[0], here, 4096), SOON)


ORPHAN = """
import os, sys, time
from peerload.memory.arena import Arena
from peerload.transport.local import LocalTransport
arena = Arena(1 << 20)
address = arena.allocate(1 << 20)
transport = LocalTransport(threads=1)
transport.register([arena.region()])
print(address, transport.describe().decode(), flush=True)
sys.stdin.readline()
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_a_forked_child_that_holds_the_socket_is_no_sign_of_life(reader: LocalTransport) -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    child = 0
    try:
        with Arena(1 << 20) as arena:
            here = arena.allocate(1 << 20)
            reader.register([arena.region()])
            address, description = process.stdout.readline().split(b" ", 1)
            peer = reader.connect(description, "source", SOON)
            process.stdin.write(b"fork\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            reader.read(peer, block(int(address), here, 1 << 20), SOON)
            process.kill()
            process.wait(10)
            with pytest.raises(SourceLost):
                reader.read(peer, block(int(address), here, 1 << 20), SOON)
    finally:
        if child:
            os.kill(child, 9)
        process.stdin.close()
        process.stdout.close()


def test_mappings_of_a_lost_source_are_given_back(reader: LocalTransport) -> None:
    with SourceProcess("local", [64 << 20], random=False) as source, Arena(4096, "mine") as arena:
        here = arena.allocate(100)
        reader.register([arena.region()])
        before = mapped_nbytes("peerload")
        peer = reader.connect(source.description, "source", SOON)
        assert mapped_nbytes("peerload") - before >= 64 << 20
        source.kill()
        with pytest.raises(SourceLost):
            reader.read(peer, block(source.address[0], here, 100), SOON)
        assert mapped_nbytes("peerload") == before


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("host", "elsewhere", "another host"),
        ("token", "0" * 32, "hand over"),
        ("socket", "nobody", "socket"),
        ("start_time", 1, "no longer the one"),
        ("pid", 1, "no longer the one"),
        ("address", [-5], "sense"),
        ("nbytes", [1 << 63], "sense"),
        ("nbytes", [], "sense"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    seed: LocalTransport, reader: LocalTransport, field: str, value: object, problem: str
) -> None:
    with Arena(4096) as arena:
        seed.register([arena.region()])
        description = json.dumps({**told(seed), field: value}).encode()
        with pytest.raises(SourceUnreachable, match=problem):
            reader.connect(description, "source", SOON)


def test_descriptors_that_are_handed_out_cannot_be_written(seed: LocalTransport) -> None:
    with Arena(4096) as arena:
        seed.register([arena.region()])
        description = told(seed)
        connection = Connection(str(description["socket"]), str(description["token"]), SOON)
        (fd,) = connection.receive({0}).values()
        with pytest.raises(OSError, match="Permission denied"):
            mmap.mmap(fd, 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)
        connection.close()


@pytest.mark.skipif(cma_error() != 0, reason="process_vm_readv is forbidden here")
@pytest.mark.parametrize("sealable", [True, False])
def test_a_memfd_that_could_shrink_is_never_mapped(seed: LocalTransport, reader: LocalTransport, sealable: bool) -> None:
    fd = os.memfd_create("shaky", os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0))
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    memory[:5] = b"hello"
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    seed.register([Region(address, 4096, fd=fd)])
    assert told(seed)["file"] == [0 if sealable else -1]
    if sealable:
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 0)
    with Arena(4096) as arena:
        here = arena.allocate(5)
        reader.register([arena.region()])
        reader.read(reader.connect(seed.describe(), "source", SOON), block(address, here, 5), SOON)
        assert arena.read(here, 5) == b"hello"
    os.close(fd)


@pytest.mark.skipif(cma_error() != 0, reason="process_vm_readv is forbidden here")
def test_a_reader_trusts_no_seed_about_seals(reader: LocalTransport) -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    memory = mmap.mmap(fd, 1 << 20)
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    handover = Handover(lambda: {0: os.dup(fd)})
    description = LocalDescription(
        host=boot_id(),
        pid_namespace=pid_namespace(),
        pid=os.getpid(),
        start_time=start_time(os.getpid()),
        socket=handover.address,
        token=handover.token,
        address=[address],
        nbytes=[1 << 20],
        file=[0],
        offset=[0],
    )
    before = mapped_nbytes("unsealed")
    with Arena(1 << 20) as arena:
        here = arena.allocate(1 << 20)
        reader.register([arena.region()])
        peer = reader.connect(encode(description), "source", SOON)
        assert mapped_nbytes("unsealed") == before
        reader.read(peer, block(address, here, 1 << 20), SOON)
        os.ftruncate(fd, 0)
        with pytest.raises(SourceLost, match="Bad address"):
            reader.read(peer, block(address, here, 1 << 20), SOON)
    handover.close()
    os.close(fd)


def test_a_descriptor_that_means_another_file_by_now_is_not_handed_out(seed: LocalTransport) -> None:
    staging = Arena(4096)
    number = staging.region().fd
    seed.register([staging.region()])
    description = told(seed)
    staging.close()
    secret = os.open("/dev/zero", os.O_RDONLY)
    assert secret == number, "the test needs the number to be used again"
    connection = Connection(str(description["socket"]), str(description["token"]), SOON)
    assert connection.receive(range(10)) == {}
    connection.close()
    os.close(secret)


def test_regions_whose_memfd_was_closed_are_forgotten(seed: LocalTransport, reader: LocalTransport) -> None:
    with Arena(4096) as staging:
        seed.register([staging.region()])
    with Arena(4096) as arena:  # likely with the same descriptor number
        address = arena.allocate(7)
        arena.write(address, b"weights")
        seed.register([arena.region()])
        assert told(seed)["address"] == [arena.address]
        assert told(seed)["file"] == [1]
        with Arena(4096) as ours:
            here = ours.allocate(7)
            reader.register([ours.region()])
            reader.read(reader.connect(seed.describe(), "source", SOON), block(address, here, 7), SOON)
            assert ours.read(here, 7) == b"weights"


@pytest.mark.skipif(cma_error() != 0, reason="process_vm_readv is forbidden here")
def test_a_region_that_is_gone_keeps_nobody_from_the_others(seed: LocalTransport, reader: LocalTransport) -> None:
    """Two seeds of one process; one ends, and with it its fence."""
    gone = lib.peerload_reserve(mmap.PAGESIZE)  # nothing can be read there
    with Arena(4096) as kept, Arena(4096) as landing:
        there, here = kept.allocate(4), landing.allocate(4)
        kept.write(there, b"here")
        seed.register([Region(gone, mmap.PAGESIZE), kept.region()])
        reader.register([landing.region()])
        peer = reader.connect(seed.describe(), "source", SOON)
        reader.read(peer, block(there, here, 4), SOON)
        assert landing.read(here, 4) == b"here"
        with pytest.raises(SourceLost):
            reader.read(peer, block(gone, here, 4), SOON)
    lib.peerload_unmap(gone, mmap.PAGESIZE)


def test_readers_see_what_the_memory_holds_now(seed: LocalTransport, reader: LocalTransport) -> None:
    with Arena(4096) as arena, Arena(4096) as ours:
        address, here = arena.allocate(3), ours.allocate(3)
        seed.register([arena.region()])
        reader.register([ours.region()])
        peer = reader.connect(seed.describe(), "source", SOON)
        for text in (b"old", b"new"):
            arena.write(address, text)
            reader.read(peer, block(address, here, 3), SOON)
            assert ours.read(here, 3) == text


def test_huge_pages_are_read_as_well(reader: LocalTransport) -> None:
    with Arena(4 << 20) as probe:
        probe.write(probe.allocate(4 << 20), b"x" * (4 << 20))
        if not probe.collapse():
            pytest.skip("this kernel can't collapse pages")
        assert bytes(probe.read(probe.address + 4096, 4 << 20)) == b"x" * (4 << 20)
    with SourceProcess("local", [5 << 20, 77], memory="huge") as source, Arena(6 << 20) as arena:
        here = arena.allocate(5 << 20)
        reader.register([arena.region()])
        reader.read(reader.connect(source.description, "source", SOON), block(source.address[0], here, 5 << 20), SOON)
        assert arena.read(here, 5 << 20) == content(0, 5 << 20).tobytes()


def test_memory_that_is_not_the_cpus_is_refused(seed: LocalTransport) -> None:
    with pytest.raises(HostError, match="cuda:0"):
        seed.register([Region(4096, 4096, "cuda:0")])


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.ESRCH, errno.EFAULT])
def test_every_refusal_of_cma_names_a_reason_and_a_way_out(error: int) -> None:
    problem, fix = why_not(error)
    assert problem
    assert "Arena" in fix
