"""Random loaders: what the trace claims is what a real load does, or the trace says that it doesn't know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


def part(m: Model, name: str) -> Tensor:
    return m.holder[0] if name == "holder" else getattr(m, name).data


def first_write(name: str, i: int) -> Step:
    def write(m: Model, pool: list[Tensor]) -> None:
        whole = part(m, name)
        whole.copy_(fitted(pool[i], whole.shape))

    return write


def view(draw: st.DrawFn, pool: list[Tensor], i: int, dim: int) -> Step:
    """One more tensor that shares its memory, where torch can."""
    index, how = cut(draw, pool[i].shape), draw(st.sampled_from(["index", "t", "flat", "split"]))
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "index": lambda t: t[index],
        "t": lambda t: t.transpose(0, dim),
        "flat": lambda t: t.reshape(-1),
        "split": lambda t: t.unflatten(dim, (2, -1)) if t.dim() < 4 else t,
    }
    return lambda m, pool: pool.append(made[how](pool[i]))


def copied(draw: st.DrawFn, pool: list[Tensor], i: int, dim: int) -> Step:
    """One more tensor with elements of others at other places."""
    how = draw(st.sampled_from(["clone", "flip", "roll", "repeat", "pick", "cat", "stack", "pad", "every"]))
    k, n = draw(st.integers(0, 5)), pool[i].shape[dim] if pool[i].dim() else 1
    picked = draw(st.lists(st.integers(0, max(n - 1, 0)), min_size=1, max_size=6))
    j = draw(st.sampled_from([j for j, t in enumerate(pool) if t.shape == pool[i].shape]))
    made: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "clone": lambda t, _: t.contiguous().clone(),
        "flip": lambda t, _: t.flip(dim),
        "roll": lambda t, _: t.roll(k, dim),
        "repeat": lambda t, _: t.repeat_interleave(2, dim=dim),
        "pick": lambda t, _: t.index_select(dim, torch.tensor(picked, device="cpu")),
        "cat": lambda t, other: torch.cat([t, other], dim),
        "stack": lambda t, other: torch.stack([t, other], dim),
        "pad": lambda t, _: nn.functional.pad(t, (k % 2, 1), value=k),
        "every": lambda t, _: t.movedim(dim, 0)[::2].contiguous(),
    }
    return lambda m, pool: pool.append(made[how](pool[i], pool[j]))


def cast(draw: st.DrawFn, i: int) -> Step:
    dtype = draw(st.sampled_from(DTYPES))
    return lambda m, pool: pool.append(pool[i].to(dtype))


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda t: t + 1,
    "exp": lambda t: t.float().exp(),
    "where": lambda t: torch.where(t > 2, t, 0),
    "max": lambda t: t.clamp(max=2),
    "item": lambda t: torch.full_like(t, t.flatten()[0].item()),
    "sum": lambda t: t.float().cumsum(-1),
}


def computed(draw: st.DrawFn, i: int) -> Step:
    """One more tensor with values that are nowhere in the checkpoint."""
    function = COMPUTED[draw(st.sampled_from(list(COMPUTED)))]
    return lambda m, pool: pool.append(function(pool[i]))


def written(draw: st.DrawFn, model: Model, i: int, hows: Sequence[str]) -> Step:
    """A region of the model written: `fit` takes it from the pool, the others from elsewhere."""
    name = draw(st.sampled_from(["p", "q", "r", "t", "holder"]))
    region, value = cut(draw, part(model, name).shape), draw(st.sampled_from([0.0, 1.0, 2.5]))
    how = draw(st.sampled_from(hows))

    def write(m: Model, pool: list[Tensor]) -> None:
        whole, source = part(m, name), pool[i]
        into = whole[region]
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

    return write


def drawn(draw: st.DrawFn, model: Model, pool: list[Tensor]) -> Step:
    i = draw(st.integers(0, len(pool) - 1))
    kind = draw(st.sampled_from(("view", "copy", "cast", "compute", "write", "write", "write", "odd")))
    dim = draw(st.integers(0, max(pool[i].dim() - 1, 0)))
    if kind == "view":
        return view(draw, pool, i, dim)
    if kind == "copy":
        return copied(draw, pool, i, dim)
    if kind == "cast":
        return cast(draw, i)
    if kind == "compute":
        return computed(draw, i)
    usual, odd = ("fit", "fit", "fit", "fill", "zero"), ("add_", "mix", "item", "data", "spare")
    return written(draw, model, i, usual if kind == "write" else odd)


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
        take(drawn(draw, model, pool))
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
