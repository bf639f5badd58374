"""Probes of loaders written in torch: every element is found where the same operations put the elements' numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from peerload.errors import ConfigError, LayoutError  # noqa: E402
from peerload.model.boxes import Box  # noqa: E402
from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.model.layout import Constant, Layout, Piece, Pieces  # noqa: E402
from peerload.tracing.dtypes import DTYPES  # noqa: E402
from peerload.tracing.probe.agree import agree  # noqa: E402
from peerload.tracing.probe.boxes import strided_boxes  # noqa: E402
from peerload.tracing.probe.codes import RANDOM_PASSES, code_of, digit_passes, patterns_of  # noqa: E402
from peerload.tracing.probe.decoded import told_boxes  # noqa: E402
from peerload.tracing.probe.run import (  # noqa: E402
    COMPUTED,
    CONSTANT,
    MOST_GROUPS,
    UNWRITTEN,
    Probed,
    changes,
    groups_of,
    probe,
)
from peerload.tracing.trace import trace_loader  # noqa: E402

common = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0")
INTEGERS = ("U8", "I8", "I16", "I32", "I64")

Weights = Mapping[str, Tensor]
Fill = Callable[[Weights], Mapping[str, Tensor]]


def specs(**shapes: tuple[str, tuple[int, ...]]) -> Catalog:
    return Catalog.of([TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()])


class Plain(nn.Module):
    """Parameters of given dtypes and shapes; `load` fills them with what `fill` makes of the weights."""

    def __init__(self, **shapes: tuple[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, (dtype, shape) in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype]), requires_grad=False))

    def load(self, weights: Iterable[tuple[str, Tensor]], fill: Fill) -> None:
        for name, values in fill(dict(weights)).items():
            getattr(self, name).data.copy_(values)


def numbers(catalog: Catalog) -> dict[str, Tensor]:
    """Every element its own number: what a probe must find, if its operations are run on these."""
    start, found = 0, {}
    for spec in catalog:
        n = int(np.prod(spec.shape, dtype=np.int64))
        found[spec.name] = torch.arange(start, start + n).reshape(spec.shape)
        start += n
    return found


@st.composite
def programs(draw: st.DrawFn) -> tuple[tuple[tuple[int, ...], ...], Callable[[list[Tensor]], Tensor]]:
    """Shapes of a few tensors, and slices, transpositions, splits of dimensions and a concatenation of them."""
    rows, columns = draw(st.integers(1, 6)), 2 * draw(st.integers(1, 4))
    count = draw(st.integers(1, 3))
    steps = draw(st.lists(st.sampled_from(["rows", "columns", "flip", "heads", "transpose"]), max_size=3))
    cuts = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))

    def run(tensors: list[Tensor]) -> Tensor:
        out = torch.cat(tensors, dim=0)
        for step in steps:
            if step == "rows":
                out = out[cuts[0] % out.shape[0] :]
            elif step == "columns":
                out = out[:, : max(1, out.shape[1] - cuts[1])]
            elif step == "transpose":
                out = out.t().contiguous()
            elif step == "flip":
                out = torch.cat([out[k : k + 1] for k in reversed(range(out.shape[0]))])
            elif out.shape[1] % 2 == 0:
                out = out.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        return out

    return ((rows, columns),) * count, run


@common
@given(programs(), st.sampled_from(FLOATS + INTEGERS))
def test_every_element_is_found(program: tuple, dtype: str) -> None:
    shapes, run = program
    catalog = Catalog.of([TensorSpec(f"t{i}", dtype, shape) for i, shape in enumerate(shapes)])
    expected = run(list(numbers(catalog).values()))
    probed = probe(
        lambda: Plain(p=(dtype, tuple(expected.shape))),
        lambda model, weights: model.load(weights, lambda w: {"p": run(list(w.values()))}),
        catalog,
    )
    seen = probed.buffers["p"]
    assert (seen.kind, seen.reason, seen.dtype) == ("copy", "", dtype)
    assert seen.ids.tolist() == expected.flatten().tolist()


@common
@given(st.data())
def test_boxes_say_exactly_what_they_were_made_of(data: st.DataObject) -> None:
    """Any multiset of elements at any positions."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    volume = int(np.prod(shape, dtype=np.int64))
    element = np.array(data.draw(st.lists(st.integers(0, volume - 1), min_size=1, max_size=30)), np.int64)
    at = np.array(data.draw(st.permutations(range(2 * len(element)))), np.int64)[: len(element)]
    found: list[tuple[int, int]] = []
    for box in strided_boxes(element, at, shape):
        for index in np.ndindex(*box.size):
            where = tuple(a + i for a, i in zip(box.first, index, strict=True))
            number = int(np.ravel_multi_index(where, shape)) if shape else 0
            found.append((number, box.at + sum(i * s for i, s in zip(index, box.step, strict=True))))
    assert sorted(found) == sorted(zip(element.tolist(), at.tolist(), strict=True))


