"""What tests of traced loaders share: a module whose loader is written in the test, traced and loaded for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

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
