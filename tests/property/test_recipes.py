"""Recipes against arithmetic of their own in NumPy, at every legal cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peerload.engines.recipes import BLOCK, RECIPES, Rewritable, Taking, groups_of, names_of, renamed
from peerload.memory.space import HOST, digest_layout
from peerload.model.catalog import Catalog, Parallel, TensorSpec
from peerload.tracing.trace import Traced, trace_loader

BLOCKS, ONE_SCALE = RECIPES


def decoded() -> np.ndarray:
    """[256] the values of float8_e4m3fn by their bits (OCP 8-bit floating point specification, 2023)."""
    sign, exponent, mantissa = (np.arange(256) >> 7, np.arange(256) >> 3 & 15, np.arange(256) & 7)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(sign, -size, size)
    values[[127, 255]] = np.nan
    return values


VALUES = decoded()


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest float8, ties to even ones; at most 448."""
    size = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    above = np.searchsorted(VALUES[:127], size).clip(0, 126)
    below = np.maximum(above - 1, 0)
    up, down = VALUES[above] - size, size - VALUES[below]
    bits = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (bits | (np.signbit(values) << 7)).astype(np.uint8)


def blocks_oracle(bits: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block by block: the smallest power of two with which the block's values are at most 448."""
    made, out = np.empty_like(scale), np.empty_like(bits)
    for i, j in np.ndindex(*scale.shape):
        at = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        values = VALUES[bits[at]].astype(np.float32) * scale[i, j]
        most = max(float(np.abs(values).max()), float(np.float32(1e-4)))
        fraction, exponent = np.frexp(np.float32(most) / np.float32(448))
        made[i, j] = 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)
        out[at] = rounded(values / made[i, j])
    return out, made


def one_scale_oracle(bits: list[np.ndarray], scales: list[float]) -> list[np.ndarray]:
    most = np.float32(max(scales))
    halves = [(VALUES[b].astype(np.float32) * np.float32(s)).astype(np.float16) for b, s in zip(bits, scales, strict=True)]
    return [rounded(h.astype(np.float32) * (np.float32(1) / most)) for h in halves]


