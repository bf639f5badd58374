"""What a traced loader does to the module: parameters replaced, tied or left alone, tensors outside the parameters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from toys import BF16, CATALOG, DEVICES, F32, Toy, W, pieces, proved, traced  # noqa: E402

from peerload.errors import LayoutError  # noqa: E402
from peerload.model.catalog import Parallel  # noqa: E402
from peerload.testing.loader_oracle import differences, values_of  # noqa: E402
from peerload.tracing.trace import trace_loader  # noqa: E402


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
