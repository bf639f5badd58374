"""Batches, and the C code that carries them out, against an oracle that moves byte by byte."""

from __future__ import annotations

import itertools
import os
import tempfile

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.model.boxes import byte_extents
from peerload.native.columns import Columns
from peerload.planning.batch import LEVELS, Batch
from peerload.testing.transport_conformance import strided
from peerload.transport.threads import CHUNK_NBYTES, chunked

Bytes = npt.NDArray[np.uint8]
ROOM = 1 << 16


def oracle(batch: Batch) -> list[tuple[int, int]]:
    """(source byte, destination byte) for every byte, in order."""
    moves = []
    for i in range(len(batch)):
        for index in np.ndindex(*batch.count[i].tolist()):
            src = int(batch.src[i] + (batch.src_step[i] * index).sum())
            dst = int(batch.dst[i] + (batch.dst_step[i] * index).sum())
            moves += [(src + k, dst + k) for k in range(int(batch.run[i]))]
    return moves


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows with any steps at the source, and destinations that never overlap: a dense block for each row, its levels in
    any order and any direction. Addresses count from 0."""
    rows, top = [], 0
    for _ in range(draw(st.integers(0, 4))):
        run = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 100, 511, 512, 2048, 3000]))
        count = draw(st.lists(st.integers(1, 6 if run > 16 else 9), min_size=LEVELS, max_size=LEVELS))
        gap = draw(st.integers(0, 5))
        step, dst_step, dst = run + gap, [0] * LEVELS, top
        for level in draw(st.permutations(range(LEVELS))):
            sign = draw(st.sampled_from([1, -1]))
            dst_step[level] = sign * step
            dst += (count[level] - 1) * step if sign < 0 else 0
            step *= count[level]
        natural = [run * count[1] * count[2], run * count[2], run]
        src_step = draw(
            st.one_of(
                st.just(natural),
                st.permutations(natural),
                st.lists(st.integers(-300, 300), min_size=LEVELS, max_size=LEVELS),
            )
        )
        low, high = byte_extents(np.zeros(1, np.int64), np.array([count]), np.array([src_step]), np.array([run]))
        span = int(high[0] - low[0])
        if span > ROOM or top + step > ROOM:
            continue
        rows.append(strided(draw(st.integers(0, ROOM - span)) - int(low[0]), dst, run, count, src_step, dst_step))
        top += step
    if not rows:
        return Batch.of_runs(*(np.zeros(0, np.int64),) * 3)
    return Batch(*(np.concatenate([getattr(row, name) for row in rows]) for name in Batch.__slots__))


def expected(batch: Batch, source: Bytes) -> Bytes:
    result = np.full(ROOM, 0xEE, np.uint8)
    for src, dst in oracle(batch):
        result[dst] = source[src]
    return result


def moved(batch: Batch, src: int, dst: int) -> Batch:
    return Batch(batch.src + src, batch.dst + dst, batch.run, batch.count, batch.src_step, batch.dst_step)


SOURCE = np.random.default_rng(5).integers(0, 256, ROOM, np.uint8)


@settings(deadline=None)
@given(batches())
def test_runs_are_what_the_columns_say(batch: Batch) -> None:
    src, dst, run = batch.runs()
    one_by_one = [(s + k, d + k) for s, d, n in zip(src.tolist(), dst.tolist(), run.tolist(), strict=True) for k in range(n)]
    assert one_by_one == oracle(batch)
    assert (batch.operations, batch.nbytes) == (len(run), int(run.sum()))


@settings(deadline=None)
@given(batches(), st.integers(40, 5000))
def test_cutting_keeps_every_byte_and_the_limit(batch: Batch, nbytes: int) -> None:
    cut, owner = batch.cut(nbytes)
    assert sorted(oracle(cut)) == sorted(oracle(batch))
    assert (cut.run * cut.count.prod(axis=1) <= nbytes).all()
    for i in range(len(batch)):
        assert sorted(oracle(cut.take(owner == i))) == sorted(oracle(batch.take(slice(i, i + 1))))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_copies_within_a_process(batch: Batch) -> None:
    here = np.full(ROOM, 0xEE, np.uint8)
    Columns(moved(batch, SOURCE.ctypes.data, here.ctypes.data)).copy(0, len(batch))
    assert np.array_equal(here, expected(batch, SOURCE))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_reads_out_of_a_process(batch: Batch) -> None:
    here = np.full(ROOM, 0xEE, np.uint8)
    columns = Columns(moved(batch, SOURCE.ctypes.data, here.ctypes.data))
    assert columns.read_process(os.getpid(), 0, len(batch)) == (0, batch.nbytes)
    assert np.array_equal(here, expected(batch, SOURCE))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_reads_out_of_a_file(batch: Batch) -> None:
    here = np.full(ROOM, 0xEE, np.uint8)
    with tempfile.TemporaryFile() as file:
        file.write(SOURCE.tobytes())
        file.flush()
        columns = Columns(moved(batch, 0, here.ctypes.data))
        assert columns.read_file(file.fileno(), 0, len(batch)) == (0, batch.nbytes)
    assert np.array_equal(here, expected(batch, SOURCE))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_large_transposes_take_all_ways(itemsize: int) -> None:
    """Larger than scratch memory, so that rows are halved, and larger than what stays in the cache."""
    rows, columns = 900, 1300
    there = np.random.default_rng(6).integers(0, 256, rows * columns * itemsize, np.uint8)
    want = there.reshape(rows, columns, itemsize).transpose(1, 0, 2).tobytes()
    batch = strided(0, 0, itemsize, [columns, rows], [itemsize, columns * itemsize], [rows * itemsize, itemsize])
    with tempfile.TemporaryFile() as file:
        file.write(there.tobytes())
        file.flush()
        for way in ("copy", "process", "file"):
            here = np.zeros(there.size, np.uint8)
            it = Columns(moved(batch, 0 if way == "file" else there.ctypes.data, here.ctypes.data))
            if way == "copy":
                it.copy(0, 1)
            elif way == "process":
                assert it.read_process(os.getpid(), 0, 1) == (0, there.size)
            else:
                assert it.read_file(file.fileno(), 0, 1) == (0, there.size)
            assert here.tobytes() == want, way


def test_a_file_that_ends_too_early_tells_how_much_landed() -> None:
    here = np.zeros(5000, np.uint8)
    with tempfile.TemporaryFile() as file:
        file.write(SOURCE[:3000].tobytes())
        file.flush()
        batch = Batch.of_runs(
            *(np.array(c, np.int64) for c in ([0, 2500], [here.ctypes.data, here.ctypes.data + 2500], [2500, 2500]))
        )
        error, done = Columns(batch).read_file(file.fileno(), 0, 2)
    assert (os.strerror(error), done) == ("No data available", 3000)
    assert np.array_equal(here[:3000], SOURCE[:3000])


def test_an_address_that_is_not_mapped_is_an_error_not_a_crash() -> None:
    here = np.zeros(100, np.uint8)
    batch = Batch.of_runs(*(np.array([c], np.int64) for c in (4096, here.ctypes.data, 100)))
    error, done = Columns(batch).read_process(os.getpid(), 0, 1)
    assert (os.strerror(error), done) == ("Bad address", 0)


def test_columns_of_different_lengths_are_refused() -> None:
    column = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="length"):
        Columns(Batch.of_runs(column, column[:1], column))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * CHUNK_NBYTES), st.integers(0, 2)), max_size=8))
def test_chunks_cover_all_rows_of_one_key_each(rows: list[tuple[int, int]]) -> None:
    run = np.array([n for n, _ in rows], np.int64)
    key = np.array([k for _, k in rows], np.int64)
    at = np.cumsum(run) - run
    cut, keys, edges = chunked(Batch.of_runs(at, at, run), key)
    assert edges[0] == 0
    assert edges[-1] == len(cut)
    for a, b in itertools.pairwise(edges):
        assert a < b
        assert len(set(keys[a:b].tolist())) == 1
        assert int(cut.run[a:b].sum()) < 2 * CHUNK_NBYTES
    assert cut.nbytes == int(run.sum())
    for i, k in enumerate(key.tolist()):
        inside = (cut.src >= at[i]) & (cut.src < at[i] + run[i])
        assert (keys[inside] == k).all()