@pytest.mark.parametrize(
    ("make", "boxes"),
    [
        (lambda n: n, 1),
        (lambda n: n.t(), 1),
        (lambda n: n[2:6, 3:9], 1),
        (lambda n: n.unflatten(0, (2, 4)).transpose(0, 1), 2),  # one box a head
        (lambda n: n.unflatten(1, (3, 4)).transpose(0, 1), 3),  # one box a tile of columns
        (lambda n: torch.cat([n[4:], n[:4]]), 2),
        (lambda n: n[:, [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]], 12),  # steps of two are no boxes
    ],
)
def test_few_boxes_where_few_suffice(make: Callable[[Tensor], Tensor], boxes: int) -> None:
    ids = make(torch.arange(96).reshape(8, 12)).flatten().numpy()
    assert len(strided_boxes(ids, np.arange(len(ids)), (8, 12))) <= boxes


MIXED = specs(
    w=("BF16", (4, 6)), scale=("F32", (3,)), w8=("F8_E4M3", (4, 6)), bias=("BF16", (6,)), index=("I32", (6,)), one=("F32", ())
)


def mixed(fill: Fill, **shapes: tuple[str, tuple[int, ...]]) -> Probed:
    return probe(lambda: Plain(**shapes), lambda model, weights: model.load(weights, fill), MIXED)


@pytest.mark.parametrize(
    ("what", "fill"),
    [
        ("one more", lambda w: w["bias"] + 1),
        ("inverted", lambda w: 1 / w["bias"]),
        ("the largest", lambda w: w["bias"].max().expand(6)),
        ("the smallest of two", lambda w: torch.minimum(w["bias"], w["w"][0])),
        ("the larger of two", lambda w: torch.maximum(w["bias"], w["w"][0])),
        ("sorted", lambda w: w["bias"].sort().values),
        ("negated", lambda w: -w["bias"]),
        ("rounded", lambda w: w["bias"].to(torch.float8_e5m2).to(torch.bfloat16)),
        ("a sum", lambda w: w["bias"] + w["w"][1]),
        ("chosen by another", lambda w: torch.where(w["w"][2] > w["w"][3], w["bias"], w["w"][0])),
    ],
)
def test_what_is_computed_never_passes_for_a_copy(what: str, fill: Callable[[Weights], Tensor]) -> None:
    seen = mixed(lambda w: {"p": fill(w)}, p=("BF16", (6,))).buffers["p"]
    assert seen.kind == "opaque", what
    assert "computed" in seen.reason


def test_each_dtype_has_a_code_of_its_own() -> None:
    """And casts are followed as long as they keep values apart."""
    copies = {"p": ("BF16", (4, 6)), "s": ("F32", (3,)), "q": ("F8_E4M3", (4, 6)), "i": ("I32", (6,)), "z": ("F32", ())}
    casts = {"b": ("F32", (6,)), "h": ("F16", (3,)), "d": ("BF16", (4, 6)), "j": ("I64", (6,))}
    held = {"p": "w", "s": "scale", "q": "w8", "i": "index", "z": "one", "b": "bias", "h": "scale", "d": "w8", "j": "index"}
    probed = mixed(lambda w: {name: w[origin] for name, origin in held.items()}, **copies, **casts)
    for name, seen in probed.buffers.items():
        expected = numbers(MIXED)[held[name]].flatten().tolist()
        assert (seen.kind, seen.ids.tolist()) == ("copy", expected), name
        assert seen.casts == ({held[name]} if name in casts else frozenset()), name


def test_a_cast_that_blurs_is_computed() -> None:
    assert mixed(lambda w: {"p": w["w"]}, p=("F8_E4M3", (4, 6))).buffers["p"].kind == "opaque"


