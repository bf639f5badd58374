"""Frozen arenas, and mapping their pages instead of copying them: who may, what is mapped, and what stays true afterwards."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch

from peerload.config import Config
from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import serve
from peerload.deadline import Deadline
from peerload.engines.bare import BareRank
from peerload.errors import HostError, SourceLost
from peerload.job.load import Job, load
from peerload.job.rank import Member, kept_open
from peerload.job.seed import Seed
from peerload.memory.arena import Arena
from peerload.memory.region import Region
from peerload.memory.space import HOST, digest_layout
from peerload.model.catalog import Parallel
from peerload.model.offer import Binding, Endpoint, Offer, SourceId
from peerload.planning.batch import Batch
from peerload.testing.instances import Life, SeedProcess, TargetProcess, content, differences, load_ranks
from peerload.testing.layouts import layout, llama
from peerload.testing.source_process import SourceProcess
from peerload.testing.source_process import content as known
from peerload.testing.transport_conformance import strided
from peerload.transport.local import LocalTransport
from peerload.transport.probes import cma_error
from peerload.transport.registry import open_transports

pytestmark = pytest.mark.skipif(cma_error() != 0, reason="process_vm_readv is forbidden here, so nothing is attached")

PAGE = mmap.PAGESIZE
SOON = Deadline.after(3600)
MIB = 1 << 20
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
#: 11 MB, its shards in whole pages.
MODEL = llama(name="paged", hidden=512, inter=2048, heads=8, kv_heads=4, head=64, layers=1, vocabulary=2048)
CONFIG = Config(transport="local", fallback="fail", deadline_s=30.0, threads=1)


@pytest.fixture
def reader() -> Iterator[LocalTransport]:
    transport = LocalTransport(threads=2)
    yield transport
    transport.close()


@pytest.fixture
def url() -> Iterator[str]:
    server = serve("127.0.0.1:0", "memory")
    yield server.address
    server.stop()


def block(src: int, dst: int, nbytes: int) -> Batch:
    return strided(src, dst, nbytes, [], [], [])


def attached_nbytes(arena: Arena) -> int:
    """Of the address space that the arena takes, what another process's memfd is mapped to, on the kernel's word."""
    own, inodes = "", dict[str, int]()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if arena.address <= low < arena.address + arena.used_nbytes:
            inode = line.split()[4]
            inodes[inode] = inodes.get(inode, 0) + high - low
            own = inode if low == arena.address else own
    return sum(nbytes for inode, nbytes in inodes.items() if inode != own)


def test_a_frozen_arena_cannot_be_changed_by_anybody() -> None:
    with Arena(MIB) as arena:
        here = arena.place(MIB)
        tensor = arena.tensor(here, (MIB,), torch.uint8)
        tensor.fill_(7)
        fd, at = arena.region().fd, here - arena.address
        assert arena.freeze()
        assert tensor.data_ptr() == here
        assert bool((tensor == 7).all())
        tensor[0] = 9  # the owner's own page from now on
        assert arena.read(here, 2) == b"\x09\x07"
        assert os.pread(fd, 2, at) == b"\x07\x07"
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(fd, b"x", at)
        with pytest.raises(OSError, match="not permitted"):
            mmap.mmap(fd, PAGE)
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        hole = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        assert libc.fallocate(fd, hole, ctypes.c_long(0), ctypes.c_long(PAGE)) == -1
        assert ctypes.get_errno() == errno.EPERM
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(OSError, match="not permitted"):
            mmap.mmap(again, PAGE)
        os.close(again)
        with pytest.raises(HostError, match="frozen"):
            arena.allocate(1)


def test_an_arena_that_somebody_else_may_write_stays_as_it_was() -> None:
    with Arena(PAGE) as arena:
        here, fd = arena.allocate(4), arena.region().fd
        arena.write(here, b"abcd")
        with mmap.mmap(fd, PAGE):
            assert not arena.freeze()
        arena.write(here, b"efgh")
        assert os.pread(fd, 4, here - arena.address) == b"efgh"
        assert arena.region().fd == fd
        assert arena.freeze()


def test_frozen_twice_the_memfd_no_longer_stands_for_the_memory() -> None:
    with Arena(PAGE) as arena:
        arena.allocate(4)
        assert arena.freeze()
        assert arena.region().fd >= 0
        assert not arena.freeze()
        assert arena.region().fd == -1


def test_long_runs_are_mapped_and_edges_copied(reader: LocalTransport) -> None:
    nbytes = 2 * MIB
    with SourceProcess("local", [nbytes], memory="frozen") as source, Arena(4 * MIB) as arena:
        here = arena.place(nbytes)
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        part = block(source.address[0] + 100, here + 100, nbytes - 200)
        left = reader.attach(peer, part, arena)
        assert attached_nbytes(arena) == nbytes - 2 * PAGE
        assert sorted(left.run.tolist()) == [PAGE - 100, PAGE - 100]
        reader.read(peer, left, SOON)
        expected = known(0, nbytes).tobytes()[100:-100]
        assert arena.read(here + 100, nbytes - 200) == expected
        assert arena.read(here, 100) == bytes(100)
        source.kill()
        assert arena.read(here + 100, nbytes - 200) == expected
        arena.write(here + PAGE, b"mine")
        assert arena.read(here + PAGE, 4) == b"mine"
        with pytest.raises(SourceLost):
            reader.attach(peer, part, arena)


def test_what_is_written_into_attached_pages_stays_here(reader: LocalTransport) -> None:
    with SourceProcess("local", [MIB], memory="frozen") as source, Arena(2 * MIB) as arena, Arena(MIB) as other:
        here, there = arena.place(MIB), other.place(MIB)
        reader.register([arena.region(), other.region()])
        peer = reader.connect(source.description, "source", SOON)
        assert reader.attach(peer, block(source.address[0], here, MIB), arena).nbytes == 0
        arena.write(here, bytes(MIB))
        reader.read(peer, block(source.address[0], there, MIB), SOON)
        assert other.read(there, MIB) == known(0, MIB).tobytes()
        reader.read(peer, block(source.address[0], here, MIB), SOON)  # a copy over attached pages
        assert arena.read(here, MIB) == known(0, MIB).tobytes()


@pytest.mark.parametrize("memory", ["memfd", "huge", "plain"])
def test_memory_that_may_still_change_is_never_mapped(reader: LocalTransport, memory: str) -> None:
    try:
        source = SourceProcess("local", [4 * MIB], memory=memory).__enter__()
    except RuntimeError:
        pytest.skip("this kernel can't collapse pages")
    with source, Arena(4 * MIB) as arena:
        here = arena.allocate(4 * MIB, 64)
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        batch = block(source.address[0], here + (source.address[0] - here) % PAGE, 3 * MIB)
        assert reader.attach(peer, batch, arena) is batch
        assert attached_nbytes(arena) == 0
        assert arena.region().fd >= 0


@pytest.mark.parametrize(("offset", "nbytes"), [(64, MIB), (0, 255 << 10)])
def test_what_does_not_fit_pages_is_copied(reader: LocalTransport, offset: int, nbytes: int) -> None:
    with SourceProcess("local", [2 * MIB], memory="frozen") as source, Arena(3 * MIB) as arena:
        here = arena.place(2 * MIB) + offset
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        batch = block(source.address[0], here, nbytes)
        assert reader.attach(peer, batch, arena) is batch
        assert attached_nbytes(arena) == 0


def test_strided_copies_of_long_runs_are_mapped_run_by_run(reader: LocalTransport) -> None:
    with SourceProcess("local", [4 * MIB], memory="frozen") as source, Arena(4 * MIB) as arena:
        here = arena.place(2 * MIB)
        reader.register([arena.region()])
        peer = reader.connect(source.description, "source", SOON)
        batch = strided(source.address[0], here, MIB // 2, [4], [MIB], [MIB // 2])
        assert reader.attach(peer, batch, arena).nbytes == 0
        expected = known(0, 4 * MIB).reshape(4, MIB)[:, : MIB // 2].tobytes()
        assert arena.read(here, 2 * MIB) == expected


def test_an_arena_with_attached_pages_is_served_without_its_memfd(reader: LocalTransport) -> None:
    with SourceProcess("local", [MIB], memory="frozen") as source, Arena(2 * MIB) as arena, Arena(2 * MIB) as ours:
        here = arena.place(MIB)
        per_tensor = Region(here, MIB, fd=arena.region().fd, fd_offset=here - arena.address)
        reader.register([arena.region(), per_tensor])
        peer = reader.connect(source.description, "source", SOON)
        reader.attach(peer, block(source.address[0], here, MIB), arena)
        assert not arena.freeze()
        assert not arena.collapse()
        assert json.loads(reader.describe())["file"] == [-1, -1]
        third = LocalTransport(threads=1)
        with closing(third):
            landing = ours.place(MIB)
            third.register([ours.region()])
            again = third.connect(reader.describe(), "second", SOON)
            batch = block(here, landing, MIB)
            assert third.attach(again, batch, ours) is batch
            third.read(again, batch, SOON)
            assert ours.read(landing, MIB) == known(0, MIB).tobytes()


def test_a_frozen_arena_and_an_arena_that_is_still_shared_take_no_pages() -> None:
    with Arena(MIB) as arena, Arena(MIB) as other:
        here, fd = arena.place(MIB), other.region().fd
        assert not arena.attach(here, PAGE, fd, 0)
        arena.unshare()
        with pytest.raises(ValueError, match="no whole pages"):
            arena.attach(here, 100, fd, 0)
        with pytest.raises(ValueError, match="not allocated"):
            arena.attach(here + MIB, PAGE, fd, 0)
        assert not arena.attach(here, PAGE, 0x7FFF, 0)  # no such descriptor: our own page is still there
        arena.write(here, b"ok")
        with Arena(MIB) as frozen:
            at = frozen.place(MIB)
            assert frozen.freeze()
            frozen.unshare()
            assert not frozen.attach(at, PAGE, fd, 0)


def test_without_room_for_mappings_nothing_is_attached_and_pages_stay_as_they_were() -> None:
    libc = ctypes.CDLL(None)
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 1 << 18:
        pytest.skip("this host allows too many mappings to use them up")
    with Arena(MIB) as frozen, Arena(4 * MIB) as arena:
        source, here = frozen.place(MIB), arena.place(3 * MIB) + MIB
        assert frozen.freeze()
        arena.write(here, b"mine")
        arena.unshare()
        with mmap.mmap(-1, 2 * limit * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as many:
            begin = ctypes.addressof(ctypes.c_char.from_buffer(many))
            pages = range(begin, begin + len(many), 2 * PAGE)
            assert any(libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), mmap.PROT_READ) for at in pages)
            attached = arena.attach(here, MIB, frozen.region().fd, source - frozen.address)
        assert not attached
        assert arena.read(here, 4) == b"mine"
        assert arena.attach(here, MIB, frozen.region().fd, source - frozen.address)


def life(url: str, instance: str, tp: int, **changes: object) -> Life:
    values = {"url": url, "model": MODEL, "instance": instance, "parallel": Parallel(tp=tp), "config": CONFIG, **changes}
    return Life(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("registration", ["arena", "per-tensor"])
@pytest.mark.parametrize(("seed_tp", "target_tp"), [(2, 2), (2, 4), (4, 2), (1, 2)])
def test_a_load_attaches_what_it_can_and_every_byte_is_right(url: str, registration: str, seed_tp: int, target_tp: int) -> None:
    config = CONFIG.replace(registration=registration)
    with SeedProcess(life(url, "seed", seed_tp, config=config)):
        results = load_ranks(life(url, "target", target_tp, config=config))
    for result in results:
        assert result.error is None
        assert result.wrong == []
        assert result.receipt is not None
        assert result.receipt.attached_nbytes > 0.3 * result.receipt.needed_nbytes
        assert result.receipt.wire_nbytes == result.receipt.needed_nbytes
        assert result.receipt.unverified_nbytes == 0
        if (seed_tp, target_tp) == (2, 2):
            assert result.receipt.attached_nbytes > 0.9 * result.receipt.needed_nbytes


@pytest.mark.parametrize("side", ["seed", "target"])
def test_an_operator_may_turn_it_off_on_either_side(url: str, side: str) -> None:
    off = CONFIG.replace(attach=False)
    with SeedProcess(life(url, "seed", 2, config=off if side == "seed" else CONFIG)):
        (result,) = load_ranks(life(url, "target", 1, config=off if side == "target" else CONFIG))
    assert result.wrong == []
    assert result.receipt is not None
    assert result.receipt.attached_nbytes == 0


@pytest.mark.parametrize("registration", ["arena", "per-tensor"])
def test_changed_weights_are_read_from_memory_not_from_the_frozen_file(url: str, registration: str) -> None:
    config = CONFIG.replace(registration=registration)
    with SeedProcess(life(url, "seed", 2, config=config)) as seed:
        for version in (1, 2):
            seed.ask("change")
            (result,) = load_ranks(life(url, f"target{version}", 1, config=config, version=version))
            assert result.error is None
            assert result.wrong == []
            assert result.receipt is not None
            assert result.receipt.attached_nbytes == 0


def test_changed_weights_without_digests_are_the_new_ones_too(url: str) -> None:
    config = CONFIG.replace(verify="off")
    with SeedProcess(life(url, "seed", 2, config=config, digests=False)) as seed:
        seed.ask("change")
        (result,) = load_ranks(life(url, "target", 1, config=config, version=1))
        assert result.wrong == []


def test_who_attached_becomes_a_seed_for_a_third(url: str) -> None:
    second = life(url, "second", 2, ranks=(0,))
    with ExitStack() as stack:
        first = stack.enter_context(SeedProcess(life(url, "first", 2)))
        bare = BareRank.of(layout(MODEL, Parallel(tp=2), 0))
        stack.callback(bare.arena.close)
        client = stack.enter_context(CoordinatorClient(url, timeout_s=3.0))
        transports = {n: stack.enter_context(closing(t)) for n, t in open_transports(CONFIG).items()}
        rank = bare.rank(second.key, Member("second"), CONFIG, client, kept_open(transports))
        assert load(Job(rank)).attached_nbytes > 0
        first.close()
        stack.enter_context(Seed(rank))
        third = stack.enter_context(TargetProcess(life(url, "third", 2, ranks=(0,)), size=1))
        assert third.hear() == "begun"
        said = third.hear()
        assert isinstance(said, list)
        ((_, receipt, error, wrong),) = said
        assert error is None
        assert wrong == []
        assert receipt["attached_nbytes"] == 0
        assert set(receipt["sources"]) == {"second/rank 0"}


@pytest.mark.parametrize("honest", ["arena", "plain"])
def test_a_lie_in_frozen_memory_is_caught_and_read_from_another(url: str, honest: str) -> None:
    """The honest seed's bytes are attached or copied over pages of the liar."""
    with ExitStack() as stack:
        liar = BareRank.of(layout(MODEL, Parallel(), 0))
        stack.callback(liar.arena.close)
        client = stack.enter_context(CoordinatorClient(url, timeout_s=3.0))
        transport = stack.enter_context(closing(LocalTransport(threads=1)))
        for name, address in zip(liar.layout.buffer_names, liar.address.tolist(), strict=True):
            liar.arena.write(address, content(MODEL, Parallel(), 0)[name].tobytes())
        digests = digest_layout(HOST, liar.layout, liar.address)
        for address, nbytes in zip(liar.address.tolist(), liar.layout.buffer_nbytes.tolist(), strict=True):
            np.frombuffer(liar.arena.view(address, nbytes), np.uint8)[::512] ^= 4
        assert liar.arena.freeze()
        transport.register([liar.arena.region()])
        binding = Binding(
            SourceId("liar", 0, "0" * 32), liar.address, (Endpoint("local", transport.describe()),), digests=digests
        )
        me = life(url, "target", 1)
        client.announce(Offer(liar.layout, binding), me.key, ttl_s=30.0)
        stack.enter_context(SeedProcess(life(url, "honest", 1, memory=honest)))
        (result,) = load_ranks(me)
        assert result.error is None
        assert result.wrong == []
        assert result.receipt is not None
        assert result.receipt.reread_nbytes > 0
        assert result.receipt.attached_nbytes > 0
        assert result.receipt.unverified_nbytes == 0


def test_the_bytes_outlive_the_seed(url: str) -> None:
    with ExitStack() as stack:
        seed = stack.enter_context(SeedProcess(life(url, "seed", 1)))
        me = life(url, "target", 1)
        bare = BareRank.of(layout(MODEL, Parallel(), 0))
        stack.callback(bare.arena.close)
        client = stack.enter_context(CoordinatorClient(url, timeout_s=3.0))
        transports = {n: stack.enter_context(closing(t)) for n, t in open_transports(CONFIG).items()}
        rank = bare.rank(me.key, Member("target"), CONFIG, client, kept_open(transports))
        assert load(Job(rank)).attached_nbytes == bare.layout.nbytes - sum(
            n for n in bare.layout.buffer_nbytes.tolist() if n < 1 << 18
        )
        seed.kill()
        assert differences(me, bare) == []
