"""Digests, fills and copies on a GPU against those on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from gpu_support import needs_gpus

from peerload.config import Config
from peerload.deadline import Deadline
from peerload.integrity.digest import digest_boxes
from peerload.memory.arena import Arena, copy, fill
from peerload.memory.cuda.driver import Device
from peerload.memory.cuda.mover import Pinned
from peerload.memory.space import Space, space_on
from peerload.model.catalog import ITEMSIZE, Catalog, TensorSpec
from peerload.model.layout import Constant
from peerload.model.offer import FENCE_NBYTES
from peerload.planning.batch import Batch
from peerload.testing.gpu import DeviceArena
from peerload.testing.source_process import content
from peerload.testing.transport_conformance import strided
from peerload.transport.files import FileSet
from peerload.transport.registry import open_transport

pytestmark = needs_gpus()
GPU = "cuda:0"
NBYTES = 8 << 20


@pytest.fixture(scope="module")
def space() -> Space:
    return space_on(GPU)


@pytest.fixture(scope="module")
def twins() -> Iterator[tuple[Arena, int, DeviceArena, int]]:
    """The same random bytes on the host and on the GPU, with where they begin."""
    with Arena(NBYTES) as host, closing(DeviceArena(GPU, NBYTES)) as gpu:
        here, there = host.allocate(NBYTES, 4096), gpu.allocate(NBYTES, 4096)
        host.write(here, content(1, NBYTES).tobytes())
        gpu.write(there, content(1, NBYTES).tobytes())
        yield host, here, gpu, there


def random_boxes(rng: np.random.Generator) -> tuple[Catalog, list[np.ndarray]]:
    """Up to a few hundred boxes of tensors of all dtypes, dimensions in any order in memory, spread out, backwards, at odd
    addresses; addresses count from the start of memory."""
    specs, rows = [], []
    for i in range(int(rng.integers(1, 200))):
        shape = tuple(rng.integers(1, 40, int(rng.integers(0, 6))).tolist())
        while np.prod(shape) > 1 << 17:
            shape = shape[1:]
        if rng.random() < 0.3:
            shape = [(3, 2100), (70_000,), (64, 4096), (300, 700), (2, 3, 1030)][int(rng.integers(5))]
        specs.append(TensorSpec(f"t{i}", sorted(ITEMSIZE)[int(rng.integers(len(ITEMSIZE)))], shape))
    catalog = Catalog.of(specs)
    width = catalog.width
    for i, spec in enumerate(specs):
        start, stop, stride, at = np.zeros(width, np.int64), np.ones(width, np.int64), np.zeros(width, np.int64), 0
        inner, ndim = ITEMSIZE[spec.dtype], len(spec.shape)
        order = rng.permutation(ndim) if rng.random() < 0.4 else range(ndim)[::-1]
        for axis in order:
            column, size = width - ndim + axis, spec.shape[axis]
            start[column] = int(rng.integers(0, size)) if rng.random() < 0.3 else 0
            stop[column] = int(rng.integers(start[column] + 1, size + 1)) if rng.random() < 0.3 else size
            stride[column] = inner * (-1 if rng.random() < 0.1 else 1)
            extent = int(stop[column] - start[column])
            at += max(0, -int(stride[column])) * (extent - 1)
            inner *= extent * (2 if rng.random() < 0.1 else 1)
        odd = [0, 0, 16, 4, 2, 1][int(rng.integers(6))]
        room = NBYTES - inner - odd
        if room >= 0:
            rows.append((i, start, stop, at + odd + 64 * int(rng.integers(0, room // 64 + 1)), stride))
    return catalog, [np.array(column, np.int64) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_digests_equal_the_cpus(space: Space, twins, seed: int) -> None:
    _, here, _, there = twins
    catalog, (tensor, start, stop, at, stride) = random_boxes(np.random.default_rng(seed))
    expected = digest_boxes(catalog, tensor, start, stop, here + at, stride)
    assert space.digest(catalog, tensor, start, stop, there + at, stride, 0).tolist() == expected.tolist()


def test_digest_of_a_hundred_thousand_small_pieces(space: Space, twins) -> None:
    _, here, _, there = twins
    count = 100_000
    catalog = Catalog.of(TensorSpec(f"scale.{i}", "F32", (16,)) for i in range(count))
    zero = np.zeros((count, 1), np.int64)
    columns = (np.arange(count), zero, zero + 16)
    at, stride = np.arange(count) * 80, zero + 4
    expected = digest_boxes(catalog, *columns, here + at, stride)
    assert space.digest(catalog, *columns, there + at, stride, 0).tolist() == expected.tolist()


def test_digest_of_more_than_four_gigabytes(space: Space) -> None:
    """In one tensor; halves along each dimension add up, and the first rows are what the CPU says."""
    rows, columns = 40_000, 60_000
    catalog = Catalog.of([TensorSpec("w", "BF16", (rows, columns))])
    with closing(DeviceArena(GPU, rows * columns * 2)) as gpu:
        there = gpu.allocate(rows * columns * 2, 4096)
        part = content(3, 1 << 24)
        for begin in range(0, rows * columns * 2, 1 << 30):
            gpu.write(there + begin, part.tobytes())
        stride = np.array([[columns * 2, 2]])
        box = [
            [[0, 0], [rows, columns]],
            [[0, 0], [rows // 2, columns]],
            [[rows // 2, 0], [rows, columns]],
            [[0, 0], [rows, 12_345]],
            [[0, 12_345], [rows, columns]],
            [[0, 0], [100, columns]],
        ]
        start, stop = np.array(box)[:, 0], np.array(box)[:, 1]
        stride, zero = np.repeat(stride, len(box), axis=0), np.zeros(len(box), np.int64)
        found = [int(d) for d in space.digest(catalog, zero, start, stop, there + (start * stride).sum(axis=1), stride, 0)]
        prime = (1 << 61) - 1
        assert (found[1] + found[2]) % prime == found[0]
        assert (found[3] + found[4]) % prime == found[0]
        first = part[: 100 * columns * 2].copy()
        expected = digest_boxes(catalog, zero[:1], start[5:], stop[5:], np.array([first.ctypes.data]), stride[:1])
        assert found[5] == int(expected[0])


@pytest.mark.parametrize(
    "constant",
    [
        Constant(0, 6, (), (), b"\x01\x02"),
        Constant(0, 0, (100_000,), (2,), b"\x80\x3f"),
        Constant(0, 64, (37, 1000), (4000, 4), b"\x00\x00\x80\x3f"),
        Constant(0, 1, (3, 4, 5, 6, 7), (200_000, 40_000, 7_000, 1_000, 3), b"\x05"),
        Constant(0, 8, (5, 4096), (10_000, 1), b"\xff"),
        Constant(0, 0, (3, 0), (4, 4), b"\x01\x01\x01\x01"),
    ],
)
def test_fills_equal_the_cpus(space: Space, constant: Constant) -> None:
    with Arena(2 << 20) as host, closing(DeviceArena(GPU, 2 << 20)) as gpu:
        here, there = host.allocate(2 << 20, 4096), gpu.allocate(2 << 20, 4096)
        fill(constant, np.array([here]))
        space.fill(constant, np.array([there]))
        assert gpu.read(there, 2 << 20) == host.read(here, 2 << 20)


@pytest.mark.parametrize("memory", ["device", "pinned", "pageable"])
def test_copies_out_of_any_memory(space: Space, twins, memory: str) -> None:
    _, here, _, there = twins
    device = Device(GPU)
    pinned = Pinned(device, NBYTES)
    with Arena(NBYTES) as must, closing(DeviceArena(GPU, NBYTES)) as gpu:
        flat = strided(here, pinned.address, NBYTES, [], [], [])
        copy(flat)
        dst, expected = gpu.allocate(NBYTES, 4096), must.allocate(NBYTES, 4096)
        src = {"device": there, "pinned": pinned.address, "pageable": here}[memory]

        def batch(src: int, dst: int) -> Batch:
            return Batch.joined(
                strided(src + 5, dst, 1 << 20, [], [], []),
                strided(src + (1 << 20), dst + (2 << 20), 2, [100, 1000], [2, 200], [2000, 2]),
                strided(src + (4 << 20), dst + (4 << 20), 100, [500], [-300], [128]),
                strided(src, dst + (6 << 20) + 1, 2 << 20 if memory == "device" else (1 << 20) + 3, [], [], []),
            )

        copy(batch(here, expected))
        space.copy(batch(src, dst))
        assert gpu.read(dst, NBYTES - (1 << 20)) == must.read(expected, NBYTES - (1 << 20))
    pinned.close()
    device.close()


def test_more_than_the_pinned_buffer_at_once(space: Space) -> None:
    nbytes = 150 << 20
    data = content(9, nbytes)
    with closing(DeviceArena(GPU, nbytes)) as gpu:
        there = gpu.allocate(nbytes)
        space.copy(strided(data.ctypes.data, there, nbytes, [], [], []))
        assert gpu.read(there, nbytes) == data.tobytes()


def test_a_fence_is_a_regions_worth_of_device_memory(space: Space) -> None:
    fence = space.fence()
    assert fence.region().nbytes == FENCE_NBYTES
    assert fence.region().device == GPU
    fence.write(bytes(range(16)))
    with pytest.raises(ValueError, match="16"):
        fence.write(b"short")
    fence.close()
    fence.close()


def test_a_file_is_read_onto_the_gpu(tmp_path) -> None:
    nbytes = 200_000_003
    (tmp_path / "weights").write_bytes(content(2, nbytes).tobytes())
    files = FileSet.of([tmp_path / "weights"])
    with closing(open_transport("files", Config(threads=4), GPU)) as transport, closing(DeviceArena(GPU, nbytes)) as gpu:
        there = gpu.allocate(nbytes)
        transport.register([gpu.region()])
        peer = transport.connect(files.encode(), "disk", Deadline.after(20))
        transport.read(peer, strided(files.base[0], there, nbytes, [], [], []), Deadline.after(60))
        assert gpu.read(there, nbytes) == content(2, nbytes).tobytes()
