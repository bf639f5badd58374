"""The recorder against the real thing: the same operations on tracked tensors and on tensors full of element numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from peerload.errors import LayoutError  # noqa: E402
from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.model.layout import Layout  # noqa: E402
from peerload.tracing.described import Describer  # noqa: E402
from peerload.tracing.recorder import Recorder  # noqa: E402
from peerload.tracing.storages import view_of  # noqa: E402
from peerload.tracing.views import Inexpressible, View, boxes, overlap, without  # noqa: E402

CATALOG = Catalog.of([TensorSpec("a", "I64", (6, 8)), TensorSpec("b", "I64", (4, 8)), TensorSpec("c", "I64", (6, 8))])
NUMBERS = {"a": torch.arange(48).view(6, 8), "b": torch.arange(100, 132).view(4, 8), "c": torch.arange(200, 248).view(6, 8)}


def tracked(recorder: Recorder, name: str) -> torch.Tensor:
    spec = CATALOG[CATALOG.row[name]]
    return recorder.source(name, (0,) * len(spec.shape), spec.shape, torch.int64)


def described(recorder: Recorder, catalog: Catalog = CATALOG, **parameters: torch.Tensor) -> Describer:
    describer = Describer(recorder.storages, catalog, Parallel(), 0, "toy 1.0")
    for name, tensor in parameters.items():
        describer.add(name, tensor)
    return describer


def describe(recorder: Recorder, **parameters: torch.Tensor) -> Layout:
    """Of parameters that hold copies and constants only."""
    describer = described(recorder, **parameters)
    assert describer.derived == {}
    return describer.layout({})


def reason(recorder: Recorder, parameter: torch.Tensor, catalog: Catalog = CATALOG) -> str:
    """Why the values of a parameter are no copies."""
    (derived,) = described(recorder, catalog, p=parameter).derived.values()
    return derived.reason


def executed(layout: Layout) -> list[np.ndarray]:
    """The buffers (of 8-byte elements) that a layout's pieces and constants describe."""
    buffers = [np.full(n // 8, -99, np.int64) for n in layout.buffer_nbytes.tolist()]
    for i in range(len(layout.pieces)):
        spec, box = layout.tensor_of(i), layout.box_of(i)
        strides = layout.pieces.stride[i, layout.catalog.width - len(spec.shape) :].tolist()
        memory = buffers[int(layout.pieces.buffer[i])][int(layout.pieces.offset[i]) // 8 :]
        np.lib.stride_tricks.as_strided(memory, box.shape, strides)[...] = NUMBERS[spec.name].numpy()[box.slices()]
    for c in layout.constants:
        memory = buffers[c.buffer][c.offset // 8 :]
        np.lib.stride_tricks.as_strided(memory, c.shape, c.strides)[...] = np.frombuffer(c.fill, np.int64)[0]
    return buffers


def in_memory_order(tensor: torch.Tensor) -> list[int]:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).tolist()


def rows_cut(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return source("a")[2:5].contiguous()


def columns_cut(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return source("a")[:, 3:7].contiguous()


def fused(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return torch.cat([source("a")[1:3], source("b")[:, :], source("c")[:1]], dim=0)


def beside(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return torch.cat([source("a")[:4, 5:], source("b")], dim=1).clone()


def experts(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Two stacks joined: what transformers makes of gate and up projections."""
    gate, up = torch.stack([source("a")[:4], source("b")]), torch.stack([source("c")[2:], source("b")])
    return torch.cat([gate, up], dim=1)


def transposed(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return source("a").t().contiguous()


def transposed_view(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return source("a")[1:4].t()[2:6].clone().t()


def heads(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Two halves of each of three heads exchanged: rows in another order, but whole."""
    return source("a").view(3, 2, 8).transpose(0, 1).reshape(6, 8)


def written(source: Callable[[str], torch.Tensor]) -> torch.Tensor:
    made = torch.cat([source("a"), source("c")])
    made.zero_()
    made[3:7].copy_(source("b"))
    made[5:6, 2:4].fill_(7)
    made.view(-1)[90:].copy_(source("a")[0, :6])
    return made


PROGRAMS = [rows_cut, columns_cut, fused, beside, experts, transposed, transposed_view, heads, written]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_element_is_where_the_operations_put_it(program: Callable[[Callable[[str], torch.Tensor]], torch.Tensor]) -> None:
    with Recorder() as recorder:
        parameter = program(lambda name: tracked(recorder, name))
        assert parameter.device.type == "meta"
    layout = describe(recorder, p=parameter)
    layout.prove_cover()
    real = program(lambda name: NUMBERS[name].clone())
    assert parameter.shape == real.shape
    assert parameter.stride() == real.stride()
    assert executed(layout)[0].tolist() == in_memory_order(real)


def test_blocks_stay_blocks() -> None:
    with Recorder() as recorder:
        p, q = (program(lambda name: tracked(recorder, name)) for program in (experts, columns_cut))
        layout = describe(recorder, p=p, q=q)
    assert [layout.describe(i) for i in range(5)] == ["a[0:4, 0:8]", "c[2:6, 0:8]", "b[0:4, 0:8]", "b[0:4, 0:8]", "a[0:6, 3:7]"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    recorder = Recorder()
    pairs = [(tracked(recorder, name), NUMBERS[name].clone()) for name in "abc"]

    def both(function: Callable[..., torch.Tensor], *which: int) -> None:
        with recorder:
            shadow = function(*(pairs[i][0] for i in which))
        pairs.append((shadow, function(*(pairs[i][1] for i in which))))

    for _ in range(data.draw(st.integers(1, 6))):
        i = data.draw(st.integers(0, len(pairs) - 1))
        shape = pairs[i][1].shape
        dim = data.draw(st.integers(0, len(shape) - 1))
        operation = data.draw(st.sampled_from(["narrow", "transpose", "split", "clone", "cat", "stack", "copy", "flatten"]))
        like = [j for j, (_, real) in enumerate(pairs) if real.shape == shape]
        other = data.draw(st.sampled_from(like))
        if operation == "narrow":
            start = data.draw(st.integers(0, shape[dim] - 1))
            size = data.draw(st.integers(1, shape[dim] - start))
            both(lambda t, d=dim, s=start, n=size: t.narrow(d, s, n), i)
        elif operation == "transpose":
            both(lambda t, d=dim: t.transpose(0, d), i)
        elif operation == "split" and len(shape) < 4:
            parts = data.draw(st.sampled_from([k for k in range(1, shape[dim] + 1) if shape[dim] % k == 0]))
            both(lambda t, d=dim, k=parts: t.unflatten(d, (k, -1)), i)
        elif operation == "clone":
            both(lambda t: t.contiguous().clone(), i)
        elif operation == "cat":
            both(lambda t, u, d=dim: torch.cat([t, u, t], d), i, other)
        elif operation == "stack" and len(shape) < 4:
            both(lambda t, u, d=dim: torch.stack([t, u], d), i, other)
        elif operation == "copy":
            both(lambda t, u: torch.cat([t, t]).narrow(0, 1, t.shape[0]).copy_(u), i, other)
        elif operation == "flatten":
            both(lambda t: t.reshape(-1), i)
        with recorder:
            parameter = pairs[-1][0].contiguous().clone()
        describer = described(recorder, p=parameter)
        for derived in describer.derived.values():
            assert "divide" in derived.reason or "boxes" in derived.reason  # anything else is a defect
        assume(not describer.derived)
        layout = describer.layout({})
        layout.prove_cover()
        assert executed(layout)[0].tolist() == pairs[-1][1].flatten().tolist()


def views(base: Sequence[int]) -> st.SearchStrategy[View]:
    @st.composite
    def draw_view(draw: st.DrawFn) -> View:
        t = torch.empty(tuple(base), device="meta")
        t = t.flatten() if draw(st.booleans()) else t
        for _ in range(draw(st.integers(0, 4))):
            dim = draw(st.integers(0, t.dim() - 1))
            kind = draw(st.sampled_from(["narrow", "transpose", "split"]))
            if kind == "narrow":
                start = draw(st.integers(0, t.shape[dim] - 1))
                t = t.narrow(dim, start, draw(st.integers(1, t.shape[dim] - start)))
            elif kind == "transpose":
                t = t.transpose(0, dim)
            else:
                parts = [k for k in range(1, t.shape[dim] + 1) if t.shape[dim] % k == 0]
                t = t.unflatten(dim, (draw(st.sampled_from(parts)), -1))
        return view_of(t)

    return draw_view()


def offsets(view: View) -> np.ndarray:
    steps = (i * s for i, s in zip(np.indices(view.shape), view.stride, strict=True))
    return sum(steps, np.full(view.shape, view.offset))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3))
def test_overlap_and_difference_of_views(data: st.DataObject, base: list[int]) -> None:
    a, b = data.draw(views(base)), data.draw(views(base))
    try:
        shared, rest = overlap(a, b), without(a, b)
    except Inexpressible:
        assume(False)
    mine, theirs = offsets(a), offsets(b)
    both, only = set(mine.flat) & set(theirs.flat), set(mine.flat) - set(theirs.flat)
    target = View(0, a.shape, tuple(int(np.prod(a.shape[d + 1 :])) for d in range(len(a.shape))))
    for cells, seen, into, expected in ((shared, theirs, target, both), (rest, mine, a, only)):
        found: list[int] = []
        for first, view in itertools.chain.from_iterable(boxes(cell, into, seen.ndim) for cell in cells):
            block = seen[tuple(slice(f, f + n) for f, n in zip(first, view.shape, strict=True))]
            where = offsets(view)
            assert np.array_equal(mine.flat[where] if into is target else where, block)
            found += block.flat
        assert sorted(found) == sorted(expected)


def test_names_that_share_memory_are_aliases() -> None:
    with_aliases = pytest.importorskip("peerload.engines.transformers.aliases").with_aliases
    with Recorder() as recorder:
        layout = describe(recorder, a=tracked(recorder, "a"), other=tracked(recorder, "b"))
    layout = with_aliases(layout, [("a", "tied"), ("other",)])
    assert layout.aliases == {"tied": "a"}
    assert layout.buffer_names == ("a", "other")
    assert [layout.describe(i) for i in range(3)] == ["a[0:6, 0:8]", "b[0:4, 0:8]", "tied[0:6, 0:8]"]
    layout.prove_cover()


def test_a_tensor_equals_itself_and_is_not_compared_with_another() -> None:
    with Recorder() as recorder:
        a, c = tracked(recorder, "a"), tracked(recorder, "c")
        assert torch.equal(a, a.view(6, 8))
        with pytest.raises(LayoutError, match=r"^a, c: the engine's loader applies aten::equal"):
            torch.equal(a, c)
        assert len(recorder.refusals) == 1


def test_parameters_that_exist_before_loading() -> None:
    parameter = torch.empty(6, 8, dtype=torch.int64, device="meta")
    with Recorder() as recorder:
        recorder.storages.watch({"weight": parameter})
        parameter[:4].copy_(tracked(recorder, "b"))
        assert reason(recorder, parameter) == "16 of its 48 elements are neither a checkpoint tensor's nor a stated constant"
        parameter[4:].fill_(5)
        assert executed(describe(recorder, weight=parameter))[0].tolist() == [*range(100, 132), *[5] * 16]


def test_what_has_no_layout_is_named() -> None:
    with Recorder() as recorder:
        with pytest.raises(LayoutError, match=r"^extra: the engine made it without a checkpoint tensor"):
            describe(recorder, extra=torch.ones(3))
        with pytest.raises(LayoutError, match=r"^cut: its .* lie scattered"):
            describe(recorder, cut=tracked(recorder, "a")[:, :3])


def test_what_shuffles_elements_counts_as_computed() -> None:
    """Halves interleaved are two boxes; their separation is one box for each pair of rows, since boxes have no steps."""
    catalog = Catalog.of([TensorSpec("w", "I64", (1024, 4))])
    with Recorder() as recorder:
        source = recorder.source("w", (0, 0), (1024, 4), torch.int64)
        interleaved = source.view(2, 512, 4).transpose(0, 1).reshape(1024, 4)
        assert len(described(recorder, catalog, w=interleaved).layout({}).pieces) == 2
        assert "it takes 512 boxes" in reason(recorder, source.view(512, 2, 4).transpose(0, 1).reshape(1024, 4), catalog)


def test_memory_reused_by_torch_is_not_mistaken() -> None:
    """Storages come and go at the same addresses; what was known of a dead one must not stick to its successor."""
    recorder = Recorder()
    for _ in range(200):
        with recorder:
            del_me = tracked(recorder, "a").clone()
            del del_me
        assert not recorder.known(torch.empty(6, 8, dtype=torch.int64, device="meta"))
