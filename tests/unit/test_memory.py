"""Arenas, what to register of them, and fills."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from peerload.errors import ConfigError, HostError
from peerload.memory.arena import Arena, fill
from peerload.memory.placing import Placed, placed, regions_for
from peerload.memory.region import Region
from peerload.model.layout import Constant


def test_allocations_are_aligned_disjoint_and_zero() -> None:
    with Arena(1 << 20) as arena:
        spans = [(arena.allocate(n, align), n) for n, align in [(1, 1), (100, 64), (7, 8), (5000, 4096), (0, 64), (3, 2)]]
        for (address, nbytes), align in zip(spans, [1, 64, 8, 4096, 64, 2], strict=True):
            assert address % align == 0
            assert arena.read(address, nbytes) == bytes(nbytes)
        for (a, n), (b, _) in itertools.pairwise(spans):
            assert a + n <= b
        assert arena.fence_address + 16 <= spans[0][0]


def test_an_arena_holds_what_was_asked_for_and_says_when_it_is_full() -> None:
    with Arena(4096) as arena:
        arena.allocate(4096, 4096)
        with pytest.raises(HostError, match="bytes left"):
            arena.allocate(1 << 20)


def test_memory_outside_allocations_cannot_be_viewed() -> None:
    with Arena(4096) as arena:
        address = arena.allocate(10)
        with pytest.raises(ValueError, match="not allocated"):
            arena.view(address, 11)


def test_tensors_outlive_their_arena() -> None:
    with Arena(1 << 16) as arena:
        address = arena.allocate(24)
        tensor = arena.tensor(address, (3, 4), torch.bfloat16)
        tensor.copy_(torch.arange(12).view(3, 4))
        assert arena.read(address, 24) == torch.arange(12).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        assert tensor.data_ptr() == address
    assert tensor.float().sum().item() == 66
    tensor.fill_(2)
    assert tensor.float().sum().item() == 24


def test_untouched_memory_costs_nothing() -> None:
    with Arena(1 << 34) as arena:
        arena.write(arena.allocate(5), b"hello")
        assert os.fstat(arena.region().fd).st_blocks * 512 <= 8192


def test_a_sealed_arena_keeps_its_size() -> None:
    with Arena(4096) as arena:
        arena.seal()
        with pytest.raises(PermissionError):
            os.ftruncate(arena.region().fd, 0)


def test_the_region_maps_to_the_same_bytes() -> None:
    with Arena(4096) as arena:
        address = arena.allocate(4)
        arena.write(address, b"abcd")
        region = arena.region()
        assert os.pread(region.fd, 4, region.fd_offset + address - region.address) == b"abcd"


def test_closing_twice_is_fine_and_afterwards_nothing_is_allocated() -> None:
    arena = Arena(4096)
    arena.close()
    arena.close()
    with pytest.raises(HostError):
        arena.allocate(1)


BLOCK = Region(0x10000, 0x1000, fd=7, fd_offset=0x2000)
NEXT = Region(0x11000, 0x1000)


def test_registration_per_tensor_keeps_offsets_and_joins_only_what_overlaps() -> None:
    buffers = [
        Placed(0x10100, 0x100, BLOCK),
        Placed(0x10200, 0x80, BLOCK),  # neighbours
        Placed(0x10240, 0x80, BLOCK),  # overlaps the second
        Placed(0x10F00, 0x100, BLOCK),
        Placed(0x11000, 0x100, NEXT),  # touch, but lie in two allocations
    ]
    assert regions_for(buffers, "per-tensor") == [
        Region(0x10100, 0x100, fd=7, fd_offset=0x2100),
        Region(0x10200, 0xC0, fd=7, fd_offset=0x2200),
        Region(0x10F00, 0x100, fd=7, fd_offset=0x2F00),
        Region(0x11000, 0x100),
    ]


def test_registration_per_allocation_takes_each_whole_block_once() -> None:
    buffers = [Placed(0x11010, 4, NEXT), Placed(0x10100, 0x100, BLOCK), Placed(0x10200, 0x80, BLOCK)]
    assert regions_for(buffers, "per-allocation") == [BLOCK, NEXT]


def test_registration_arena_refuses_memory_that_lies_elsewhere() -> None:
    assert regions_for([Placed(0x10100, 0x100, BLOCK), Placed(0x10200, 0x80, BLOCK)], "arena") == [BLOCK]
    with pytest.raises(ConfigError, match="2 allocations"):
        regions_for([Placed(0x10100, 0x100, BLOCK), Placed(0x11000, 0x100, NEXT)], "arena")


def test_an_unknown_registration_is_named() -> None:
    with pytest.raises(ConfigError, match="'heap'"):
        regions_for([], "heap")


def test_placed_resolves_the_storage_and_the_arena() -> None:
    storage = torch.zeros(100, dtype=torch.float32)
    view = storage[10:50].view(8, 5).t()[1:3]
    where = placed(view)
    assert where.allocation == Region(storage.data_ptr(), 400)
    assert (where.address, where.nbytes) == (storage.data_ptr() + 44, (7 * 5 + 1) * 4 + 4)
    with Arena(4096) as arena:
        inside = arena.tensor(arena.allocate(16), (4,), torch.float32)
        assert placed(inside, [arena]).allocation == arena.region()
        assert placed(storage, [arena]).allocation.fd == -1


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("contiguous", [True, False])
def test_fill_writes_its_pattern_and_nothing_else(itemsize: int, contiguous: bool) -> None:
    room = np.full((4, 6, itemsize), 9, np.uint8)
    view = room[1:3, :, :] if contiguous else room[1:3, ::-2, :]
    pattern = bytes(range(1, itemsize + 1))
    strides = tuple(view.strides[:2])
    constant = Constant(1, view.ctypes.data - room.ctypes.data, view.shape[:2], strides, pattern)
    fill(constant, np.array([0, room.ctypes.data], np.int64))
    expected = np.full((4, 6, itemsize), 9, np.uint8)
    (expected[1:3] if contiguous else expected[1:3, ::-2])[:] = np.frombuffer(pattern, np.uint8)
    assert np.array_equal(room, expected)
