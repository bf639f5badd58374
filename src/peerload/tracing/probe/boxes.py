"""From one number per element back to boxes: the pieces of a probed layout.

Elements that follow one another along a dimension of their tensor, at a constant distance in memory, are folded into a
run, dimension by dimension from the last to the first. Where two runs claim an element the longer one keeps it, so that
equal rows are cut at equal places. A layout that shuffles finer than boxes (tiles, swizzles) takes several pieces.
Pure: NumPy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...model.boxes import BoolArray, IntArray


class Strided(NamedTuple):
    """The box of `size` from index `first` of a tensor: lies from `at`, index k of dimension d being `step[d]` further.
    Positions and steps count elements."""

    first: tuple[int, ...]
    size: tuple[int, ...]
    at: int
    step: tuple[int, ...]


def strided_boxes(element: IntArray, at: IntArray, shape: tuple[int, ...]) -> list[Strided]:
    """Boxes that put element `element[i]` (row-major number in a tensor of `shape`) at position `at[i]`, exactly and once
    each. An element at several positions is in as many boxes."""
    order = np.lexsort((at, element))
    element, at = element[order], at[order]
    copy = _occurrence(element)
    first = (
        np.stack(np.unravel_index(element, shape), axis=1).astype(np.int64) if shape else np.zeros((len(element), 0), np.int64)
    )
    size, step = np.ones_like(first), np.zeros_like(first)
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        others = [first[:, d] for d in range(len(shape)) if d != dim] + [copy]
        others += [column[:, d] for column in (size, step) for d in range(dim + 1, len(shape))]
        order = np.lexsort((first[:, dim], *others))
        first, size, step, at, copy = first[order], size[order], step[order], at[order], copy[order]
        linked = np.diff(first[:, dim]) == 1
        for other in others:
            linked &= np.diff(other[order]) == 0
        distance = np.diff(at)
        head, count = _fold(linked, distance)
        long = count > 1
        size[head, dim] = count
        step[head[long], dim] = distance[head[long]]
        first, size, step, at, copy = first[head], size[head], step[head], at[head], copy[head]
    order = np.argsort(at, kind="stable")
    rows = zip(first[order].tolist(), size[order].tolist(), at[order].tolist(), step[order].tolist(), strict=True)
    return [Strided(tuple(a), tuple(n), int(p), tuple(s)) for a, n, p, s in rows]


def _occurrence(element: IntArray) -> IntArray:
    """For each of the sorted numbers, how often it came before."""
    begins = np.concatenate([[True], np.diff(element) != 0])
    where = np.arange(len(element))
    since: IntArray = where - where[begins][np.cumsum(begins) - 1]
    return since


def _fold(linked: BoolArray, distance: IntArray) -> tuple[IntArray, IntArray]:
    """Rows into runs: linked[i] says that row i + 1 may follow row i, at distance[i]. First row and length of each run."""
    rows = len(linked) + 1
    if rows == 1:
        return np.zeros(1, np.int64), np.ones(1, np.int64)
    new = np.ones(rows - 1, np.bool_)
    new[1:] = (distance[1:] != distance[:-1]) | ~linked[1:] | ~linked[:-1]
    run = np.cumsum(new) - 1
    length = np.bincount(run)[run] * linked
    keep = linked.copy()
    # Runs that meet in a row: only one can have it.
    meet = np.flatnonzero(linked[1:] & linked[:-1] & (run[1:] != run[:-1]))
    before, after = length[meet], length[meet + 1]
    keep[meet[before < after]] = False
    keep[meet[before > after] + 1] = False
    tie = meet[before == after]
    short = tie[length[tie] == 1]
    keep[tie[length[tie] > 1] + 1] = False
    # Chains of runs of two rows: every other one keeps them.
    chain = np.cumsum(np.concatenate([[True], np.diff(short) != 1])) - 1 if len(short) else np.zeros(0, np.int64)
    place = np.arange(len(short)) - np.searchsorted(chain, chain)
    keep[short[place % 2 == 0] + 1] = False
    head = np.flatnonzero(np.concatenate([[True], ~keep]))
    return head, np.diff(np.append(head, rows))
