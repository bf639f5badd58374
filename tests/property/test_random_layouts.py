"""Models cut and packed in any way: a plan carried out equals a direct copy by boxes, or its holes are the true ones."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from peerload.errors import PlanError
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog
from peerload.model.layout import Layout
from peerload.planning.plan import Plan, make_plan
from peerload.testing.machine import Instance, behind, carry_out, fresh, load_exactly
from peerload.testing.oracle import numbered, scattered
from peerload.testing.strategies import catalogs, instances, partitions

common = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def running(layouts: tuple[Layout, ...], catalog: Catalog, name: str) -> Instance:
    contents = [scattered(layout, numbered(catalog)) for layout in layouts]
    return Instance.holding(layouts, contents, np.random.default_rng(5), name)


@common
@given(st.data())
def test_any_seeds_load_any_target(data: st.DataObject) -> None:
    catalog = data.draw(catalogs())
    seeds = [running(data.draw(instances(catalog)), catalog, f"seed{i}") for i in range(data.draw(st.integers(1, 3)))]
    for wanted in data.draw(instances(catalog)):
        load_exactly(wanted, scattered(wanted, numbered(catalog)), seeds)


@common
@given(st.data())
def test_a_plan_exists_exactly_when_somebody_holds_every_element(data: st.DataObject) -> None:
    catalog = data.draw(catalogs())
    seeds = [running(data.draw(instances(catalog, complete=False)), catalog, f"seed{i}") for i in range(2)]
    wanted = data.draw(instances(catalog))[0]
    have = {int(c) for seed in seeds for o in seed.offers for b in scattered(o.layout, numbered(catalog)).values() for c in b}
    need = {int(c) for b in scattered(wanted, numbered(catalog)).values() for c in b if c >= 0}
    try:
        load_exactly(wanted, scattered(wanted, numbered(catalog)), seeds)
        assert need <= have
    except PlanError as error:
        named: set[int] = set()
        for hole in error.holes:
            ranges = [tuple(map(int, r.split(":"))) for r in hole.box.strip("[]").split(", ") if r]
            part = numbered(catalog)[hole.tensor][tuple(slice(a, b) for a, b in ranges)]
            assert named.isdisjoint(part.ravel().tolist())
            named |= set(part.ravel().tolist())
        assert named == need - have
        assert need - have


@common
@given(st.data())
def test_a_changed_plan_is_refused_or_still_exact(data: st.DataObject) -> None:
    """One number changed in a valid plan: no such plan can be constructed, unless it reads the same box elsewhere."""
    catalog = data.draw(catalogs())
    seeds = running(data.draw(instances(catalog)), catalog, "seed")
    wanted = data.draw(instances(catalog))[0]
    plan = make_plan(wanted, seeds.offers)
    if len(plan) == 0:
        return
    columns = {name: getattr(plan, name).copy() for name in ("want", "offer", "piece", "start", "stop")}
    name, row = data.draw(st.sampled_from(sorted(columns))), data.draw(st.integers(0, len(plan) - 1))
    where = (row, data.draw(st.integers(0, catalog.width - 1))) if name in ("start", "stop") else row
    columns[name][where] += data.draw(st.sampled_from([-2, -1, 1, 2]))
    try:
        changed = Plan(plan.wants, plan.offers, **columns)
    except PlanError as error:
        event("refused")
        if "invalid plan" not in str(error):
            raise
        return
    event("another holder of the same box")
    assert name in ("offer", "piece")
    memory = fresh(wanted)
    carry_out(changed, behind(changed, [seeds]), memory)
    assert memory.differences(wanted, scattered(wanted, numbered(catalog))) == []


@common
@given(st.data())
def test_strategies_make_what_they_promise(data: st.DataObject) -> None:
    catalog = data.draw(catalogs())
    for spec in catalog:
        whole = Box.whole(spec.shape)
        parts = data.draw(partitions(whole))
        assert sum(part.volume for part in parts) == whole.volume
        assert all(a.intersect(b) is None for i, a in enumerate(parts) for b in parts[:i])
    held: set[int] = set()
    for layout in data.draw(instances(catalog)):
        layout.prove_disjoint()
        content = [int(c) for buffer in scattered(layout, numbered(catalog)).values() for c in buffer if c >= 0]
        assert len(content) == len(set(content)) == layout.nbytes  # no piece overwrote another's bytes
        held |= set(content)
    assert len(held) == catalog.nbytes
