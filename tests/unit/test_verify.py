"""Verdicts, over real memory: seeds hash what they hold, ranks hash what they received, and all agree on what is proven."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.errors import VerifyError
from peerload.integrity.claims import Claims, Measured
from peerload.integrity.digest import PRIME, digest_boxes
from peerload.integrity.verdict import State, Verdict, compare
from peerload.memory.space import HOST, digest_layout
from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import ITEMSIZE, Catalog, Parallel, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.model.offer import Binding, Offer, SourceId
from peerload.planning.plan import Plan, make_plan
from peerload.receipt import Read, Receipt
from peerload.testing.layouts import Model, Storing, layouts, tiny_deepseek, tiny_llama, tiny_qwen3_moe

Tensors = Mapping[str, np.ndarray]


def random_tensors(catalog: Catalog, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    tensors = {}
    for spec in catalog:
        kind = kinds[ITEMSIZE[spec.dtype]]
        tensors[spec.name] = rng.integers(0, np.iinfo(kind).max, spec.shape, kind, endpoint=True)
    return tensors


def contains(box: Box, index: tuple[int, ...]) -> bool:
    return all(a <= i < b for a, i, b in zip(box.start, index, box.stop, strict=True))


class Process:
    """Buffers of one rank, every piece filled from the logical tensors."""

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        self.layout = layout
        self.buffers = [np.zeros(int(n), np.uint8) for n in layout.buffer_nbytes]
        self.address = np.array([b.ctypes.data for b in self.buffers], np.int64)
        for row in range(len(layout.pieces)):
            self.piece(row)[...] = tensors[layout.tensor_of(row).name][(*layout.box_of(row).slices(), ...)]

    def piece(self, row: int) -> np.ndarray:
        pieces, box = self.layout.pieces, self.layout.box_of(row)
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[ITEMSIZE[self.layout.tensor_of(row).dtype]]
        strides = pieces.stride[row, pieces.stride.shape[1] - len(box.start) :].tolist()
        return np.ndarray(box.shape, kind, self.buffers[pieces.buffer[row]].data, int(pieces.offset[row]), strides)

    def flip(self, tensor: str, index: tuple[int, ...]) -> None:
        """One bit of the element at a global index, wherever this rank holds it."""
        hit = False
        for row in range(len(self.layout.pieces)):
            box = self.layout.box_of(row)
            if self.layout.tensor_of(row).name == tensor and contains(box, index):
                self.piece(row)[tuple(i - a for i, a in zip(index, box.start, strict=True))] ^= 1
                hit = True
        assert hit, "this rank does not hold that element"

    def offer(self, instance: str = "seed") -> Offer:
        source = SourceId(instance, self.layout.rank, "1")
        return Offer(
            self.layout, Binding(source, self.address, (), digests=digest_layout(HOST, self.layout, self.address, threads=1))
        )


def instance(model: Model, parallel: Parallel, tensors: Tensors) -> list[Process]:
    return [Process(made, tensors) for made in layouts(model, parallel)]


def measure(process: Process, plan: Plan) -> Measured:
    """What `process` holds where `plan` wrote, through the bytes that ranks exchange."""
    rows = plan.wants.piece[plan.want]
    pieces = process.layout.pieces
    stride, tensor = pieces.stride[rows], pieces.tensor[rows]
    where = process.address[pieces.buffer[rows]] + pieces.offset[rows] + ((plan.start - pieces.start[rows]) * stride).sum(axis=1)
    digest = digest_boxes(process.layout.catalog, tensor, plan.start, plan.stop, where, stride, threads=1)
    catalog, rank = process.layout.catalog, np.full(len(rows), process.layout.rank)
    names = tuple(o.source for o in plan.offers)
    found = Measured(catalog, rank, process.layout.pieces.tensor[rows], plan.start, plan.stop, digest, plan.offer, names)
    return Measured.decode(found.encode(), catalog)


def judge(seeds: Sequence[Process], targets: Sequence[Process], offers: Sequence[Offer] | None = None) -> Verdict:
    offers = offers or [s.offer() for s in seeds]
    plans = [make_plan(t.layout, offers, salt=str(t.layout.rank)) for t in targets]
    measured = Measured.join([measure(t, p) for t, p in zip(targets, plans, strict=True)])
    return compare(Claims.of(targets[0].layout.catalog, offers), measured)


LLAMA = tiny_llama()
TENSORS = {model.name: random_tensors(layouts(model)[0].catalog) for model in (LLAMA,)}
SIZES = [(2, 4), (4, 2), (1, 2), (2, 1), (2, 3), (3, 2), (1, 4), (4, 4), (3, 4), (2, 16)]


@pytest.mark.parametrize(("seed_tp", "target_tp"), SIZES)
def test_all_that_arrived_intact_is_proven_between_any_two_sizes(seed_tp: int, target_tp: int) -> None:
    tensors = TENSORS[LLAMA.name]
    targets = instance(LLAMA, Parallel(tp=target_tp), tensors)
    verdict = judge(instance(LLAMA, Parallel(tp=seed_tp), tensors), targets)
    assert not verdict.mismatches
    assert not verdict.contradictions
    assert (verdict.state == State.PROVEN).all()
    assert verdict.nbytes(State.UNPROVEN) == 0
    assert verdict.nbytes(State.PROVEN) == sum(int(t.layout.piece_nbytes[t.layout.written].sum()) for t in targets)
    assert verdict.digest_tensors == len(tensors)


def test_the_digest_of_a_whole_load_does_not_depend_on_either_layout() -> None:
    tensors = TENSORS[LLAMA.name]
    digests = {
        judge(instance(LLAMA, Parallel(tp=a), tensors), instance(LLAMA, Parallel(tp=b), tensors)).digest
        for a, b in [(1, 1), (2, 4), (4, 3), (3, 2)]
    }
    assert len(digests) == 1
    other = random_tensors(layouts(LLAMA)[0].catalog, 1)
    assert judge(instance(LLAMA, Parallel(), other), instance(LLAMA, Parallel(), other)).digest not in digests


MODELS = {
    "mla, block scales": tiny_deepseek(Storing("fp8_block", block=4, vocabulary=4)),
    "moe, block scales": tiny_qwen3_moe(Storing("fp8_block", block=4, vocabulary=4)),
    "stacked experts": tiny_qwen3_moe(stacked=True),
    "tied, biases": tiny_llama(tied=True, bias=True),
    "per channel, transposed": tiny_llama(Storing("fp8_channel", vocabulary=4, transposed=True)),
}
ARRANGED = [
    (Parallel(2, 1, 2), Parallel(4, 1, 4)),
    (Parallel(4), Parallel(2, 1, 2)),
    (Parallel(2, 2), Parallel(4)),
    (Parallel(), Parallel(4, 2)),
    (Parallel(3), Parallel(2)),
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("seeds_as", "targets_as"), ARRANGED, ids=str)
def test_experts_stages_scales_and_ties(kind: str, seeds_as: Parallel, targets_as: Parallel) -> None:
    model = MODELS[kind]
    tensors = random_tensors(layouts(model)[0].catalog)
    tensors |= {alias: tensors[name] for alias, name in layouts(model)[0].aliases.items()}
    seeds, targets = instance(model, seeds_as, tensors), instance(model, targets_as, tensors)
    verdict = judge(seeds, targets)
    assert not verdict.mismatches
    assert not verdict.contradictions
    # Rows of block scales that two ranks hold may overlap so that nothing tiles them; nothing else may be left.
    left = {verdict.measured.catalog.names[t] for t in verdict.measured.tensor[verdict.state == State.UNPROVEN].tolist()}
    assert all("scale" in name for name in left), left
    victim = targets[-1]
    row = int(victim.layout.written[-1])
    name = victim.layout.tensor_of(row).name
    victim.flip(name, victim.layout.box_of(row).start)
    damaged = judge(seeds, targets)
    assert {m.tensor for m in damaged.mismatches} == {name}
    assert len(damaged.wrong(victim.layout.rank)) >= 1


@pytest.mark.parametrize(("seed_tp", "target_tp"), [(2, 4), (4, 2), (2, 3)])
def test_a_flipped_bit_names_tensor_rank_and_source_and_the_copy_to_repeat(seed_tp: int, target_tp: int) -> None:
    tensors = TENSORS[LLAMA.name]
    seeds, targets = (instance(LLAMA, Parallel(tp), tensors) for tp in (seed_tp, target_tp))
    offers = [s.offer() for s in seeds]
    for victim in targets:
        layout = victim.layout
        for row in layout.written[:: max(1, len(layout.written) // 6)].tolist():
            spec, index = layout.tensor_of(row), tuple(b - 1 for b in layout.box_of(row).stop)
            victim.flip(spec.name, index)
            verdict = judge(seeds, targets, offers)
            victim.flip(spec.name, index)
            assert {m.tensor for m in verdict.mismatches} == {spec.name}
            assert all(contains(m.box, index) and layout.rank in m.ranks for m in verdict.mismatches)
            assert all(m.sources and set(m.sources) <= {str(o.source) for o in offers} for m in verdict.mismatches)
            plan = make_plan(layout, offers, salt=str(layout.rank))
            again = verdict.wrong(layout.rank)
            assert any(
                layout.catalog.names[plan.wants.tensor[plan.want[i]]] == spec.name
                and contains(Box(tuple(plan.start[i, -len(index) :]), tuple(plan.stop[i, -len(index) :])), index)
                for i in again
            )
            assert not verdict.contradictions


def test_ranks_that_are_missing_leave_bytes_unproven_and_counted() -> None:
    tensors = TENSORS[LLAMA.name]
    seeds, targets = (instance(LLAMA, Parallel(tp), tensors) for tp in (2, 4))
    alone = judge(seeds, targets[1:2])
    cut = {s.name for s in alone.measured.catalog if "norm" not in s.name}
    unproven = alone.measured.tensor[alone.state == State.UNPROVEN].tolist()
    assert {alone.measured.catalog.names[t] for t in unproven} == cut
    assert not alone.mismatches
    assert not alone.contradictions
    assert alone.nbytes(State.PROVEN) + alone.nbytes(State.UNPROVEN) == alone.measured.nbytes.sum()
    half = judge(seeds, targets[:2])
    left = {half.measured.catalog.names[t] for t in half.measured.tensor[half.state == State.UNPROVEN].tolist()}
    # Ranks 0 and 1 of 4 hold between them what rank 0 of 2 announced, but for padded vocabularies, which are cut elsewhere.
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert judge(seeds, targets[1:3]).nbytes(State.UNPROVEN) > 0


# What follows is about hand-made boxes. The digest of an element is any number; a box has the sum.

GRID = Catalog.of([TensorSpec("w", "BF16", (8, 8)), TensorSpec("norm", "F32", (8,))])
ELEMENTS = [np.random.default_rng(5).integers(0, PRIME, s.shape, np.uint64) for s in GRID]


def total(tensor: int, box: Box) -> int:
    return int(ELEMENTS[tensor][box.slices()].astype(object).sum()) % PRIME


def columns(rows: Sequence[tuple[int, Box]]) -> tuple[IntArray, IntArray, IntArray]:
    made = Pieces.of([Piece(t, b, 0, 0, (0,) * len(b.start)) for t, b in rows], GRID.width)
    return made.tensor, made.start, made.stop


def claims(*rows: tuple[str, int, Box, int]) -> Claims:
    """(source, tensor, box, what is added to the true digest)"""
    tensor, start, stop = columns([r[1:3] for r in rows])
    digest = np.array([(total(t, b) + off) % PRIME for _, t, b, off in rows], np.uint64)
    return Claims(GRID, tensor, start, stop, digest, np.arange(len(rows)), tuple(r[0] for r in rows))


def measured(*rows: tuple[int, int, Box, int]) -> Measured:
    """(rank, tensor, box, what is added to the true digest)"""
    tensor, start, stop = columns([r[1:3] for r in rows])
    digest = np.array([(total(t, b) + off) % PRIME for _, t, b, off in rows], np.uint64)
    rank = np.array([r[0] for r in rows], np.int64)
    return Measured(GRID, rank, tensor, start, stop, digest, np.zeros(len(rows), np.int64), (SourceId("a", 0, "1"),))


def rows(first: int, last: int) -> Box:
    return Box((first, 0), (last, 8))


def cols(first: int, last: int) -> Box:
    return Box((0, first), (8, last))


WHOLE, NORM = rows(0, 8), Box((0,), (8,))


def test_replicas_count_once_and_the_one_that_differs_is_named_alone() -> None:
    verdict = compare(claims(("a", 1, NORM, 0)), measured((0, 1, NORM, 0), (1, 1, NORM, 7), (2, 1, NORM, 0)))
    assert verdict.state.tolist() == [State.PROVEN, State.WRONG, State.PROVEN]
    assert [(m.tensor, m.ranks, m.claimed_by) for m in verdict.mismatches] == [("norm", (1,), ("a",))]
    assert verdict.wrong(1).tolist() == [0]
    assert verdict.wrong(0).tolist() == []


def test_a_differing_replica_inside_a_tiling_is_told_by_the_rest() -> None:
    said = claims(("a", 0, WHOLE, 0))
    held = measured((0, 0, rows(0, 4), 0), (1, 0, rows(0, 4), 9), (2, 0, rows(4, 8), 0))
    assert compare(said, held).state.tolist() == [State.PROVEN, State.WRONG, State.PROVEN]
    both = measured((0, 0, rows(0, 4), 8), (1, 0, rows(0, 4), 9), (2, 0, rows(4, 8), 0))
    assert compare(said, both).state.tolist() == [State.WRONG] * 3


def test_replicas_that_differ_are_wrong_even_if_nobody_announced_the_box() -> None:
    verdict = compare(claims(("a", 0, WHOLE, 0)), measured((0, 1, NORM, 0), (3, 1, NORM, 7)))
    assert [(m.ranks, m.claimed_by) for m in verdict.mismatches] == [((0, 3), ())]
    assert "differs between these ranks" in str(verdict.mismatches[0])


def test_seeds_that_contradict_each_other_about_one_box_are_named_and_prove_nothing() -> None:
    verdict = compare(claims(("a", 0, WHOLE, 0), ("b", 0, WHOLE, 1)), measured((0, 0, WHOLE, 0)))
    assert verdict.mismatches or verdict.contradictions
    assert [(c.tensor, c.box, c.sources) for c in verdict.contradictions] == [("w", WHOLE, ("a", "b"))]
    assert verdict.state.tolist() == [State.UNPROVEN]


def test_seeds_that_contradict_each_other_about_different_boxes_are_named() -> None:
    """Both halves are what their holders announced, yet not the whole that another seed announced."""
    said = claims(("a", 0, rows(0, 4), 0), ("b", 0, rows(4, 8), 0), ("stale", 0, WHOLE, 3))
    verdict = compare(said, measured((0, 0, rows(0, 4), 0), (1, 0, rows(4, 8), 0)))
    assert verdict.state.tolist() == [State.PROVEN] * 2
    assert not verdict.mismatches
    assert [c.sources for c in verdict.contradictions] == [("a/rank 0", "stale")]


def test_two_wrong_parts_that_cancel_nothing() -> None:
    said = claims(("a", 0, cols(0, 4), 0), ("b", 0, cols(4, 8), 0))
    held = measured(*((r, 0, cols(2 * r, 2 * r + 2), 5 if r in (1, 2) else 0) for r in range(4)))
    verdict = compare(said, held)
    assert verdict.state.tolist() == [State.WRONG] * 4
    assert [m.ranks for m in verdict.mismatches] == [(0, 1), (2, 3)]


def test_a_part_that_another_claim_proves_is_not_suspect() -> None:
    said = claims(("a", 0, WHOLE, 0), ("b", 0, rows(0, 4), 0))
    verdict = compare(said, measured((0, 0, rows(0, 4), 0), (1, 0, rows(4, 8), 2)))
    assert verdict.state.tolist() == [State.PROVEN, State.WRONG]
    assert [m.ranks for m in verdict.mismatches] == [(1,)]


def test_tiles_in_two_dimensions_and_mixed_sizes() -> None:
    quarter = [Box((4 * i, 4 * k), (4 * i + 4, 4 * k + 4)) for i in (0, 1) for k in (0, 1)]
    pinwheel = [Box((0, 0), (3, 5)), Box((0, 5), (5, 8)), Box((5, 3), (8, 8)), Box((3, 0), (8, 3)), Box((3, 3), (5, 5))]
    for tiles in (quarter, pinwheel, [rows(0, 4), *quarter[2:]], [*quarter, rows(0, 4), rows(4, 8), cols(0, 2), cols(2, 8)]):
        held = measured(*((i, 0, b, 0) for i, b in enumerate(tiles)))
        verdict = compare(claims(("a", 0, WHOLE, 0)), held)
        assert verdict.state.tolist() == [State.PROVEN] * len(tiles)
        assert verdict.digest == total(0, WHOLE)
    assert (
        compare(claims(("a", 0, WHOLE, 0)), measured(*((i, 0, b, 0) for i, b in enumerate(pinwheel[:4])))).nbytes(State.PROVEN)
        == 0
    )


def test_overlapping_boxes_prove_what_they_can() -> None:
    said = claims(("a", 0, WHOLE, 0))
    overlap = [(0, 0, rows(0, 5), 0), (1, 0, rows(4, 8), 0)]
    assert compare(said, measured(*overlap)).state.tolist() == [State.UNPROVEN] * 2
    verdict = compare(said, measured(*overlap, (2, 0, rows(5, 8), 0)))
    assert verdict.state.tolist() == [State.PROVEN, State.UNPROVEN, State.PROVEN]
    assert compare(said, measured(*overlap, (2, 0, rows(5, 8), 1))).wrong(2).tolist() == [0]


def test_claims_of_seeds_with_other_catalogs_are_matched_by_name() -> None:
    specs = [TensorSpec("extra", "U8", (3, 2, 2)), GRID[1], TensorSpec("w", "F16", (8, 8))]
    pieces = Pieces.of(
        [Piece(0, Box.whole((3, 2, 2)), 0, 0, (4, 2, 1)), Piece(1, NORM, 0, 16, (4,)), Piece(2, WHOLE, 0, 48, (16, 2))], 3
    )
    layout = Layout(Catalog.of(specs), ("b",), np.array([256]), pieces)
    digests = np.array([1, total(1, NORM), 3], np.uint64)
    offers = [Offer(layout, Binding(SourceId("a", 0, "g"), np.zeros(1, np.int64), (), digests=d)) for d in (digests, None)]
    said = Claims.of(GRID, offers)
    assert said.tensor.tolist() == [1]
    assert said.sources == ("a/rank 0",)
    assert compare(said, measured((0, 1, NORM, 0))).nbytes(State.PROVEN) == 32
    assert len(Claims.of(GRID, [])) == 0


def test_measurements_survive_the_exchange_and_foreign_ones_are_refused() -> None:
    held = measured((0, 0, rows(0, 4), 0), (0, 0, rows(4, 8), 0), (0, 1, NORM, 0))
    back = Measured.decode(held.encode(), GRID)
    for name in ("rank", "tensor", "start", "stop", "digest", "source"):
        assert getattr(back, name).tolist() == getattr(held, name).tolist()
    assert back.sources == held.sources
    none = Measured.decode(measured().encode(), GRID)
    assert len(none) == 0
    assert not compare(claims(), none).mismatches
    with pytest.raises(VerifyError, match="another list of tensors"):
        Measured.decode(held.encode(), Catalog.of([GRID[0], TensorSpec("norm", "F32", (9,))]))
    with pytest.raises(VerifyError, match="by another digest than m61-1: 'm89-1'"):
        Measured.decode(held.encode().replace(b"m61-1", b"m89-1"), GRID)
    for data in (b"", b"PLM1", held.encode()[:-9], held.encode()[:40], b"X" + held.encode()[1:], bytes(200)):
        with pytest.raises(VerifyError):
            Measured.decode(data, GRID)
    outside = Measured(GRID, held.rank, held.tensor, held.start, held.stop + 8, held.digest, held.source, held.sources)
    with pytest.raises(VerifyError, match="outside"):
        Measured.decode(outside.encode(), GRID)


COLUMNS = ("rank", "tensor", "start", "stop", "digest", "source")


def test_what_was_read_before_and_after_a_change_is_told_apart() -> None:
    none = measured()

    def skewed(*sources: SourceId) -> set[str]:
        parts = [Measured(GRID, *(getattr(none, c) for c in COLUMNS), (s,)) for s in sources]
        whole = Measured.join([Measured.decode(part.encode(), GRID) for part in parts])
        assert set(whole.sources) == set(sources)
        return set(whole.skewed())

    a, b = SourceId.new("a", 0, 3), SourceId.new("a", 1, 3)
    assert skewed(a, b, a, SourceId.new("b", 0, 4)) == set()
    assert skewed(a, b, SourceId.new("a", 1, 3)) == {"a"}  # restarted
    assert skewed(a, SourceId.new("a", 0, 4), SourceId.new("b", 1, 4)) == {"a"}
    assert skewed(a, SourceId.new("a", 1, 4), SourceId.new("b", 0, 3)) == {"a"}  # one before a change, one after it
    assert skewed(SourceId("disk", 0, ""), SourceId("disk", 0, "")) == set()
    assert [s.changes for s in (SourceId.new("a", 0, 5), SourceId("a", 0, "x" * 32), SourceId("a", 0, "1"))] == [5, 0, 0]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_measurements_of_nonsense_are_refused(data: st.DataObject) -> None:
    """Whatever a byte or a value of them becomes."""
    held = measured((0, 0, rows(0, 4), 0), (0, 1, NORM, 0)).encode()
    (size,) = struct.unpack_from("<I", held, 4)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(held) - 1))
        changed = held[:at] + bytes([data.draw(st.integers(0, 255))]) + held[at + 1 :]
    else:
        head = json.loads(held[8 : 8 + size])
        value = data.draw(st.sampled_from([None, -1, 1.5, float("nan"), float("inf"), 10**30, "x", [], [[]], {}, [["a", "b"]]]))
        head[data.draw(st.sampled_from(sorted(head)))] = value
        if data.draw(st.booleans()):
            head["derived"] = [["p by x", "F32", [data.draw(st.sampled_from([0, -1, 10**30, "4", 4]))]]]
        text = json.dumps(head).encode()
        changed = held[:4] + struct.pack("<I", len(text)) + text + held[8 + size :]
    try:
        again = Measured.decode(changed, GRID)
    except VerifyError:
        return
    compare(claims(("a", 1, NORM, 0)), Measured.join([again, measured((1, 1, NORM, 0))]))


def test_joining_renumbers_sources() -> None:
    one, two = measured((0, 1, NORM, 0)), measured((1, 1, NORM, 7))
    two = Measured(GRID, two.rank, two.tensor, two.start, two.stop, two.digest, two.source, (SourceId("b", 3, "1"),))
    verdict = compare(claims(("a", 1, NORM, 0)), Measured.join([one, two]))
    assert verdict.mismatches[0].sources == ("b/rank 3",)


def test_a_receipt_says_what_happened() -> None:
    receipt = Receipt(
        model="m",
        rank=1,
        sources={"s/rank 0": Read(1_000_000, 4)},
        needed_nbytes=1_000_000,
        wire_nbytes=1_500_000,
        operations=6,
        seconds={"plan": 0.25, "transfer": 0.5},
        wall_s=1.0,
        verified_nbytes=1_000_000,
        digest=255,
        digest_tensors=3,
    )
    found = json.loads(json.dumps(receipt.to_dict()))
    assert found["digest"] == "00000000000000ff"
    assert found["sources"] == {"s/rank 0": {"nbytes": 1_000_000, "operations": 4}}
    assert (found["transfer_gb_per_s"], found["overhead"]) == (0.003, 1.5)
    assert "1.500x" in str(receipt)
    with pytest.raises(ValueError, match="wall_s"):
        Receipt(model="m", rank=0, needed_nbytes=0, wire_nbytes=0, operations=0, seconds={}, wall_s=-1.0)
