"""Loaders that cannot be followed: what is refused, and what the error names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from toys import BF16, DEVICES, F32, Toy, W, traced  # noqa: E402

from peerload.errors import LayoutError  # noqa: E402
from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.tracing.trace import trace_loader  # noqa: E402

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
        assert "at tests/unit/test_loader_refusals.py:" in refused.value.message
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


def test_scattered_parameters_are_refused() -> None:
    class Wide(Toy):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.p = nn.Parameter(torch.zeros(8, 8, dtype=BF16)[:, :6], requires_grad=False)

    with pytest.raises(LayoutError, match=r"^p: .* lie scattered"):
        traced(lambda m, w: m.p.data.copy_(w["q"]), build=Wide)


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