def test_bytes_read_as_another_dtype_are_the_same_elements() -> None:
    catalog = specs(scale=("U8", (5,)))
    probed = probe(
        lambda: Plain(p=("F8_E8M0", (5,))),
        lambda model, weights: model.load(weights, lambda w: {"p": w["scale"].view(torch.float8_e8m0fnu)}),
        catalog,
    )
    assert probed.buffers["p"].kind == "copy"
    assert not probed.buffers["p"].casts


def test_constants_and_what_nobody_writes() -> None:
    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        model.p.data[:3].copy_(found["bias"][:3])
        model.p.data[3:5].fill_(0.0)
        model.minus.data.fill_(-1.0)

    shapes = {"p": ("BF16", (6,)), "minus": ("BF16", (2,)), "left": ("BF16", (2,)), "none": ("BF16", (0,))}
    probed = probe(lambda: Plain(**shapes), load, MIXED)
    first = numbers(MIXED)["bias"][0].item()
    assert probed.buffers["p"].ids.tolist() == [first, first + 1, first + 2, CONSTANT, CONSTANT, UNWRITTEN]
    assert {name: seen.kind for name, seen in probed.buffers.items()} == {
        "p": "copy",
        "minus": "constant",
        "left": "unwritten",
        "none": "empty",
    }


def test_tied_and_expanded_and_scattered_tensors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
            self.tied = self.a
            self.register_buffer("wide", torch.zeros(1, dtype=torch.bfloat16).expand(5))
            self.register_buffer("part", torch.zeros(4, 9, dtype=torch.bfloat16)[:, :6])

    def load(model: Model, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(weights)
        model.a.data.copy_(found["w"])
        model.wide[:1].copy_(found["bias"][2:3])
        model.part.copy_(found["w"])

    probed = probe(Model, load, MIXED)
    assert probed.buffers["tied"].shares == "a"
    assert probed.buffers["wide"].ids.tolist() == [numbers(MIXED)["bias"][2].item()]
    part = probed.buffers["part"]
    assert part.ids.tolist() == numbers(MIXED)["w"].flatten().tolist()
    assert part.offset is not None
    assert part.offset.tolist() == [9 * i + j for i in range(4) for j in range(6)]


def after(finish: Callable[[Plain], object], dtype: str = "BF16") -> tuple[str, str]:
    catalog = specs(w=(dtype, (4, 6)))

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        model.load(weights, lambda w: {"p": w["w"]})

    loaded = probe(lambda: Plain(p=(dtype, (4, 6))), load, catalog)
    processed = probe(lambda: Plain(p=(dtype, (4, 6))), load, catalog, finish=finish)
    return changes(loaded, processed)["p"]


def replaced(model: Plain, tensor: Tensor) -> None:
    model.p = nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    ("finish", "kind"),
    [
        (lambda m: None, "unchanged"),
        (lambda m: replaced(m, m.p.data.t()), "unchanged"),  # the same bytes
        (lambda m: replaced(m, m.p.data.t().contiguous()), "permuted"),
        (lambda m: replaced(m, torch.nn.functional.pad(m.p.data, (0, 2))), "permuted"),
        (lambda m: replaced(m, m.p.data / m.p.data.max()), "opaque"),
        (lambda m: replaced(m, torch.empty(0)), "gone"),
        (lambda m: delattr(m, "p"), "gone"),
        (lambda m: replaced(m, torch.ones(3)), "constant"),
        (lambda m: replaced(m, m.p.data[: 2 + int(m.p.data[0, 0]) % 2]), "opaque"),  # a shape out of a value
    ],
)
def test_what_post_processing_did(finish: Callable[[Plain], object], kind: str) -> None:
    assert after(finish)[0] == kind


