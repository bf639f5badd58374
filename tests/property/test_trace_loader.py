"""Random loaders: what the trace claims is what a real load does, or the trace says that it doesn't know."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from peerload.errors import LayoutError  # noqa: E402
from peerload.model.catalog import Catalog, Parallel, TensorSpec  # noqa: E402
from peerload.testing.loader_oracle import differences, values_of  # noqa: E402
from peerload.tracing.trace import trace_loader  # noqa: E402

CATALOG = Catalog.of(
    [
        TensorSpec("a", "BF16", (6, 4)),
        TensorSpec("b", "F32", (6, 4)),
        TensorSpec("c", "BF16", (4, 6)),
        TensorSpec("d", "F8_E4M3", (4, 4)),
        TensorSpec("e", "I32", (12,)),
        TensorSpec("s", "F32", ()),
    ]
)
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int32, torch.int64)
Step = Callable[["Model", list[Tensor]], None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((8, 6), 3.0, dtype=torch.bfloat16), requires_grad=False)
        self.q = nn.Parameter(torch.arange(24, dtype=torch.float32).view(6, 4), requires_grad=False)
        self.r = nn.Parameter(torch.zeros(2, 3, 4), requires_grad=False)
        self.t = nn.Parameter(torch.ones(6, 8, dtype=torch.bfloat16).t(), requires_grad=False)
        self.holder = [torch.zeros(12, dtype=torch.int32)]


def cut(draw: st.DrawFn, shape: torch.Size) -> tuple[slice, ...]:
    slices = []
    for n in shape:
        start = draw(st.integers(0, max(n - 1, 0)))
        slices.append(slice(start, draw(st.integers(start + 1, n)) if n else 0, draw(st.sampled_from([1, 1, 1, 2]))))
    return tuple(slices)


def fitted(source: Tensor, shape: torch.Size) -> Tensor:
    """As much of a tensor as is there, cut or repeated to a shape."""
    if source.shape == shape:
        return source
    flat = source.reshape(-1)
    return flat.repeat(shape.numel() // flat.numel() + 1)[: shape.numel()].reshape(shape)


def first_write(name: str, i: int) -> Step:
    def write(m: Model, pool: list[Tensor]) -> None:
        whole = m.holder[0] if name == "holder" else getattr(m, name).data
        whole.copy_(fitted(pool[i], whole.shape))

    return write


@st.composite
def loaders(draw: st.DrawFn) -> list[Step]:
    """Steps drawn along a real run, so that shapes fit. Each either adds a tensor to the pool or writes into the model."""
    steps: list[Step] = []
    pool, model = [v.clone() for v in values_of(CATALOG).values()], Model()

    def take(step: Step) -> None:
        try:
            step(model, pool)
        except (RuntimeError, IndexError, NotImplementedError):  # not for this dtype or shape
            return
        steps.append(step)

    for name, i in draw(st.sampled_from([(), (("p", 0), ("q", 1)), (("p", 2), ("t", 0), ("r", 1), ("q", 3), ("holder", 4))])):
        take(first_write(name, i))
    for _ in range(draw(st.integers(1, 8))):
        i = draw(st.integers(0, len(pool) - 1))
        shape, kind = pool[i].shape, draw(st.sampled_from(("view", "copy", "cast", "compute", "write", "write", "write", "odd")))
        dim = draw(st.integers(0, max(len(shape) - 1, 0)))
        n = shape[dim] if shape else 1
        if kind == "view":
            index, how = cut(draw, shape), draw(st.sampled_from(["index", "t", "flat", "split"]))
            take(
                lambda m, pool, i=i, index=index, how=how, dim=dim: pool.append(
                    pool[i][index]
                    if how == "index"
                    else pool[i].transpose(0, dim)
                    if how == "t"
                    else pool[i].reshape(-1)
                    if how == "flat"
                    else pool[i].unflatten(dim, (2, -1))
                    if pool[i].dim() < 4
                    else pool[i]
                )
            )
        elif kind == "copy":
            how, k = (
                draw(st.sampled_from(["clone", "flip", "roll", "repeat", "pick", "cat", "stack", "pad", "every"])),
                draw(st.integers(0, 5)),
            )
            picked = draw(st.lists(st.integers(0, max(n - 1, 0)), min_size=1, max_size=6))
            same = [j for j, t in enumerate(pool) if t.shape == shape]
            j = draw(st.sampled_from(same))
            made: dict[str, Callable[[list[Tensor]], Tensor]] = {
                "clone": lambda pool, i=i: pool[i].contiguous().clone(),
                "flip": lambda pool, i=i, d=dim: pool[i].flip(d),
                "roll": lambda pool, i=i, d=dim, k=k: pool[i].roll(k, d),
                "repeat": lambda pool, i=i, d=dim: pool[i].repeat_interleave(2, dim=d),
                "pick": lambda pool, i=i, d=dim, p=tuple(picked): pool[i].index_select(d, torch.tensor(p, device="cpu")),
                "cat": lambda pool, i=i, j=j, d=dim: torch.cat([pool[i], pool[j]], d),
                "stack": lambda pool, i=i, j=j, d=dim: torch.stack([pool[i], pool[j]], d),
                "pad": lambda pool, i=i, k=k: nn.functional.pad(pool[i], (k % 2, 1), value=k),
                "every": lambda pool, i=i, d=dim: pool[i].movedim(d, 0)[::2].contiguous(),
            }
            take(lambda m, pool, make=made[how]: pool.append(make(pool)))
        elif kind == "cast":
            dtype = draw(st.sampled_from(DTYPES))
            take(lambda m, pool, i=i, dtype=dtype: pool.append(pool[i].to(dtype)))
        elif kind == "compute":
            how = draw(st.sampled_from(["add", "exp", "where", "max", "item", "sum"]))
            computed: dict[str, Callable[[Tensor], Tensor]] = {
                "add": lambda t: t + 1,
                "exp": lambda t: t.float().exp(),
                "where": lambda t: torch.where(t > 2, t, 0),
                "max": lambda t: t.clamp(max=2),
                "item": lambda t: torch.full_like(t, t.flatten()[0].item()),
                "sum": lambda t: t.float().cumsum(-1),
            }
            take(lambda m, pool, i=i, f=computed[how]: pool.append(f(pool[i])))
        else:
            name = draw(st.sampled_from(["p", "q", "r", "t", "holder"]))
            target = model.holder[0] if name == "holder" else getattr(model, name)
            region, value = cut(draw, target.shape), draw(st.sampled_from([0.0, 1.0, 2.5]))
            choices = ["fit", "fit", "fit", "fill", "zero"] if kind == "write" else ["add_", "mix", "item", "data", "spare"]
            how = draw(st.sampled_from(choices))

            def write(
                m: Model,
                pool: list[Tensor],
                i: int = i,
                name: str = name,
                how: str = how,
                region: tuple[slice, ...] = region,
                value: float = value,
            ) -> None:
                whole = m.holder[0] if name == "holder" else getattr(m, name).data
                into, source = whole[region], pool[i]
                if how == "fill":
                    into.fill_(value)
                elif how == "zero":
                    into.zero_()
                elif how == "add_":
                    into.add_(1)
                elif how == "spare":
                    spare = torch.zeros(whole.shape, dtype=whole.dtype)
                    spare[region].fill_(value)
                    pool.append(spare)
                elif how == "mix":
                    into.copy_(whole.flip(0)[region])
                elif how == "item":
                    into.fill_(source.reshape(-1)[:1].reshape(()).item())
                elif how == "data" and source.dtype == whole.dtype and source.shape == whole.shape and name != "holder":
                    setattr(m, name, nn.Parameter(source.clone(), requires_grad=False))
                else:
                    into.copy_(fitted(source, into.shape))

            take(write)
    return steps


@settings(max_examples=200, deadline=None)
@given(loaders(), st.sampled_from(["cpu", "meta"]))
def test_a_trace_is_right_or_says_that_it_does_not_know(steps: list[Step], device: str) -> None:
    def load(model: Model, weights: Iterable[tuple[str, Tensor]]) -> None:
        pool = [tensor for _, tensor in weights]
        for step in steps:
            step(model, pool)

    values, truth = values_of(CATALOG), Model()
    load(truth, values.items())
    with torch.device(device):
        model = Model()
    try:
        traced = trace_loader(model, lambda weights: load(model, weights), CATALOG, parallel=Parallel(), rank=0, engine="toy")
    except LayoutError as refusal:
        event(f"refused: {str(refusal).splitlines()[0][-40:]}")
        return
    event("derived" if traced.derived else "pieces" if len(traced.layout.pieces) else "nothing")
    assert differences(traced, model, truth, values) == []
