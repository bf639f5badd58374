"""Loaders of every kind seen in engines, followed on real memory and on meta, against the same loader run for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from peerload.errors import LayoutError  # noqa: E402
from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.testing.loader_oracle import differences, values_of  # noqa: E402
from peerload.tracing.trace import Traced, trace_loader  # noqa: E402

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
CATALOG = Catalog.of(
    [
        TensorSpec("q", "BF16", (8, 6)),
        TensorSpec("k", "BF16", (4, 6)),
        TensorSpec("v", "BF16", (4, 6)),
        TensorSpec("wide", "F32", (8, 6)),
        TensorSpec("bias", "F32", (8,)),
        TensorSpec("scale", "F32", (1,)),
        TensorSpec("point", "F32", ()),
        TensorSpec("fp8", "F8_E4M3", (8, 6)),
        TensorSpec("ints", "I32", (8,)),
        TensorSpec("vocab", "BF16", (10, 6)),
    ]
)
DEVICES = ["meta", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Load = Callable[["Toy", dict[str, Tensor]], object]


class Toy(nn.Module):
    """Parameters `a`, `b`, ... of the shapes and dtypes asked for, full of what the constructor left in them."""

    def __init__(self, load: Load, *parameters: tuple[tuple[int, ...], torch.dtype]) -> None:
        super().__init__()
        self.load = load
        for name, (shape, dtype) in zip("abcdefgh", parameters, strict=False):
            left = torch.arange(1, math.prod(shape) + 1).to(torch.uint8).to(dtype).reshape(shape)
            self.register_parameter(name, nn.Parameter(left, requires_grad=False))
        self.register_buffer("cache", torch.arange(5.0))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.load(self, dict(weights))


def traced(
    load: Load, *parameters: tuple[tuple[int, ...], torch.dtype], device: str = "cpu", build: Callable[..., Toy] = Toy
) -> tuple[Traced, Toy]:
    with torch.device(device):
        model = build(load, *parameters)
    return trace_loader(model, model.load_weights, CATALOG, parallel=Parallel(2), rank=1, engine="toy 1.0"), model


def proved(load: Load, *parameters: tuple[tuple[int, ...], torch.dtype], build: Callable[..., Toy] = Toy) -> Traced:
    """Traced on meta and on real memory, all compared with a real load; the last one is returned."""
    values, truth = values_of(CATALOG), build(load, *parameters)
    truth.load_weights(values.items())
    for device in DEVICES:
        result, model = traced(load, *parameters, device=device, build=build)
        assert differences(result, model, truth, values) == []
    return result


def pieces(result: Traced) -> list[str]:
    return [result.layout.describe(i) for i in range(len(result.layout.pieces))]


W = ((8, 6), BF16)


def test_fused_and_cut_and_padded() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        for at, size, name in ((0, 4, "q"), (4, 2, "k"), (6, 2, "v")):
            m.a.data.narrow(0, at, size).copy_(w[name].narrow(0, size, size))
        m.b[:5].data.copy_(w["vocab"][5:])
        m.b[5:].data.fill_(0)

    result = proved(load, W, ((6, 6), BF16))
    assert pieces(result) == ["q[4:8, 0:6]", "k[2:4, 0:6]", "v[2:4, 0:6]", "vocab[5:10, 0:6]"]
    assert [(c.offset, c.shape, c.fill) for c in result.layout.constants] == [(60, (1, 6), b"\0\0")]
    assert result.derived == {}
    assert result.made == ("cache",)
    assert set(result.layout.ignored) == {"wide", "bias", "scale", "point", "fp8", "ints"}


MOVES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "transposed": lambda w: w["q"][:, :4].t().contiguous(),
    "transposed view": lambda w: w["q"].t(),
    "chunked": lambda w: torch.chunk(w["q"], 2, dim=1)[1].contiguous(),
    "flipped": lambda w: w["k"].flip(0),
    "flipped twice": lambda w: w["k"].flip(0, 1),
    "rolled": lambda w: w["q"].roll(3, 0),
    "repeated": lambda w: w["k"].repeat(2, 1),
    "interleaved": lambda w: w["k"].repeat_interleave(2, dim=0),
    "expanded": lambda w: w["k"][:1].expand(4, 6),
    "picked": lambda w: w["q"].index_select(0, torch.tensor([6, 7, 0, 2, 4], device="cpu")),
    "by a vector": lambda w: w["q"][:, torch.tensor([4, 5, 0, 1], device="cpu")],
    "by a mask": lambda w: w["q"][torch.tensor([True, False] * 4, device="cpu")],
    "every second": lambda w: w["q"][::2],
    "interleaved halves": lambda w: w["q"].view(2, 4, 6).transpose(0, 1).reshape(8, 6),
    "permuted heads": lambda w: w["q"].view(2, 2, 2, 6).permute(2, 0, 1, 3).reshape(8, 6),
    "stacked": lambda w: torch.stack([w["k"], w["v"]]).flatten(0, 1),
    "joined with zeros": lambda w: torch.cat([w["k"], w["k"].new_zeros(2, 6)]),
    "joined with real zeros": lambda w: torch.cat([w["k"], torch.zeros(2, 6, dtype=BF16, device=w["k"].device)]),
    "padded": lambda w: nn.functional.pad(w["k"], (1, 1, 0, 2), value=3.0),
    "in a buffer": lambda w: _through_a_buffer(w),
    "scattered": lambda w: w["q"].slice_scatter(w["k"], 0, 2, 6).select_scatter(w["v"][0], 0, 7),
    "index_put": lambda w: _placed(w),
    "index_copy": lambda w: torch.zeros_like(w["q"]).index_copy_(0, torch.tensor([7, 1, 2, 3], device="cpu"), w["k"]),
    "as bytes and back": lambda w: w["q"].view(torch.int16)[2:].view(BF16),
    "there and back": lambda w: w["q"].float().double().to(BF16),
}


def _through_a_buffer(w: dict[str, Tensor]) -> Tensor:
    buffer = torch.zeros(8, 6, dtype=BF16)
    buffer[2:6] = w["k"]
    return buffer


def _placed(w: dict[str, Tensor]) -> Tensor:
    out = w["q"].clone()
    out[torch.tensor([6, 7, 0, 1], device="cpu")] = w["k"]
    return out


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("mode", ["plain", "inference"])
def test_moves_are_followed_as_copies(name: str, mode: str) -> None:
    shape = tuple(MOVES[name](values_of(CATALOG)).shape)

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        with torch.inference_mode(mode == "inference"):
            m.a.data.copy_(MOVES[name](w))

    assert proved(load, (shape, BF16)).derived == {}


def test_index_vectors_on_a_device_without_values_are_not_guessed() -> None:
    """torch itself puts a list on the device of what it indexes."""

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"][torch.tensor([3, 0], device=m.a.device)])

    assert traced(load, ((2, 6), BF16))[0].derived == {}
    result, _ = traced(load, ((2, 6), BF16), device="meta")
    assert [d.covers for d in result.derived.values()] == [("q",)]
    result, _ = traced(lambda m, w: m.a.data.copy_(w["q"][[3, 0]]), ((2, 6), BF16))
    assert [d.covers for d in result.derived.values()] == [("q",)]


def test_casts_are_tensors_of_their_own() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"])  # wider
        m.b.data[:4].copy_(w["wide"][2:6])  # narrower
        m.b.data[4:].copy_(w["wide"][:4].to(E4M3))  # through a narrower one
        m.c.data.copy_(w["q"].float().to(torch.float16))  # through a wider one
        m.d.data.copy_(w["ints"])
        m.e.data.fill_(0.1)
        m.e.data[:3] = m.e.data[:3].to(F32)

    result = proved(load, ((8, 6), F32), W, ((8, 6), torch.float16), ((8,), torch.int64), ((8,), BF16))
    assert pieces(result) == [
        "q as F32[0:8, 0:6]",
        "wide as BF16[2:6, 0:6]",
        "wide as F8_E4M3 as BF16[0:4, 0:6]",
        "q as F16[0:8, 0:6]",
        "ints as I64[0:8]",
    ]
    catalog = result.layout.catalog
    assert catalog[catalog.row["q as F32"]] == TensorSpec("q as F32", "F32", (8, 6))
    assert result.derived["q as F32"].reason == "cast BF16 to F32"
    assert (result.derived["q as F32"].parameter, result.derived["q as F32"].covers) == ("a", ("q",))
    assert "q" in catalog.row
    assert "q" not in result.layout.ignored


COMPUTED: dict[str, tuple[Callable[[Toy, dict[str, Tensor]], object], tuple[str, ...], str]] = {
    "exp": (lambda m, w: m.a.data.copy_(-torch.exp(w["q"].float())), ("q",), "aten::neg"),
    "sum": (lambda m, w: m.a.data.copy_(w["q"] + w["k"].repeat(2, 1)), ("k", "q"), "aten::add"),
    "with a parameter": (lambda m, w: m.a.data.copy_(w["q"] * m.b.data[0, 0]), ("q",), "aten::mul"),
    "in place": (lambda m, w: m.a.data.copy_(w["q"]).add_(1), ("q",), "aten::add_"),
    "augmented": (lambda m, w: setattr(m.a, "data", m.a.data.add_(w["q"])), ("q",), "aten::add_"),
    "where": (lambda m, w: m.a.data.copy_(torch.where(w["q"] > 1, w["q"], 0.0)), ("q",), "aten::where"),
    "sorted": (lambda m, w: m.a.data.copy_(w["q"].sort(0).values), ("q",), "aten::sort"),
    "float as integer": (lambda m, w: m.a.data.copy_(w["wide"].to(torch.int32).to(BF16)), ("wide",), "cast of wide"),
    "seen as another dtype": (lambda m, w: m.a.data.copy_(w["q"].view(torch.int16)), ("q",), "cast of q"),
    "read as narrower": (lambda m, w: m.a.data.copy_(w["wide"].view(BF16)[:, :6]), ("wide",), "4 bytes read as"),
    "gathered": (lambda m, w: m.a.data.copy_(w["q"].gather(0, torch.zeros_like(w["q"]).long())), ("q",), "aten::gather"),
    "out": (lambda m, w: torch.mul(w["q"], 2, out=m.a.data), ("q",), "aten::mul"),
    "in the end": (lambda m, w: (m.a.data.copy_(w["q"]), m.a.data.div_(w["scale"])), ("q", "scale"), "aten::div_"),
    "shuffled": (lambda m, w: m.a.data.copy_(w["q"].flatten()[torch.randperm(48, device="cpu")].view(8, 6)), ("q",), ""),
    "two for one place": (lambda m, w: [m.a.data.copy_(w[n]) for n in ("q", "vocab_")], ("q", "wide"), "one place"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_values_are_marked_with_their_sources(name: str) -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        with torch.no_grad():
            COMPUTED[name][0](m, {**w, "vocab_": w["wide"].to(BF16)})

    _, covers, reason = COMPUTED[name]
    if name == "shuffled":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            assert traced(load, W, W)[0].layout.nbytes == 96
        return
    result = proved(load, W, W)
    (derived,) = result.derived.values()
    assert (derived.parameter, derived.covers) == ("a", covers)
    assert reason in derived.reason
    assert pieces(result) == ["a by toy 1.0 tp2 ep1 pp1 rank 1[0:8, 0:6]"]


def test_only_the_computed_region_is_derived() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data[:4, :3].copy_(w["k"][:, :3] * 2)
        m.a.data[4:].copy_(w["v"])
        m.a.data[:4, 3:].copy_(w["k"][:, 3:])

    assert pieces(proved(load, W)) == ["k[0:4, 3:6]", "v[0:4, 0:6]", "a by toy 1.0 tp2 ep1 pp1 rank 1[0:4, 0:3]"]


def test_elements_nobody_wrote_are_derived_and_say_so() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data[:4].copy_(w["k"])

    result = proved(load, W)
    (derived,) = result.derived.values()
    assert derived.reason == "24 of its 48 elements are neither a checkpoint tensor's nor a stated constant"
    assert derived.covers == ("k",)


def test_one_element_by_value() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.fill_(w["scale"].item())
        m.b.data[1] = w["point"]
        m.b.data[0] = w["scale"].item()
        m.b.data[2:].fill_(w["point"])
        m.c.data.copy_(w["point"].reshape(1))

    result = proved(load, ((1,), F32), ((4,), F32), ((1,), BF16))
    assert pieces(result) == ["scale[0:1]", "scale[0:1]", "point[]", "point[]", "point[]", "point as BF16[]"]


VALUES: dict[str, Callable[[Toy, dict[str, Tensor]], object]] = {
    "arithmetic": lambda m, w: m.a.data.fill_(w["scale"].item() * 2),
    "reflected": lambda m, w: m.a.data.fill_(2.0 - w["scale"].item()),
    "rounded": lambda m, w: m.a.data.fill_(round(w["scale"].item())),
    "compared": lambda m, w: m.a.data.fill_(1.0 if w["scale"].item() > 0 else 0.0),
    "equal": lambda m, w: m.a.data.fill_(1.0 if w["scale"].item() == 0 else 0.0),
    "max": lambda m, w: m.a.data.fill_(max(1.0, w["scale"].item())),
    "min": lambda m, w: m.a.data.fill_(min(w["scale"].item(), 1.0)),
    "truth": lambda m, w: m.a.data.fill_(1.0 if w["scale"].item() else 0.0),
    "a set": lambda m, w: m.a.data.fill_(1.0 if w["scale"].item() in {0.0, 1.0} else 0.0),
    "float()": lambda m, w: m.a.data.fill_(float(w["scale"].item())),
    "int()": lambda m, w: m.a.data.fill_(int(w["scale"].item())),
    "real": lambda m, w: m.a.data.fill_(w["scale"].item().real),
    "math": lambda m, w: m.a.data.fill_(math.sqrt(w["scale"].item())),
    "full": lambda m, w: m.a.data.copy_(torch.full((1,), w["scale"].item())),
    "a tensor": lambda m, w: m.a.data.copy_(torch.tensor([w["scale"].item()])),
    "multiplied": lambda m, w: m.a.data.mul_(w["scale"].item()),
    "tensor truth": lambda m, w: m.a.data.fill_(1.0 if w["scale"] > 0 else 0.0),
    "tensor float()": lambda m, w: m.a.data.fill_(float(w["scale"])),
    "tolist": lambda m, w: m.a.data.fill_(w["scale"].tolist()[0]),
    "numpy": lambda m, w: m.a.data.copy_(torch.from_numpy(w["scale"].numpy())),
    "nonzero": lambda m, w: m.a.data.copy_(w["bias"][w["bias"] > 2][:1]),
    "unique": lambda m, w: m.a.data.copy_(w["bias"].unique()[:1]),
    "equality": lambda m, w: m.a.data.fill_(1.0 if torch.equal(w["q"], w["fp8"].to(BF16)) else 0.0),
    "allclose": lambda m, w: m.a.data.fill_(1.0 if torch.allclose(w["q"], w["q"]) else 0.0),
    "kept": lambda m, w: setattr(m, "scale_float", w["scale"].item()),
    "kept in a list": lambda m, w: setattr(m, "scales", [w["scale"].item()]),
    "of a parameter": lambda m, w: m.a.data.fill_(m.a.data.copy_(w["scale"]).max().item() + 1),
    "resized": lambda m, w: w["scale"].resize_(2),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_needs_values_is_refused(name: str, device: str) -> None:
    with pytest.raises(LayoutError):
        traced(VALUES[name], ((1,), F32), device=device)


def test_a_refusal_that_the_engine_swallows_is_raised_all_the_same() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["scale"])
        try:
            w["scale"].item() + 1
        except Exception:  # noqa: BLE001 as engines do
            m.a.data.fill_(1.0)

    with pytest.raises(LayoutError, match=r"^scale: the engine's loader applies item\(\)"):
        traced(load, ((1,), F32))


def test_a_loader_that_fails_is_named() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        raise KeyError("no such parameter")

    with pytest.raises(LayoutError, match="KeyError: 'no such parameter'"):
        traced(load, W)


def test_the_tensor_that_it_was_loading_and_its_line_are_named() -> None:
    """The last tensor that the loader has asked for, and those in its hands; a loader that has read all has only the latter."""

    class OneByOne(Toy):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            for name, loaded in weights:
                parameter = self.a.data
                if name == "k":
                    parameter.copy_(loaded)

    for names, build, load in (("k, a", OneByOne, lambda m, w: None), ("a, k", Toy, too_small)):
        with pytest.raises(LayoutError) as refused:
            traced(load, W, build=build)
        assert refused.value.message.startswith(f"{names}: the engine's loader fails: RuntimeError: ")
        assert "at tests/unit/test_loader.py:" in refused.value.message
        assert refused.value.message.endswith("copy_(loaded))")
        assert "likely to fail in the same place" in refused.value.next_step

    def asks(m: Toy, w: dict[str, Tensor]) -> None:
        chosen = (w["point"] > 0).nonzero()  # on meta, how many that are is unknown
        m.a.data.copy_(w["q"][chosen[0]])

    with pytest.raises(LayoutError, match=r"point: the engine's loader ") as refused:
        traced(asks, W, device="meta")
    assert "let the engine load this model" in refused.value.next_step


def too_small(m: Toy, w: dict[str, Tensor]) -> None:
    parameter, loaded = m.a.data, w["k"]
    parameter.copy_(loaded)


def test_parameters_of_the_engine_keep_their_values() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"])
        m.c.data.copy_(m.b.data)  # one made out of another
        m.d.data.mul_(2)
        if m.d.data[0].item() > 1 and bool((m.b == m.c).all()):
            m.e.data.copy_(torch.arange(3.0))
        m.cache += 1

    result, model = traced(load, W, ((2,), F32), ((2,), F32), ((2,), F32), ((3,), F32))
    truth = Toy(load, W, ((2,), F32), ((2,), F32), ((2,), F32), ((3,), F32))
    truth.load_weights(values_of(CATALOG).items())
    assert differences(result, model, truth, values_of(CATALOG)) == []
    assert result.made == ("b", "c", "d", "e", "cache")
    assert result.tensors.keys() == {"a"}


def test_values_of_the_engine_beside_those_of_the_checkpoint() -> None:
    """Nobody can send them but a twin, so the region is derived; nothing but such values is refused when noted elsewhere."""

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        joined = torch.cat([m.b.data, w["scale"].to(m.b.device)])
        m.a.data.copy_(joined)

    result = proved(load, ((3,), F32), ((2,), F32))
    assert pieces(result) == ["scale[0:1]", "a by toy 1.0 tp2 ep1 pp1 rank 1[0:2]"]

    def cut(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(torch.cat([m.b.data, w["scale"].to(m.b.device)])[:2])

    with pytest.raises(LayoutError, match=r"^a: the engine's own values, from elsewhere, and no checkpoint tensor"):
        traced(cut, ((2,), F32), ((2,), F32))


def test_constants_are_written_so_that_the_engine_may_read_them() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(torch.zeros_like(w["bias"]))
        m.a.data.add_(2)
        m.b.data.copy_(torch.full_like(w["q"], 0.1).to(F32))
        m.c.data.copy_(torch.full((4,), 7.0))

    result = proved(load, ((8,), F32), ((8, 6), F32), ((4,), F32))
    assert result.layout.buffer_names == ("b", "c")
    assert result.made == ("a", "cache")


def test_parameters_that_become_the_tensors_themselves() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data = w["q"].t().contiguous()
        m.b = nn.Parameter(w["k"].clone(), requires_grad=False)
        m.c.data = w["v"]
        m.d = m.c

    result = proved(load, ((6, 8), BF16), W, W, W)
    assert pieces(result) == ["q[0:8, 0:6]", "k[0:4, 0:6]", "v[0:4, 0:6]"]
    assert result.layout.buffer_names == ("a", "b", "c")
    assert {t.device.type for t in result.tensors.values()} == {DEVICES[-1]}


def test_a_parameter_that_waits_on_meta_for_its_memory_is_left_alone() -> None:
    class Waiting(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.later = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)

    result, model = traced(lambda m, w: m.a.data.copy_(w["q"]), W, build=Waiting)
    assert model.later.device.type == "meta"
    assert result.made == ("later", "cache")


def test_an_uninitialised_parameter() -> None:
    class Lazy(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.lazy = nn.UninitializedParameter(requires_grad=False)

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.lazy.materialize((10, 6), dtype=BF16)
        m.lazy.data[:8].copy_(w["q"])
        m.lazy.data[8:].zero_()

    assert pieces(proved(load, build=Lazy)) == ["q[0:8, 0:6]"]


def test_ties_and_views_share_a_buffer() -> None:
    class Tied(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.head = self.a
            self.transposed = self.a.data.t()
            self.row = nn.Parameter(self.a.data[3], requires_grad=False)

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.head.data.copy_(w["q"])
        m.later = m.a.data[2:]

    result = proved(load, W, build=Tied)
    assert result.layout.buffer_names == ("a",)
    assert result.hidden == {}


class Scales:
    """A plain object that a module holds, as quantization methods are."""

    __slots__ = ("given", "late")

    def __init__(self, given: Tensor) -> None:
        self.given = given


def test_tensors_outside_the_parameters() -> None:
    class Odd(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.method = Scales(torch.zeros(8))
            self.tables = {"one": [torch.zeros(4, 6, dtype=BF16)]}

    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"])
        m.method.given.copy_(w["bias"])  # existed: it is a buffer like any other
        m.tables["one"][0].copy_(w["k"])
        m.method.late = w["scale"] * 2
        m.w_kc = m.a.data.t().contiguous()
        m.cache = m.cache * 2

    result = proved(load, W, build=Odd)
    assert result.layout.buffer_names == ("a", "method.given", "tables.one[0]")
    assert result.hidden == {"w_kc": "a copy of q", "method.late": "computed: aten::mul of scale"}
    assert result.layout.ignored["scale"] == "only in method.late, which the engine makes of it"
    assert result.made == ("cache",)


def test_every_rank_of_a_split_model_says_which_rank_it_is() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"] + 1)

    names = []
    for rank in (0, 1):
        model = Toy(load, W)
        result = trace_loader(model, model.load_weights, CATALOG, parallel=Parallel(2, 3, 2), rank=rank, engine="toy 1")
        names += result.derived
    assert names == ["a by toy 1 tp2 ep2 pp3 rank 0", "a by toy 1 tp2 ep2 pp3 rank 1"]


def test_scattered_parameters_are_refused() -> None:
    class Wide(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.p = nn.Parameter(torch.zeros(8, 8, dtype=BF16)[:, :6], requires_grad=False)

    with pytest.raises(LayoutError, match=r"^p: .* lie scattered"):
        traced(lambda m, w: m.p.data.copy_(w["q"]), build=Wide)


def test_memory_is_not_written_but_for_constants() -> None:
    def load(m: Toy, w: dict[str, Tensor]) -> None:
        m.a.data.copy_(w["q"])
        m.b.data[:4].copy_(w["k"])
        m.b.data[4:].zero_()

    _, model = traced(load, W, W)
    fresh = Toy(load, W, W)
    assert torch.equal(model.a, fresh.a)
    assert torch.equal(model.b[:4], fresh.b[:4])
    assert not model.b[4:].any()


@pytest.mark.parametrize("look", [Tensor.tolist, Tensor.numpy, np.asarray], ids=["tolist", "numpy", "asarray"])
def test_memory_read_outside_torch_is_refused(look: Callable[[Tensor], Iterable[float]]) -> None:
    """What is there isn't what a load would have put there."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.full((4,), 7.0), requires_grad=False)
    model.width = nn.Parameter(torch.zeros(4), requires_grad=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "scale":
                model.scale.data.copy_(tensor)
            else:
                model.width.data.fill_(float(max(look(model.scale.data))))

    catalog = Catalog.of([TensorSpec("scale", "F32", (4,)), TensorSpec("width", "F32", (4,))])
    with pytest.raises(LayoutError, match="scale: the engine's loader applies"):
        trace_loader(model, load, catalog, parallel=Parallel(), rank=0, engine="x 1")