def test_nibbles_are_followed_through_a_repack() -> None:
    """Rows of eight packed numbers, made into columns: no 32-bit word survives, every nibble does."""
    catalog = specs(q=("I32", (2, 3)), scale=("BF16", (3,)))

    def unpacked(words: Tensor) -> Tensor:
        return torch.stack([words >> 4 * i & 15 for i in range(8)], dim=-1).reshape(words.shape[0], -1)

    def packed(nibbles: Tensor) -> Tensor:
        rows = nibbles.reshape(nibbles.shape[0], -1, 8).long()
        word = sum(rows[..., i] << 4 * i for i in range(8))
        return torch.where(word >= 2**31, word - 2**32, word).int()

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        model.load(weights, lambda w: {"p": w["q"], "s": w["scale"]})

    def finish(model: Plain) -> None:
        model.p = nn.Parameter(packed(unpacked(model.p.data).reshape(2, 3, 8).transpose(0, 1).reshape(6, 8)), requires_grad=False)
        model.r = nn.Parameter(packed(unpacked(model.p.data).flip(1)), requires_grad=False)

    def build() -> Plain:
        return Plain(p=("I32", (2, 3)), s=("BF16", (3,)))

    whole = probe(build, load, catalog, finish=finish)
    assert whole.buffers["r"].kind == "opaque"
    probed = probe(build, load, catalog, finish=finish, bits=4)
    seen = probed.buffers["r"]
    assert (seen.kind, seen.split) == ("copy", 8)
    nibbles = torch.arange(48).reshape(2, 3, 8).transpose(0, 1).reshape(6, 8)
    assert probed.buffers["p"].ids.tolist() == nibbles.flatten().tolist()
    assert seen.ids.tolist() == nibbles.flip(1).flatten().tolist()
    assert probed.buffers["s"].kind == "copy"
    assert "boxes of 4-bit units: q[" in told_boxes(probed, seen)
    assert probed.numbering.name(9) == "q[0, 1] bits 4:8"


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


def test_what_cannot_be_probed_is_said() -> None:
    with pytest.raises(ConfigError, match="flag: a BOOL tensor"):
        probe(Plain, lambda model, weights: None, specs(flag=("BOOL", (3,))))
    with pytest.raises(ConfigError, match="meta device"):
        probe(lambda: Plain(p=("BF16", (3,))).to("meta"), lambda model, weights: None, MIXED)


def test_a_package_that_post_processing_lacks_is_said() -> None:
    def finish(model: Plain) -> None:
        raise ModuleNotFoundError("No module named 'kernels'")

    with pytest.raises(LayoutError, match=r"post-processing fails .*: ModuleNotFoundError: No module named 'kernels' at tests/"):
        probe(lambda: Plain(p=("BF16", (3,))), lambda model, weights: None, MIXED, finish=finish)


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


@pytest.mark.parametrize("wide", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_cast_to_floats_are_followed(dtype: str, wide: str) -> None:
    catalog = specs(other=("BF16", (300,)), shape=(dtype, (2, 300)))

    def load(model: Plain, weights: Iterable[tuple[str, Tensor]]) -> None:
        model.load(weights, lambda w: {"s": w["shape"][:, 1:]})

    probed = probe(lambda: Plain(s=(wide, (2, 299))), load, catalog)
    seen = probed.buffers["s"]
    assert (seen.kind, seen.casts) == ("copy", {"shape"})
    assert probed.origin(int(seen.ids[0])) == "shape[0, 1]"


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


def traced(fill: Fill, build: Callable[[], Plain]) -> Layout:
    model = build().to("meta")
    found = trace_loader(model, lambda weights: model.load(list(weights), fill), MIXED, parallel=Parallel(), rank=0, engine="toy")
    return found.layout


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


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_codes_are_positive_distinct_and_reversible(dtype: str) -> None:
    code = code_of(dtype)
    assert len(set(code.digits.tolist())) == len(code.digits)
    units = np.arange(1000, dtype=np.int64)
    digits = digit_passes(1000, {dtype: code})
    first, second = (code.patterns(units, digits + i, digits) for i in range(RANDOM_PASSES))
    assert (first != second).all(), "what never changes is taken for a constant"
    values = [
        torch.from_numpy(p.astype(f"u{DTYPES[dtype].itemsize}").view(f"i{DTYPES[dtype].itemsize}")) for p in (first, second)
    ]
    a, b = (v.view(DTYPES[dtype]).double() for v in values)
    assert (a > 0).all()
    assert a.isfinite().all()
    order = a.argsort(stable=True)
    assert (b[order].diff() <= 0).all(), "the second is in reverse order"
    assert patterns_of(a.to(DTYPES[dtype])).tolist() == first.tolist()


def test_all_computed_is_marked() -> None:
    assert set(mixed(lambda w: {"p": w["bias"] * 3}, p=("BF16", (6,))).buffers["p"].ids.tolist()) == {COMPUTED}
