"""Verdicts against a dumb judge that tries every subset of the measured boxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.integrity.claims import Claims, Measured
from peerload.integrity.digest import PRIME
from peerload.integrity.tiling import dense
from peerload.integrity.verdict import State, compare
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, TensorSpec
from peerload.model.offer import SourceId

SHAPE = (3, 4)
CATALOG = Catalog.of([TensorSpec("a", "U8", SHAPE), TensorSpec("b", "U8", SHAPE)])
ELEMENTS = np.random.default_rng(2).integers(0, PRIME, (2, *SHAPE), np.uint64).astype(object)

Placed = tuple[int, Box]


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    start = tuple(draw(st.integers(0, n - 1)) for n in SHAPE)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, SHAPE, strict=True))
    return draw(st.integers(0, 1)), Box(start, stop)


@st.composite
def split(draw: st.DrawFn) -> list[Placed]:
    """A tiling of a box, perhaps with a part missing, so that tilings are common."""
    tensor, box = draw(placed())
    parts = [box]
    for _ in range(draw(st.integers(0, 4))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axes = [a for a, n in enumerate(part.shape) if n > 1]
        if axes:
            axis = draw(st.sampled_from(axes))
            at = draw(st.integers(part.start[axis] + 1, part.stop[axis] - 1))
            parts += [
                Box(part.start, (*part.stop[:axis], at, *part.stop[axis + 1 :])),
                Box((*part.start[:axis], at, *part.start[axis + 1 :]), part.stop),
            ]
        else:
            parts.append(part)
    return [(tensor, box)] + [(tensor, p) for p in parts[draw(st.integers(0, 1)) :]]


def total(where: Placed) -> int:
    return int(ELEMENTS[where[0]][where[1].slices()].sum()) % PRIME


def arrays(boxes: Sequence[Placed]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def corner(name: str) -> np.ndarray:
        return np.array([getattr(b, name) for _, b in boxes], np.int64).reshape(-1, 2)

    return np.array([t for t, _ in boxes], np.int64), corner("start"), corner("stop")


def tiles(target: Placed, boxes: Sequence[Placed]) -> bool:
    if any(t != target[0] for t, _ in boxes):
        return False
    count = np.zeros(SHAPE, int)
    for _, box in boxes:
        count[box.slices()] += 1
    wanted = np.zeros(SHAPE, int)
    wanted[target[1].slices()] = 1
    return np.array_equal(count, wanted)


def ask(claimed: Sequence[Placed], held: Sequence[Placed], damage: int | None = None) -> list[State]:
    digest = np.array([total(b) for b in held], np.uint64)
    if damage is not None:
        digest[damage] = (int(digest[damage]) + 1) % PRIME
    zeros = np.zeros(len(held), np.int64)
    announced = np.array([total(b) for b in claimed], np.uint64)
    said = Claims(CATALOG, *arrays(claimed), announced, np.zeros(len(claimed), np.int64), ("s",))
    verdict = compare(said, Measured(CATALOG, np.arange(len(held)), *arrays(held), digest, zeros, (SourceId("s", 0, "1"),)))
    assert bool(verdict.mismatches or verdict.contradictions) == (State.WRONG in verdict.state)
    return [State(s) for s in verdict.state.tolist()]


@given(st.lists(split(), min_size=1, max_size=3), st.lists(placed(), max_size=2), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_proven_is_exactly_what_some_tiling_of_a_claim_contains(splits, loose, random) -> None:
    claimed = [s[0] for s in splits]
    held = [*{b: None for s in splits for b in s[1:]}, *loose][:9]
    random.shuffle(held)
    distinct = list(dict.fromkeys(held))
    expected = {
        box
        for size in range(1, len(distinct) + 1)
        for some in itertools.combinations(distinct, size)
        if any(tiles(claim, some) for claim in claimed)
        for box in some
    }
    assert ask(claimed, held) == [State.PROVEN if b in expected else State.UNPROVEN for b in held]


@given(split(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_part_of_the_only_tiling_is_wrong(parts, data) -> None:
    claim, held = parts[0], parts[1:]
    if not held or not tiles(claim, held):
        return
    states = ask([claim], held, data.draw(st.integers(0, len(held) - 1)))
    assert states == [State.WRONG] * len(held)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 3), st.integers(0, 1 << 40)), min_size=1, max_size=30))
def test_dense_numbers_distinct_rows_in_order(rows) -> None:
    numbers = dense(*np.array(rows, np.int64).T)
    order = sorted(set(rows))
    assert numbers.tolist() == [order.index(r) for r in rows]
