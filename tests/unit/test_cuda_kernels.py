"""The GPU's kernels without a GPU: the same source, built by the C++ compiler of this host with blocks of one thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.integrity.digest import digest_boxes, fold, tensor_keys
from peerload.memory.arena import copy
from peerload.memory.cuda import kernels
from peerload.memory.cuda.tables import TableRows
from peerload.model.catalog import ITEMSIZE, Catalog, TensorSpec
from peerload.native.tables import CopyRows, DigestRows
from peerload.planning.batch import Batch
from peerload.testing.transport_conformance import strided

#: What a GPU's compiler gives and a host's doesn't.
PRELUDE = """
#include <cstdint>
#define LANES 1
#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __syncthreads()
#define __shfl_xor_sync(mask, value, lane) (value)
struct uint4 { unsigned x, y, z, w; };
struct place { unsigned x; };
static const place threadIdx = {0}, blockIdx = {0}, blockDim = {1}, gridDim = {1};
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{ return (unsigned long long)((unsigned __int128)a * b >> 64); }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    unsigned long long from = (unsigned long long)y << 32 | x, out = 0;
    for (int i = 0; i < 4; i++)
        out |= (from >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return (unsigned)out;
}
static void atomicAdd(unsigned long long *to, unsigned long long value) { *to += value; }
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build kernels.cu for this host")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cc").write_text(PRELUDE + kernels.source())
    flags = ["-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-fwrapv", "-fno-strict-aliasing"]
    subprocess.run(["g++", *flags, "-o", folder / "kernels.so", folder / "kernels.cc"], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(kernel, rows: TableRows, *out: np.ndarray, room: int = 5) -> int:
    """In tables of at most `room` rows; returns how many rows there were."""
    table, total = np.zeros(room * rows.row_nbytes, np.uint8), 0
    while True:
        _, count, tiles = rows.fill(table.ctypes.data, room, 1 << 20)
        if count == 0:
            return total
        assert count <= room
        total += count
        counts = [ctypes.c_uint32(count), ctypes.c_uint32(tiles)]
        kernel(ctypes.c_void_p(table.ctypes.data), *counts, *(ctypes.c_void_p(a.ctypes.data) for a in out))


def aligned(nbytes: int) -> np.ndarray:
    """Zeros from an address that is a multiple of 64."""
    raw = np.zeros(nbytes + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:nbytes]


def check_copy(built: ctypes.CDLL, batch: Batch, dst: np.ndarray) -> int:
    """The kernel against the C helper that copies on a CPU, the bytes between the copies included."""
    dst[:] = 0xA5
    copy(batch)
    expected = dst.copy()
    dst[:] = 0xA5
    rows = run(built.peerload_copy, CopyRows(batch))
    assert np.array_equal(dst, expected)
    return rows


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_copies_of_any_shape(built: ctypes.CDLL, data: st.DataObject) -> None:
    src, dst = aligned(1 << 18), aligned(1 << 18)
    src[:] = np.random.default_rng(1).integers(0, 256, src.size, np.uint8)
    parts, used = [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        grain = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 48]))
        count = [data.draw(st.integers(1, 6)) for _ in range(3)]
        length = grain * data.draw(st.integers(1, 40))
        gap = data.draw(st.sampled_from([0, 0, grain]))
        step = (length + gap) * np.append(np.cumprod(count[:0:-1])[::-1], 1)
        forth = [int(s) * data.draw(st.sampled_from([1, 1, -1])) for s in step]
        back = data.draw(st.permutations(range(3)))
        there = src.ctypes.data + sum((n - 1) * max(0, -s) for n, s in zip(count, forth, strict=True))
        there += data.draw(st.sampled_from([0, 0, grain, 1, 7]))
        room = length * int(np.prod(count))
        at = dst.ctypes.data + used + data.draw(st.sampled_from([0, 0, 1, 5]))
        used += room + 16
        # Destinations dense, with the levels in another order.
        dense, inner = [0, 0, 0], length
        for level in back:
            dense[level], inner = inner, inner * count[level]
        if used < dst.size and int(step[0]) * count[0] + 64 < src.size:
            parts.append(strided(there, at, length, count, forth, dense))
    if parts:
        check_copy(built, Batch.joined(*parts), dst)


def test_long_runs_are_peeled(built: ctypes.CDLL) -> None:
    src, dst = aligned(1 << 20), aligned(1 << 20)
    src[:] = np.random.default_rng(2).integers(0, 256, src.size, np.uint8)
    for ahead, behind, nbytes, parts in [
        (0, 0, 1 << 19, 1),
        (3, 3, 70_001, 3),
        (3, 19, 70_000, 3),
        (3, 4, 70_001, 1),
        (15, 31, 257, 2),
        (1, 1, 256, 3),
    ]:
        batch = strided(src.ctypes.data + ahead, dst.ctypes.data + behind, nbytes, [], [], [])
        assert check_copy(built, batch, dst) == parts


