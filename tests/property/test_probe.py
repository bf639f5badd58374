"""Probes of loaders written in torch: every element is found where the same operations put the elements' numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from probed import FLOATS, INTEGERS, MIXED, Plain, Weights, mixed, numbers, specs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peerload.errors import ConfigError  # noqa: E402
from peerload.model.catalog import Catalog, TensorSpec  # noqa: E402
from peerload.tracing.dtypes import DTYPES  # noqa: E402
from peerload.tracing.probe.boxes import strided_boxes  # noqa: E402
from peerload.tracing.probe.codes import RANDOM_PASSES, code_of, digit_passes, patterns_of  # noqa: E402
from peerload.tracing.probe.run import COMPUTED, CONSTANT, UNWRITTEN, probe  # noqa: E402

common = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


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


def test_what_cannot_be_probed_is_said() -> None:
    with pytest.raises(ConfigError, match="flag: a BOOL tensor"):
        probe(Plain, lambda model, weights: None, specs(flag=("BOOL", (3,))))
    with pytest.raises(ConfigError, match="meta device"):
        probe(lambda: Plain(p=("BF16", (3,))).to("meta"), lambda model, weights: None, MIXED)


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
