from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.errors import ManifestError
from peerload.geometry import Box, IntArray, byte_extents, disjoint_bytes, first_overlap, injective, pad_left, volumes

steady = settings(deadline=None, derandomize=True)


@st.composite
def boxes(draw: st.DrawFn, ndim: int, extent: int = 5) -> Box:
    start = [draw(st.integers(0, extent - 1)) for _ in range(ndim)]
    return Box(tuple(start), tuple(draw(st.integers(a + 1, extent)) for a in start))


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*map(range, box.start, box.stop)))


@pytest.mark.parametrize(("start", "stop"), [((0,), (0,)), ((2,), (1,)), ((-1,), (1,)), ((0,), (1, 1))])
def test_empty_negative_and_crooked_boxes_do_not_exist(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"range|dimensions"):
        Box(start, stop)


def test_a_scalar_is_the_box_without_dimensions() -> None:
    scalar = Box((), ())
    assert scalar.volume == 1
    assert scalar.intersect(scalar) == scalar
    assert scalar.contains(scalar)
    assert scalar.subtract(scalar) == []


def test_a_box_reads_like_a_slice() -> None:
    box = Box((1, 0), (3, 4))
    assert str(box) == "[1:3, 0:4]"
    assert np.arange(20).reshape(4, 5)[box.slices()].shape == box.shape == (2, 4)


@steady
@given(st.data(), st.integers(0, 3))
def test_boxes_behave_as_sets_of_cells(data: st.DataObject, ndim: int) -> None:
    a, b = data.draw(boxes(ndim)), data.draw(boxes(ndim))
    common = a.intersect(b)
    assert (cells(common) if common else set()) == cells(a) & cells(b)
    assert a.contains(b) == (cells(b) <= cells(a))
    assert a.volume == len(cells(a))
    rest = a.subtract(b)
    assert set().union(*map(cells, rest)) == cells(a) - cells(b)
    assert sum(r.volume for r in rest) == len(cells(a) - cells(b))
    assert len(rest) <= 2 * max(1, ndim)


@steady
@given(st.data(), st.integers(1, 3), st.integers(0, 6))
def test_columns_agree_with_boxes(data: st.DataObject, ndim: int, n: int) -> None:
    rows = [data.draw(boxes(ndim)) for _ in range(n)]
    group = np.array([data.draw(st.integers(0, 1)) for _ in rows], np.int64)
    start = np.array([r.start for r in rows], np.int64).reshape(n, ndim)
    stop = np.array([r.stop for r in rows], np.int64).reshape(n, ndim)
    assert volumes(start, stop).tolist() == [r.volume for r in rows]
    pairs = {(i, j) for i in range(n) for j in range(n) if i != j and group[i] == group[j] and rows[i].intersect(rows[j])}
    found = first_overlap(group, start, stop)
    assert (found is None) == (not pairs)
    assert found is None or found in pairs
    wide = pad_left(start, ndim + 2, 0)
    assert wide.shape == (n, ndim + 2)
    assert not wide[:, :2].any()


def interleaved(n: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Rows of n single bytes that never meet, though no stride is a multiple of the other."""
    return np.array([0, 1, 2]), np.array([[n]] * 3), np.array([[8], [12], [12]]), np.ones(3, np.int64)


def test_rows_without_a_common_lattice_are_compared_run_by_run_within_bounds() -> None:
    offset, shape, stride, itemsize = interleaved(1 << 18)
    assert disjoint_bytes(offset, shape, stride, itemsize) is None
    offset[2] -= 1
    assert set(disjoint_bytes(offset, shape, stride, itemsize) or ()) == {1, 2}
    begun_s = time.monotonic()
    with pytest.raises(ManifestError, match="at most 4194304 can be compared"):
        disjoint_bytes(*interleaved(1 << 30))
    assert time.monotonic() - begun_s < 1


def touched(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> list[int]:
    starts = [offset + sum(k * s for k, s in zip(i, stride, strict=True)) for i in itertools.product(*map(range, shape))]
    return [at + byte for at in starts for byte in range(itemsize)]


strided = st.integers(1, 3).flatmap(
    lambda ndim: st.tuples(
        st.integers(0, 40),
        st.tuples(*[st.integers(1, 4)] * ndim),
        st.tuples(*[st.integers(-12, 12)] * ndim),
        st.sampled_from([1, 2, 4]),
    )
)


@steady
@given(strided)
def test_extents_and_injectivity_against_every_byte(row: tuple[int, tuple[int, ...], tuple[int, ...], int]) -> None:
    offset, shape, stride, itemsize = row
    every = touched(*row)
    columns = (np.array([offset]), np.array([shape]), np.array([stride]), np.array([itemsize]))
    low, high = byte_extents(*columns)
    assert (int(low[0]), int(high[0])) == (min(every), max(every) + 1)
    if injective(*columns[1:])[0]:  # a promise, not a characterisation: it may say no to a layout that is
        assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("shape", "stride", "good"),
    [
        ((3, 4), (16, 4), True),
        ((3, 4), (4, 12), True),  # transposed
        ((3, 4), (-20, 4), True),  # pitched, upside down
        ((3, 4), (0, 4), False),  # broadcast
        ((3, 4), (12, 4), False),  # rows run into each other
        ((1, 4), (0, 4), True),
        ((3, 4), (16, 2), False),  # elements run into each other
    ],
)
def test_strides_that_fold_onto_themselves(shape: tuple[int, ...], stride: tuple[int, ...], good: bool) -> None:
    assert injective(np.array([shape]), np.array([stride]), np.array([4]))[0] == good


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 60), st.permutations((0, 1)), st.booleans(), st.sampled_from([1, 2])), max_size=4))
def test_shared_bytes_are_found_also_between_interleaved_rows(rows: list[tuple[int, tuple[int, ...], bool, int]]) -> None:
    shape = np.array([np.array((3, 2))[list(order)] for _, order, _, _ in rows], np.int64).reshape(-1, 2)
    steps = [np.array((12, size * (2 if pitched else 1)))[list(order)] for _, order, pitched, size in rows]
    stride = np.array(steps, np.int64).reshape(-1, 2)
    offset, itemsize = (np.array([r[i] for r in rows], np.int64) for i in (0, 3))
    sets = [
        set(touched(o, tuple(s), tuple(t), i))
        for o, s, t, i in zip(offset.tolist(), shape.tolist(), stride.tolist(), itemsize.tolist(), strict=True)
    ]
    pairs = {frozenset((i, j)) for i in range(len(rows)) for j in range(i) if sets[i] & sets[j]}
    found = disjoint_bytes(offset, shape, stride, itemsize)
    assert (found is None) == (not pairs)
    assert found is None or frozenset(found) in pairs