def test_no_copies_at_all() -> None:
    address = aligned(3 * CopyRows.row_nbytes).ctypes.data
    assert CopyRows(Batch.of_runs(*(np.zeros(0, np.int64),) * 3)).fill(address, 3, 1) == (0, 0, 0)
    assert CopyRows(Batch.of_runs(*(np.zeros(5, np.int64),) * 3)).fill(address, 3, 1) == (0, 0, 0)


def check_digest(built: ctypes.CDLL, catalog: Catalog, columns: tuple[np.ndarray, ...]) -> None:
    tensor, start, stop, address, stride = columns
    expected = digest_boxes(catalog, *columns, threads=1)
    slot = np.arange(len(tensor))
    boxes = DigestRows(tensor_keys(catalog), catalog.shape, catalog.itemsize, slot, tensor, start, stop, address, stride)
    sums = np.zeros((len(tensor), 2), np.uint64)
    run(built.peerload_digest, boxes, sums)
    assert fold(sums[:, 0], sums[:, 1]).tolist() == expected.tolist()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_digests_of_any_boxes_anywhere(built: ctypes.CDLL, data: st.DataObject) -> None:
    """Boxes of several tensors in one table: dimensions in any order in memory, spread out, backwards, at odd addresses."""
    raw = aligned(1 << 18)
    raw[:] = np.random.default_rng(3).integers(0, 256, raw.size, np.uint8)
    shapes = st.lists(st.integers(1, 9), max_size=5).map(tuple) | st.sampled_from(
        [(3, 2100), (5000,), (2, 3, 1030), (64, 4096), (16, 6, 512)]
    )
    specs, rows = [], []
    for i in range(data.draw(st.integers(1, 4))):
        shape, dtype = data.draw(shapes), data.draw(st.sampled_from(sorted(ITEMSIZE)))
        if not shape or np.prod(shape) * ITEMSIZE[dtype] < raw.size // 8:
            specs.append(TensorSpec(f"t{i}", dtype, shape))
    if not specs:
        return
    catalog = Catalog.of(specs)
    width = catalog.width
    for i, spec in enumerate(specs):
        start, stop, stride, at = np.zeros(width, np.int64), np.ones(width, np.int64), np.zeros(width, np.int64), 0
        inner = ITEMSIZE[spec.dtype]
        ndim = len(spec.shape)
        for axis in data.draw(st.permutations(range(ndim)) | st.just(range(ndim)[::-1])):
            column = width - ndim + axis
            start[column] = data.draw(st.sampled_from([0, 0, spec.shape[axis] - 1, spec.shape[axis] // 2]))
            stop[column] = data.draw(st.sampled_from([spec.shape[axis], spec.shape[axis], int(start[column]) + 1]))
            stride[column] = inner * data.draw(st.sampled_from([1, 1, 1, -1]))
            extent = int(stop[column] - start[column])
            at += max(0, -int(stride[column])) * (extent - 1)
            inner *= extent * data.draw(st.sampled_from([1, 1, 1, 2]))
        if inner + 32 < raw.size:
            rows.append((i, start, stop, raw.ctypes.data + at + data.draw(st.sampled_from([0, 0, 16, 4, 3])), stride))
    if rows:
        check_digest(built, catalog, tuple(np.array(column, np.int64) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 2048), (3, 40_000), (300, 256), (40, 260), (1000, 16), (64, 7168), (36, 9248)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_digests_of_shards(built: ctypes.CDLL, rows: int, columns: int, transposed: bool) -> None:
    """The right half of every row of a matrix, dense in memory, at an aligned address and at an odd one."""
    raw = aligned(rows * columns + 64)
    raw[:] = np.random.default_rng(4).integers(0, 256, raw.size, np.uint8)
    for dtype in ("F8_E4M3", "BF16", "F64"):
        size = ITEMSIZE[dtype]
        catalog = Catalog.of([TensorSpec("w", dtype, (rows, columns // size))])
        half = columns // size // 2
        start, stop = np.array([[0, half]]), np.array([[rows, 2 * half]])
        stride = np.array([[size, rows * size] if transposed else [half * size, size]])
        for odd in (0, 4, 1):
            check_digest(built, catalog, (np.zeros(1, np.int64), start, stop, np.array([raw.ctypes.data + odd]), stride))
