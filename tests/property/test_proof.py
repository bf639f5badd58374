"""What can't be planned is refused by name, and what isn't exact can't be constructed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from peerload.errors import ManifestError, PlanError
from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import Catalog, Parallel, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.model.offer import Binding, Offer, SourceId
from peerload.planning.plan import Plan, make_plan
from peerload.testing.layouts import Storing, layout, tiny_deepseek, tiny_llama
from peerload.testing.machine import Instance, load_exactly, numbers, on_disk, running
from peerload.testing.oracle import numbered, scattered, shards

LLAMA = tiny_llama()
UP = "model.layers.1.mlp.up_proj.weight"


def matrix(spec: TensorSpec, *boxes: Box, rank: int = 0, **aliases: str) -> Layout:
    """A rank that holds boxes of a one-tensor model, one buffer each."""
    catalog = Catalog.of([spec, *(TensorSpec(name, spec.dtype, spec.shape) for name in aliases)])
    size = int(catalog.itemsize[0])
    rows, nbytes = [], []
    for i, box in enumerate(boxes):
        strides = tuple(int(np.prod(box.shape[d + 1 :])) * size for d in range(len(box.shape)))
        rows.append(Piece(0, box, i, 0, strides))
        nbytes.append(box.volume * size)
    names = tuple(f"buffer{i}" for i in range(len(boxes)))
    return Layout(catalog, names, np.array(nbytes, np.int64), Pieces.of(rows, catalog.width), rank=rank, aliases=aliases)


def offer(held: Layout, instance: str = "seed") -> Offer:
    return Offer(held, Binding(SourceId(instance, held.rank, "1"), np.arange(len(held.buffer_names)) * 4096, ()))


def plan_of_llama() -> Plan:
    return make_plan(layout(LLAMA, Parallel(3), 1), running(LLAMA, Parallel(2)).offers)


def test_a_missing_source_rank_is_a_hole_with_tensor_rank_and_box() -> None:
    wanted = layout(LLAMA, Parallel(1))
    with pytest.raises(PlanError) as error:
        make_plan(wanted, running(LLAMA, Parallel(2)).offers[1:])
    holes = {hole.tensor: hole for hole in error.value.holes}
    # Rank 0 of 2 has the first 12 of 24 rows; norms are replicated, so nothing of them is missing.
    assert holes[UP].box == "[0:12, 0:12]"
    assert holes[UP].rank == 0
    assert "model.norm.weight" not in holes
    assert "up_proj" in str(error.value) or len(holes) > 5


def test_an_absent_pipeline_stage_and_absent_experts_are_holes() -> None:
    model = tiny_deepseek()
    with pytest.raises(PlanError) as error:
        make_plan(layout(model, Parallel(1)), running(model, Parallel(2, 2, 2)).offers[:3])
    names = {hole.tensor for hole in error.value.holes}
    assert "model.layers.3.mlp.experts.11.down_proj.weight" in names
    assert "model.layers.3.mlp.experts.0.down_proj.weight" not in names
    assert not any(name.startswith("model.layers.1.") for name in names)


def test_nobody_offers_anything() -> None:
    with pytest.raises(PlanError, match="nobody offers anything") as error:
        make_plan(layout(LLAMA, Parallel(2), 1), [])
    assert {hole.rank for hole in error.value.holes} == {1}


def test_a_rank_that_needs_nothing_has_an_empty_plan() -> None:
    spec = TensorSpec("w", "F32", (4, 6))
    plan = make_plan(matrix(spec), [offer(matrix(spec, Box.whole(spec.shape)))])
    assert len(plan) == plan.nbytes == 0


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (TensorSpec("w", "BF16", (4, 6)), "BF16"),
        (TensorSpec("w", "I32", (4, 6)), "I32"),  # the same size is not the same dtype
        (TensorSpec("w", "F32", (6, 4)), "(6, 4)"),
        (TensorSpec("w", "F32", (24,)), "(24,)"),
        (TensorSpec("v", "F32", (4, 6)), "v"),
    ],
)
def test_an_offer_of_another_model_is_refused_with_the_reason(theirs: TensorSpec, said: str) -> None:
    ours = TensorSpec("w", "F32", (4, 6))
    with pytest.raises(PlanError) as error:
        make_plan(matrix(ours, Box.whole(ours.shape)), [offer(matrix(theirs, Box.whole(theirs.shape)))])
    assert [hole.tensor for hole in error.value.holes] == ["w"]
    assert said in error.value.refusals[0].reason
    assert error.value.refusals[0].source == "seed/rank 0"


def test_names_that_the_seed_has_and_the_target_lacks_are_not_ignored() -> None:
    ours, spec = TensorSpec("w", "F32", (4, 6)), TensorSpec("extra", "F32", (2,))
    both = Catalog.of([ours, spec])
    pieces = Pieces.of([Piece(0, Box.whole((4, 6)), 0, 0, (24, 4)), Piece(1, Box.whole((2,)), 0, 96, (4,))], both.width)
    seed = offer(Layout(both, ("all",), np.array([104]), pieces))
    wanted = matrix(ours, Box.whole((4, 6)))
    with pytest.raises(PlanError, match="extra"):
        make_plan(wanted, [seed])
    plan = make_plan(dataclasses.replace(wanted, ignored={"extra": "a head this engine doesn't serve"}), [seed])
    assert plan.nbytes == 96


def test_a_bad_offer_does_not_stop_a_good_one() -> None:
    ours = TensorSpec("w", "F32", (4, 6))
    whole = Box.whole(ours.shape)
    good, bad = offer(matrix(ours, whole)), offer(matrix(ours._replace(dtype="I32"), whole), "bad")
    plan = make_plan(matrix(ours, whole), [bad, good])
    assert plan.bytes_by_source == {good.source: 96}
    assert [refusal.source for refusal in plan.refusals] == ["bad/rank 0"]


def test_catalogs_in_another_order_are_the_same_model() -> None:
    """Seeds of another engine list the tensors differently, and with another number of dimensions at most."""
    specs = [TensorSpec("a", "F32", (3, 2)), TensorSpec("b", "F32", (4,)), TensorSpec("c", "F32", ())]

    def held(order: list[int]) -> Layout:
        catalog = Catalog.of(specs[i] for i in order)
        strides = {0: (8, 4), 1: (4,), 2: ()}
        rows = [Piece(row, Box.whole(specs[i].shape), row, 0, strides[i]) for row, i in enumerate(order)]
        return Layout(catalog, tuple(specs[i].name for i in order), np.full(len(order), 24), Pieces.of(rows, catalog.width))

    wanted, theirs = held([0, 1, 2]), held([2, 0, 1])
    both = numbered(wanted.catalog)
    seed = Instance.holding([theirs], [scattered(theirs, both)], np.random.default_rng(1))
    load_exactly(wanted, scattered(wanted, both), [seed])


@pytest.mark.parametrize(("seed_tied", "target_tied"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("parallel", [Parallel(2), Parallel(2, 2)], ids=str)
def test_tied_embeddings_both_ways(seed_tied: bool, target_tied: bool, parallel: Parallel) -> None:
    tied, untied = tiny_llama(tied=True), tiny_llama()
    seed, target = (tied if which else untied for which in (seed_tied, target_tied))
    same = dict(numbers(untied)) | {"lm_head.weight": numbers(untied)["model.embed_tokens.weight"]}
    from_ = [scattered(layout(seed, parallel, rank), same) for rank in range(parallel.tp * parallel.pp)]
    seeds = Instance.holding([layout(seed, parallel, r) for r in range(len(from_))], from_, np.random.default_rng(3))
    for rank in range(3):
        wanted = layout(target, Parallel(3), rank)
        load_exactly(wanted, shards(target, same, Parallel(3), rank), [seeds])


def test_same_parallelism_refuses_other_sizes_and_says_so() -> None:
    wanted = layout(LLAMA, Parallel(4), 2)
    offers = [*running(LLAMA, Parallel(2), "two").offers, *running(LLAMA, Parallel(4), "four").offers]
    plan = make_plan(wanted, offers, match="same-parallelism")
    assert {source.instance for source in plan.bytes_by_source} == {"four"}
    with pytest.raises(PlanError, match="same-parallelism"):
        make_plan(wanted, offers[:2], match="same-parallelism")


def test_the_last_resort_gives_only_what_peers_lack() -> None:
    model, to = tiny_llama(Storing("fp8_block", block=5, vocabulary=4)), Parallel(2)
    peers = running(model, Parallel(4), "peer")
    some = Instance(peers.offers[:3], peers.memories[:3])
    wanted = layout(model, to, 1)
    plan = load_exactly(wanted, shards(model, numbers(model), to, 1), [some], reserve=[on_disk(model)])
    disk = on_disk(model).offers[0].source
    # Counted without the planner: the bytes this rank wants and none of the three peers has.
    have = np.concatenate([c for o in some.offers for c in scattered(o.layout, numbers(model)).values()])
    want = np.concatenate([*shards(model, numbers(model), to, 1).values()])
    assert plan.bytes_by_source[disk] == int((~np.isin(want[want >= 0], have)).sum()) > 0
    assert disk not in make_plan(wanted, peers.offers, reserve=on_disk(model).offers).bytes_by_source


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("to", [Parallel(1), Parallel(4)], ids=str)
def test_identical_seeds_share_the_bytes_to_within_one_piece(count: int, to: Parallel) -> None:
    seeds = [running(LLAMA, Parallel(1), f"seed{i}") for i in range(count)]
    wanted = layout(LLAMA, to, 0)
    plan = load_exactly(wanted, shards(LLAMA, numbers(LLAMA), to, 0), seeds)
    shares = [sum(plan.bytes_by_source.get(o.source, 0) for o in seed.offers) for seed in seeds]
    assert max(shares) - min(shares) <= int(plan.copy_nbytes.max())


def test_bytes_already_asked_of_a_source_count() -> None:
    seeds = [running(LLAMA, Parallel(1), f"seed{i}") for i in range(2)]
    busy = seeds[0].offers[0].source
    wanted = layout(LLAMA, Parallel(1))
    plan = make_plan(wanted, [o for s in seeds for o in s.offers], loads={busy: 10 * wanted.nbytes})
    assert busy not in plan.bytes_by_source


def test_replicated_pieces_are_not_all_read_from_rank_0() -> None:
    plan = make_plan(layout(tiny_deepseek(), Parallel(8), 3), running(tiny_deepseek(), Parallel(8)).offers)
    assert len(plan.bytes_by_source) == 8


def columns(plan: Plan) -> list[list[object]]:
    return [plan.want.tolist(), plan.offer.tolist(), plan.piece.tolist(), plan.start.tolist(), plan.stop.tolist()]


def test_equal_arguments_give_equal_plans_and_salts_spread_ranks() -> None:
    wanted = layout(LLAMA, Parallel(4), 2)
    offers = [o for i in range(4) for o in running(LLAMA, Parallel(2), f"seed{i}").offers]
    first, again = (make_plan(wanted, offers, salt="rank 2") for _ in range(2))
    assert columns(first) == columns(again)
    others = [make_plan(wanted, offers, salt=f"rank {i}") for i in range(6)]
    assert len({str(columns(p)[1]) for p in others}) > 1


def test_what_is_left_after_a_lost_source_is_planned_again() -> None:
    wanted = layout(LLAMA, Parallel(3), 1)
    seeds = [running(LLAMA, Parallel(2), "a"), running(LLAMA, Parallel(4), "b")]
    plan = make_plan(wanted, [o for s in seeds for o in s.offers])
    lost = plan.offers[int(plan.offer[0])].source
    undone = np.flatnonzero([plan.offers[i].source == lost for i in plan.offer])
    rest = make_plan(plan.rest(undone), [o for s in seeds for o in s.offers if o.source != lost])
    assert rest.nbytes == int(plan.copy_nbytes[undone].sum()) > 0
    assert lost not in rest.bytes_by_source


def test_pieces_that_share_a_byte_are_no_target() -> None:
    spec = TensorSpec("w", "F32", (4, 6))
    catalog = Catalog.of([spec])
    rows = [Piece(0, Box((0, 0), (2, 6)), 0, 0, (24, 4)), Piece(0, Box((2, 0), (4, 6)), 0, 44, (24, 4))]
    wanted = Layout(catalog, ("b",), np.array([96]), Pieces.of(rows, 2))
    with pytest.raises(ManifestError, match="share a byte"):
        make_plan(wanted, [offer(matrix(spec, Box.whole(spec.shape)))])


# Mutations: one thing wrong in the columns of a valid plan.

Columns = dict[str, IntArray]


def without(keep: IntArray) -> Callable[[Columns], Columns]:
    return lambda columns: {name: column[keep] for name, column in columns.items()}


def changed(name: str, row: int, change: Callable[[IntArray], object]) -> Callable[[Columns], Columns]:
    def apply(columns: Columns) -> Columns:
        columns = {key: column.copy() for key, column in columns.items()}
        columns[name][row] = change(columns[name][row])
        return columns

    return apply


def wide(plan: Plan, axis: int) -> int:
    """A copy whose box has more than one index along the axis."""
    return int(np.argmax((plan.stop - plan.start)[:, axis] > 1))


def mutations() -> dict[str, Callable[[Columns], Columns]]:
    plan = plan_of_llama()
    n, unit = len(plan), np.array([0, 1])
    tall, broad = wide(plan, 0), wide(plan, 1)
    every = np.arange(n)
    cases = {
        "a copy is missing": without(every[1:]),
        "the last copy is missing": without(every[:-1]),
        "no copy at all": without(every[:0]),
        "a copy is there twice": without(np.append(every, n // 2)),
        "another copy in one's stead": without(np.append(every[1:], every[-1])),
        "a box is shorter": changed("stop", tall, lambda v: v - unit[::-1]),
        "a box begins later": changed("start", broad, lambda v: v + unit),
        "a box is empty": changed("stop", broad, lambda v: v * 0),
        "a box is shifted out": changed("start", broad, lambda v: v - unit),
        "a box is one wider": changed("stop", broad, lambda v: v + unit),
        "a piece of another tensor": changed("piece", 0, lambda v: v + 1),
        "a piece that isn't there": changed("piece", 0, lambda _: 10**6),
        "a negative piece": changed("piece", 0, lambda _: -1),
        "an offer that isn't there": changed("offer", 0, lambda _: 99),
        "a want that isn't there": changed("want", 0, lambda _: 10**6),
        "a negative want": changed("want", 0, lambda _: -1),
        "another want": changed("want", 0, lambda v: v + 1),
        "columns of unequal length": lambda columns: columns | {"piece": columns["piece"][:-1]},
    }
    sharded = next(i for i in range(n) if plan.wants.layout.catalog.names[int(plan.wants.tensor[plan.want[i]])] == UP)
    return cases | {"an offer that holds another part": changed("offer", sharded, lambda v: 1 - v)}


def as_columns(plan: Plan) -> Columns:
    return {name: getattr(plan, name) for name in ("want", "offer", "piece", "start", "stop")}


def test_an_unchanged_plan_can_be_constructed_again() -> None:
    plan = plan_of_llama()
    assert Plan(plan.wants, plan.offers, **as_columns(plan)).nbytes == plan.nbytes


@pytest.mark.parametrize("name", mutations())
def test_a_plan_with_one_thing_wrong_can_not_be_constructed(name: str) -> None:
    plan = plan_of_llama()
    with pytest.raises(PlanError, match="invalid plan"):
        Plan(plan.wants, plan.offers, **mutations()[name](as_columns(plan)))


@pytest.mark.parametrize("row", range(0, 60, 7))
def test_each_dropped_copy_is_named(row: int) -> None:
    plan = plan_of_llama()
    row %= len(plan)
    keep = np.delete(np.arange(len(plan)), row)
    with pytest.raises(PlanError) as error:
        Plan(plan.wants, plan.offers, **without(keep)(as_columns(plan)))
    assert error.value.holes[0].tensor == plan.wants.layout.catalog.names[int(plan.wants.tensor[plan.want[row]])]
    assert error.value.holes[0].rank == 1


def test_a_plan_that_reads_other_dtypes_can_not_be_constructed() -> None:
    spec = TensorSpec("w", "F32", (4, 6))
    whole = Box.whole(spec.shape)
    plan = make_plan(matrix(spec, whole), [offer(matrix(spec, whole))])
    with pytest.raises(PlanError, match="I32 into F32"):
        dataclasses.replace(plan, offers=(offer(matrix(spec._replace(dtype="I32"), whole)),))
