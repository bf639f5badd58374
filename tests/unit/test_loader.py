"""Loaders of every kind seen in engines, followed on real memory and on meta, against the same loader run for real."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from toys import BF16, CATALOG, E4M3, F32, Toy, W, pieces, proved, traced  # noqa: E402

from peerload.model.catalog import TensorSpec  # noqa: E402
from peerload.testing.loader_oracle import values_of  # noqa: E402


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
