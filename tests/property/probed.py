"""What tests of the probe share: modules whose loader is written in the test, a checkpoint of every dtype, its trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.model.layout import Layout  # noqa: E402
from peerload.tracing.dtypes import DTYPES  # noqa: E402
from peerload.tracing.probe.run import Probed, probe  # noqa: E402
from peerload.tracing.trace import trace_loader  # noqa: E402

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


MIXED = specs(
    w=("BF16", (4, 6)), scale=("F32", (3,)), w8=("F8_E4M3", (4, 6)), bias=("BF16", (6,)), index=("I32", (6,)), one=("F32", ())
)


def mixed(fill: Fill, **shapes: tuple[str, tuple[int, ...]]) -> Probed:
    return probe(lambda: Plain(**shapes), lambda model, weights: model.load(weights, fill), MIXED)


def traced(fill: Fill, build: Callable[[], Plain]) -> Layout:
    model = build().to("meta")
    found = trace_loader(model, lambda weights: model.load(list(weights), fill), MIXED, parallel=Parallel(), rank=0, engine="toy")
    return found.layout