class Fused(nn.Module):
    """Matrices of a checkpoint, one below the other in one parameter, of each the part of one rank."""

    def __init__(self, parts: dict[str, tuple[slice, slice]], block: bool) -> None:
        super().__init__()
        self.parts, self.block = parts, block
        rows = sum(r.stop - r.start for r, _ in parts.values())
        columns = next(iter(parts.values()))[1]
        width = columns.stop - columns.start
        self.fused = nn.Module()
        self.fused.weight = nn.Parameter(torch.zeros(rows, width, dtype=torch.float8_e4m3fn), requires_grad=False)
        touched = [[-(-s.stop // BLOCK) - s.start // BLOCK for s in cut] for cut in parts.values()]
        shape = (sum(down for down, _ in touched), touched[0][1]) if block else (len(parts),)
        self.fused.weight_scale = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Names are `a.weight` and `a.weight_scale`."""
        begin = dict(
            zip(self.parts, np.cumsum([0, *(r.stop - r.start for r, _ in self.parts.values())])[:-1].tolist(), strict=True)
        )
        for name, tensor in weights:
            base, _, kind = name.partition(".")
            rows, columns = self.parts[base]
            first, height = begin[base], rows.stop - rows.start
            if kind == "weight":
                self.fused.weight.data[first : first + height].copy_(tensor[rows, columns])
            elif self.block:
                cut = slice(rows.start // BLOCK, -(-rows.stop // BLOCK)), slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
                at = -(-first // BLOCK)
                self.fused.weight_scale.data[at : at + cut[0].stop - cut[0].start].copy_(tensor[cut])
            else:
                self.fused.weight_scale.data[list(self.parts).index(base)].copy_(tensor.reshape(()))


def traced(model: Fused, weights: dict[str, Tensor]) -> Traced:
    """Traced, and then loaded."""
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    catalog = Catalog.of(TensorSpec(n, names[t.dtype], tuple(t.shape)) for n, t in weights.items())
    found = trace_loader(model, model.load_weights, catalog, parallel=Parallel(), rank=0, engine="test")
    model.load_weights(weights.items())
    return found


def group_of(found: Traced, name: str) -> Rewritable:
    (group,) = [g for g in groups_of(found, RECIPES) if g.recipe.name == name]
    return group


def digests(found: Traced, group: Rewritable, staging_nbytes: int) -> dict[int, int]:
    layout = renamed(found.layout, names_of([group]))
    pair = [found.tensors[layout.buffer_names[row]] for row in (group.weight, group.scale)]
    return group.digests(layout, *pair, HOST, staging_nbytes=staging_nbytes, threads=1)


def digests_of(found: Traced, group: Rewritable) -> dict[int, int]:
    """Of what is in memory, under the names of R."""
    layout, rows = renamed(found.layout, names_of([group])), np.array(sorted(group.rewritten))
    address = np.array([found.tensors[name].data_ptr() for name in layout.buffer_names])
    return dict(zip(rows.tolist(), digest_layout(HOST, layout, address, rows=rows).tolist(), strict=True))


def bits_of(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


#: A row of blocks at a time, some, or all.
STAGING = st.sampled_from([1, 100_000, 1 << 30])
#: What is in a block.
KINDS = ("random", "zero", "subnormal", "between 224 and 232", "all 448")


def matrix(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Blocks of all kinds."""
    random = np.random.default_rng(seed)
    bits = random.choice(np.setdiff1d(np.arange(256), (127, 255)), shape).astype(np.uint8)
    scale = (2.0 ** random.uniform(-20, 4, (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK)))).astype(np.float32)
    for i, j in np.ndindex(*scale.shape):
        at = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        kind = random.choice(KINDS)
        if kind == "zero":
            bits[at] = random.choice([0, 128])
        elif kind == "subnormal":
            bits[at] &= 0x87
        elif kind == "all 448":
            bits[at] = 126
        elif kind == "between 224 and 232":
            bits[at] &= 0x8F  # small
            bits[at][0, 0] = 118  # 224
            scale[i, j] = 2.0 ** random.integers(-9, 0) * random.uniform(1.0, 232 / 224)
    return torch.from_numpy(bits).view(torch.float8_e4m3fn), torch.from_numpy(scale)


CASES = st.tuples(
    st.integers(1, 4),  # blocks down
    st.integers(1, 3),  # blocks across
    st.sampled_from([0, 1, 64, 127]),  # rows and columns that the last block lacks
    st.integers(0, 1 << 20),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_blocks_are_as_the_oracle_says_and_have_a_right_inverse(case: tuple[int, int, int, int]) -> None:
    down, across, less, seed = case
    weight, scale = matrix((down * BLOCK - less, across * BLOCK - less), seed)
    values, made = BLOCKS.apply(weight[None], scale[None])
    bits, scales = blocks_oracle(bits_of(weight), scale.numpy())
    assert np.array_equal(made[0].numpy(), scales)
    assert np.array_equal(bits_of(values[0]), bits)
    again, same = BLOCKS.apply(values, BLOCKS.prepare(values, made))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(same, made)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(2.0**-20, 8.0, width=32), min_size=2, max_size=3), st.integers(0, 1 << 20))
def test_one_scale_is_as_the_oracle_says_and_has_a_right_inverse(scales: list[float], seed: int) -> None:
    parts = [matrix((16, 8), seed + i)[0] for i in range(len(scales))]
    found = [ONE_SCALE.apply(p[None], torch.tensor([[s, max(scales)]]))[0][0] for p, s in zip(parts, scales, strict=True)]
    for ours, theirs in zip(found, one_scale_oracle([bits_of(p) for p in parts], scales), strict=True):
        assert np.array_equal(bits_of(ours), theirs)
    prepared = ONE_SCALE.prepare(parts[0], torch.tensor(scales))
    for ours, scale in zip(found, prepared.tolist(), strict=True):
        again, _ = ONE_SCALE.apply(ours[None], torch.tensor([[scale, max(prepared.tolist())]]))
        assert torch.equal(again[0].view(torch.uint8), ours.view(torch.uint8))


def cut_evenly(blocks: int, parts: int) -> list[tuple[int, int]]:
    edges = [blocks * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 16), st.booleans(), st.sampled_from([0, 5]), st.integers(0, 1 << 20), st.sampled_from([1, 100_000, 1 << 30])
)
def test_ranks_of_any_size_have_parts_of_the_same_blocks(tp: int, by_rows: bool, less: int, seed: int, staging: int) -> None:
    """Uneven ones, too, and a last block that isn't whole. What every rank computes of its part, in chunks, is the oracle's."""
    shape = (16 * BLOCK - less, 8) if by_rows else (8, 16 * BLOCK - less)
    weight, scale = matrix(shape, seed)
    bits, scales = blocks_oracle(bits_of(weight), scale.numpy())
    made = torch.from_numpy(bits).view(torch.float8_e4m3fn), torch.from_numpy(scales)
    for first, last in cut_evenly(16, tp):
        part = slice(first * BLOCK, min(last * BLOCK, 16 * BLOCK - less))
        cut = (part, slice(0, 8)) if by_rows else (slice(0, 8), part)
        model, other = Fused({"a": cut}, block=True), Fused({"a": cut}, block=True)
        found = traced(model, {"a.weight": weight, "a.weight_scale": scale})
        group = group_of(found, BLOCKS.name)
        after = traced(other, {"a.weight": made[0], "a.weight_scale": made[1]})
        ours = digests(found, group, staging)
        assert ours == digests_of(after, group_of(after, BLOCKS.name))
        group.prepare(other.fused.weight, other.fused.weight_scale, staging)
        assert digests(after, group, staging) == ours


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(0, 1 << 20), st.sampled_from([1, 1 << 30]))
def test_what_is_fused_gets_one_scale_at_any_size(tp: int, seed: int, staging: int) -> None:
    sizes, scales = {"q": 64, "k": 16, "v": 16}, np.random.default_rng(seed).uniform(2.0**-12, 1.0, 3).astype(np.float32).tolist()
    parts = {name: matrix((rows, 32), seed + i)[0] for i, (name, rows) in enumerate(sizes.items())}
    made = dict(zip(sizes, one_scale_oracle([bits_of(p) for p in parts.values()], scales), strict=True))
    weights = {f"{n}.weight": p for n, p in parts.items()}
    own = {f"{n}.weight_scale": torch.tensor(s) for n, s in zip(sizes, scales, strict=True)}
    for rank in range(tp):
        cut = {n: (slice(rows * rank // tp, rows * (rank + 1) // tp), slice(0, 32)) for n, rows in sizes.items()}
        model, other = Fused(cut, block=False), Fused(cut, block=False)
        found = traced(model, weights | own)
        group = group_of(found, ONE_SCALE.name)
        results = {f"{n}.weight": torch.from_numpy(b).view(torch.float8_e4m3fn) for n, b in made.items()}
        after = traced(other, results | own)
        ours = digests(found, group, staging)
        assert ours == digests_of(after, group)
        group.prepare(other.fused.weight, other.fused.weight_scale, staging)
        assert other.fused.weight_scale.tolist() == [max(scales)] * 3
        assert digests(after, group, staging) == ours


@pytest.mark.parametrize(
    "cut", [(slice(0, 64), slice(0, 256)), (slice(64, 192), slice(0, 256)), (slice(0, 256), slice(0, 200))], ids=str
)
def test_a_cut_inside_a_block_is_refused(cut: tuple[slice, slice]) -> None:
    weight, scale = matrix((256, 256), 1)
    weights = {"a.weight": weight, "a.weight_scale": scale}
    assert groups_of(traced(Fused({"a": cut}, block=True), weights), RECIPES) == []


def test_a_block_that_two_matrices_share_is_refused() -> None:
    parts = {name: (slice(0, 192), slice(0, 128)) for name in "ab"}
    model = Fused(parts, block=True)
    (weight, scale), (other, its) = matrix((192, 128), 1), matrix((192, 128), 2)
    weights = {"a.weight": weight, "a.weight_scale": scale, "b.weight": other, "b.weight_scale": its}
    assert groups_of(traced(model, weights), RECIPES) == []


def test_digests_that_arrived_count_but_for_what_the_engine_has_filled_itself() -> None:
    weight, scale = matrix((2 * BLOCK, BLOCK), 1)
    found = traced(
        Fused({"a": (slice(0, 2 * BLOCK), slice(0, BLOCK))}, block=True), {"a.weight": weight, "a.weight_scale": scale}
    )
    groups = groups_of(found, RECIPES)
    arrived = dict.fromkeys(range(len(found.layout.pieces)), 7)
    as_stored = Taking.of(found, groups, frozenset(groups[0].covers))
    assert as_stored.arrived(arrived, ()) == arrived
    taken = Taking.of(found, groups, groups[0].names)
    assert taken.arrived(arrived, ()) == arrived
    assert taken.arrived(arrived, groups[0].names) == {}
