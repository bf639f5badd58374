"""A probe beside a trace of the same loader: they agree, and every lie of a layout is named."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from probed import MIXED, Fill, Plain, traced  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peerload.errors import ConfigError, LayoutError  # noqa: E402
from peerload.model.boxes import Box  # noqa: E402
from peerload.model.catalog import Catalog, TensorSpec  # noqa: E402
from peerload.model.layout import Constant, Layout, Piece, Pieces  # noqa: E402
from peerload.tracing.probe.agree import agree  # noqa: E402
from peerload.tracing.probe.run import COMPUTED, MOST_GROUPS, UNWRITTEN, groups_of, probe  # noqa: E402


def test_values_that_an_engine_checks_are_given() -> None:
    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        if not torch.equal(found["index"], torch.arange(6, dtype=torch.int32)):
            raise ValueError("index is no permutation")
        model.load(found.items(), lambda w: {"p": w["w"], "i": w["index"]})

    def build() -> Plain:
        return Plain(p=("BF16", (4, 6)), i=("I32", (6,)))

    with pytest.raises(LayoutError, match=r"loader fails on coded values in pass 1 of 3: ValueError: index is no permutation"):
        probe(build, load, MIXED)
    with pytest.raises(LayoutError, match="the engine's post-processing fails on coded values in pass 1"):
        probe(build, lambda model, weights: None, MIXED, finish=lambda model: model.nothing)
    probed = probe(build, load, MIXED, fixed={"index": torch.arange(6, dtype=torch.int32)})
    assert {name: seen.kind for name, seen in probed.buffers.items()} == {"p": "copy", "i": "constant"}
    assert agree(traced(lambda w: {"p": w["w"], "i": w["index"]}, build), probed) == []
    with pytest.raises(ConfigError, match="index: the fixed value is"):
        probe(build, load, MIXED, fixed={"index": torch.arange(5, dtype=torch.int32)})


def test_what_the_constructor_leaves_on_meta_is_left_out() -> None:
    def build() -> Plain:
        model = Plain(p=("BF16", (4, 6)))
        model.head = nn.Linear(3, 3, device="meta")
        return model

    probed = probe(build, lambda model, weights: model.load(weights, lambda w: {"p": w["w"]}), MIXED)
    assert set(probed.buffers) == {"p"}
    assert agree(traced(lambda w: {"p": w["w"]}, lambda: Plain(p=("BF16", (4, 6)))), probed) == []


def test_memory_that_nobody_wrote_is_not_taken_for_a_computed_value() -> None:
    """What lies in uninitialised memory differs from build to build."""
    builds = iter(range(100))

    def build() -> Plain:
        model = Plain(p=("BF16", (4, 6)))
        model.register_buffer("scratch", torch.full((5,), next(builds), dtype=torch.int32), persistent=False)
        model.register_buffer("scores", torch.full((6,), float(next(builds))), persistent=False)
        return model

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        model.load(found.items(), lambda w: {"p": w["w"]})
        model.scores[:3] = found["scale"].exp()

    probed = probe(build, load, MIXED)
    assert (probed.buffers["scratch"].kind, probed.buffers["scores"].kind) == ("unwritten", "opaque")
    assert probed.buffers["scores"].ids.tolist() == [COMPUTED] * 3 + [UNWRITTEN] * 3
    assert agree(traced(lambda w: {"p": w["w"]}, lambda: Plain(p=("BF16", (4, 6)))), probed) == [
        "scores: missing from the layout, but the probe sees 3 of 6 elements are computed from the checkpoint, not copied in it"
    ]


def test_computed_values_depend_on_what_they_are_said_to_be_computed_from() -> None:
    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        model.d.data.copy_(found["bias"].exp())
        model.e.data.copy_(found["bias"] * found["one"].to(torch.bfloat16))

    def build() -> Plain:
        return Plain(d=("BF16", (6,)), e=("BF16", (6,)))

    catalog = Catalog.of([*MIXED, TensorSpec("d by toy", "BF16", (6,)), TensorSpec("e by toy", "BF16", (6,))])
    pieces = [Piece(catalog.row[f"{name} by toy"], Box((0,), (6,)), at, 0, (2,)) for at, name in enumerate("de")]
    layout = Layout(catalog, ("d", "e"), np.array([12, 12], np.int64), Pieces.of(pieces, catalog.width), ())
    right, wrong = ({"d by toy": ("bias",), "e by toy": names} for names in (("bias", "one"), ("bias",)))
    for covers, differences in ((right, []), (wrong, ["e: 6 elements of e by toy depend on more than it is computed from"])):
        probed = probe(build, load, MIXED, groups=groups_of(covers.values()))
        assert agree(layout, probed, covers) == differences
    many = [frozenset((f"t{i}",)) for i in range(20)]
    groups = groups_of([*many, ("t0",)])
    assert len(groups) == MOST_GROUPS
    assert all(any(one <= group for group in groups) for one in many)


RIGHT: Fill = lambda w: {"p": torch.cat([w["w"][2:], w["w"][:2]]), "q": w["w8"].t(), "b": w["bias"][3:]}  # noqa: E731


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("p", lambda w: {**RIGHT(w), "p": w["w"]}),
        ("q", lambda w: {**RIGHT(w), "q": w["w8"].t().reshape(4, 6)[:, [1, 0, 2, 3, 4, 5]].reshape(6, 4)}),
        ("b", lambda w: {**RIGHT(w), "b": w["bias"][:3]}),
        ("b", lambda w: {**RIGHT(w), "b": w["w"][0, :3]}),
        ("b", lambda w: {**RIGHT(w), "b": w["bias"][3:] * 1.5}),
        ("b", lambda w: {**RIGHT(w), "b": torch.zeros(3)}),
    ],
)
def test_a_trace_of_another_loader_is_told_apart(name: str, wrong: Fill) -> None:
    def build() -> Plain:
        return Plain(p=("BF16", (4, 6)), q=("F8_E4M3", (6, 4)), b=("BF16", (3,)))

    layout = traced(RIGHT, build)
    assert agree(layout, probe(build, lambda m, weights: m.load(weights, RIGHT), MIXED)) == []
    (difference,) = agree(layout, probe(build, lambda m, weights: m.load(weights, wrong), MIXED))
    assert difference.startswith(f"{name}: ")
    assert "elements differ, first" in difference


def test_a_layout_that_lies_about_casts_and_constants_is_told_apart() -> None:
    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        model.c.data[:3].copy_(found["bias"][:3])
        model.c.data[3:].fill_(2.0)
        model.d.data.copy_(found["bias"].exp()[:2])

    probed = probe(lambda: Plain(c=("F32", (5,)), d=("BF16", (2,))), load, MIXED)
    catalog = Catalog.of([*MIXED, TensorSpec("bias as F32", "F32", (6,)), TensorSpec("d by toy", "BF16", (2,))])

    def layout(of: str, start: int, fill: float, d: str) -> Layout:
        pieces = [
            Piece(catalog.row[of], Box((start,), (start + 3,)), 0, 0, (4,)),
            Piece(catalog.row[d], Box((0,), (2,)), 1, 0, (2,)),
        ]
        constant = Constant(0, 12, (2,), (4,), np.float32(fill).tobytes())
        return Layout(catalog, ("c", "d"), np.array([20, 4], np.int64), Pieces.of(pieces, catalog.width), (constant,))

    assert agree(layout("bias as F32", 0, 2.0, "d by toy"), probed) == []
    wrong = {
        "first 0 (in memory order): the layout says bias[1]": layout("bias as F32", 1, 2.0, "d by toy"),
        "first 3 (in memory order): the layout says a constant 0x40400000, the probe a constant 0x40000000": layout(
            "bias as F32", 0, 3.0, "d by toy"
        ),
        "the layout says scale[0], the probe bias[0]": layout("scale", 0, 2.0, "d by toy"),
        "d: 2 of 2 elements differ, first 0 (in memory order): the layout says bias[0], the probe a computed value": layout(
            "bias as F32", 0, 2.0, "bias"
        ),
    }
    for text, lie in wrong.items():
        (difference,) = agree(lie, probed)
        assert text in difference


def test_a_parameter_that_the_trace_lacks_is_named() -> None:
    def build() -> Plain:
        return Plain(p=("BF16", (4, 6)), b=("BF16", (6,)))

    layout = traced(lambda w: {"p": w["w"]}, lambda: Plain(p=("BF16", (4, 6))))
    assert agree(layout, probe(build, lambda m, weights: m.load(weights, lambda w: {"p": w["w"]}), MIXED)) == []
    both = probe(build, lambda m, weights: m.load(weights, lambda w: {"p": w["w"], "b": w["bias"]}), MIXED)
    assert agree(layout, both) == ["b: missing from the layout, but the probe sees bias[0] in it"]
    assert agree(
        traced(lambda w: {"p": w["w"], "b": w["bias"]}, build),
        probe(lambda: Plain(p=("BF16", (4, 6))), lambda m, weights: m.load(weights, lambda w: {"p": w["w"]}), MIXED),
    ) == ["b: the model that was probed has no such tensor"]
