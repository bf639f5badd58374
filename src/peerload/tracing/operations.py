"""Operations that move elements without computing: what the recorder notes instead of executing them.

Each function takes the operation's own arguments after the recorder and returns the operation's result, a meta tensor (or
the tensor written), or None when these arguments are no plain move. May raise Inexpressible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from .views import MOST_BOXES, Inexpressible


class Recording(Protocol):
    """Where it is noted what moved."""

    def move(self, into: Tensor, source: Tensor, operation: str) -> None:
        """`into` now holds what `source`, of the same shape, holds, cast to its dtype."""

    def constant(self, into: Tensor, value: object) -> None:
        """All elements of `into` are `value`."""

    def numbers(self, index: Tensor) -> list[int] | None:
        """The elements of an index vector, or the positions that a mask picks; None when memory doesn't have them."""

    def fresh(self, shape: Sequence[int], dtype: torch.dtype, label: str) -> Tensor:
        """A meta tensor about to be written, and its name for people."""

    def named(self, tensors: Iterable[Tensor]) -> str:
        """Tensors, for people."""


def _clone(recorder: Recording, source: Tensor, *, memory_format: torch.memory_format | None = None, **_: object) -> Tensor:
    out = like(source, memory_format=memory_format)
    recorder.move(out, source, "aten::clone")
    return out


def _to_copy(
    recorder: Recording,
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    **_: object,
) -> Tensor:
    out = like(source, dtype, memory_format)
    recorder.move(out, source, "aten::_to_copy")
    return out


def _cat(recorder: Recording, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    parts = [t for t in tensors if t.dim() > 1 or t.numel()]  # empty vectors are ignored
    if not parts:
        return None
    dim %= parts[0].dim()
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return _joined(recorder, parts, shape, dim, "aten::cat")


def _stack(recorder: Recording, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim %= tensors[0].dim() + 1
    shape = list(tensors[0].shape)
    shape.insert(dim, len(tensors))
    return _joined(recorder, [t.unsqueeze(dim) for t in tensors], shape, dim, "aten::stack")


def _joined(recorder: Recording, parts: Sequence[Tensor], shape: Sequence[int], dim: int, operation: str) -> Tensor:
    dtype = parts[0].dtype
    for p in parts[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    out, at = recorder.fresh(shape, dtype, f"{operation} of {recorder.named(parts)}"), 0
    for p in parts:
        recorder.move(out.narrow(dim, at, p.shape[dim]), p, operation)
        at += p.shape[dim]
    return out


def _index_select(recorder: Recording, source: Tensor, dim: int, index: Tensor) -> Tensor | None:
    picked = recorder.numbers(index)
    if picked is None or not source.dim():
        return None
    return _picked(recorder, source, dim % source.dim(), picked, "aten::index_select")


def _index(recorder: Recording, source: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    at = _one_vector(recorder, indices)
    return None if at is None else _picked(recorder, source, at[0], at[1], "aten::index")


def _index_put(
    recorder: Recording, into: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor | None:
    at = None if accumulate else _one_vector(recorder, indices)
    if at is None:
        return None
    dim, picked = at
    shape = list(into.shape)
    shape[dim] = len(picked)
    return _put_at(recorder, into, dim, picked, values.expand(shape), "aten::index_put_")


def _index_copy(recorder: Recording, into: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor | None:
    picked = recorder.numbers(index)
    if picked is None or not into.dim():
        return None
    return _put_at(recorder, into, dim % into.dim(), picked, values, "aten::index_copy_")


def _put_at(recorder: Recording, into: Tensor, dim: int, picked: list[int], values: Tensor, operation: str) -> Tensor:
    size = into.shape[dim]
    for at, start, step, count in _runs([i % size for i in picked]):
        place = torch.ops.aten.slice.Tensor(into, dim, start, start + step * (count - 1) + 1, step)
        recorder.move(place, values.narrow(dim, at, count), operation)
    return into


def _flip(recorder: Recording, source: Tensor, dims: Sequence[int]) -> Tensor:
    out = source
    for dim in dims:
        out = _picked(recorder, out, dim % source.dim(), list(range(source.shape[dim]))[::-1], "aten::flip")
    return out if dims else _clone(recorder, source)


def _roll(recorder: Recording, source: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor | None:
    if not dims:
        return None  # over the flattened tensor
    out = source
    for shift, dim in zip(shifts, dims, strict=True):
        size = source.shape[dim]
        out = _picked(recorder, out, dim % source.dim(), [(i - shift) % size for i in range(size)], "aten::roll")
    return out


def _repeat(recorder: Recording, source: Tensor, repeats: Sequence[int]) -> Tensor:
    out = source.reshape((1,) * (len(repeats) - source.dim()) + tuple(source.shape)) if len(repeats) > source.dim() else source
    for dim, times in enumerate(repeats):
        if times != 1:
            shape = list(out.shape)
            shape[dim] *= times
            out = _joined(recorder, [out] * times, shape, dim, "aten::repeat") if times else out.narrow(dim, 0, 0)
    return _clone(recorder, out) if out.untyped_storage()._cdata == source.untyped_storage()._cdata else out


def _pad(recorder: Recording, source: Tensor, pad: Sequence[int], value: float = 0) -> Tensor | None:
    if min(pad, default=0) < 0:
        return None
    shape, inside = list(source.shape), []
    for k in range(len(pad) // 2):
        dim = source.dim() - 1 - k
        inside.append((dim, pad[2 * k], source.shape[dim]))
        shape[dim] += pad[2 * k] + pad[2 * k + 1]
    out = recorder.fresh(shape, source.dtype, f"aten::constant_pad_nd of {recorder.named([source])}")
    recorder.constant(out, value)
    middle = out
    for dim, start, size in inside:
        middle = middle.narrow(dim, start, size)
    recorder.move(middle, source, "aten::constant_pad_nd")
    return out


def _slice_scatter(
    recorder: Recording,
    source: Tensor,
    values: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    out = _clone(recorder, source, memory_format=torch.contiguous_format)
    recorder.move(torch.ops.aten.slice.Tensor(out, dim, start, end, step), values, "aten::slice_scatter")
    return out


def _select_scatter(recorder: Recording, source: Tensor, values: Tensor, dim: int, index: int) -> Tensor:
    out = _clone(recorder, source, memory_format=torch.contiguous_format)
    recorder.move(out.select(dim, index), values, "aten::select_scatter")
    return out


def _picked(recorder: Recording, source: Tensor, dim: int, picked: list[int], operation: str) -> Tensor:
    """Elements `picked` of a dimension, in that order."""
    size, shape = source.shape[dim], list(source.shape)
    shape[dim] = len(picked)
    out = recorder.fresh(shape, source.dtype, f"{operation} of {recorder.named([source])}")
    for at, start, step, count in _runs([i % size for i in picked]):
        seen = torch.ops.aten.slice.Tensor(source, dim, start, start + step * (count - 1) + 1, step)
        recorder.move(out.narrow(dim, at, count), seen, operation)
    return out


def _runs(picked: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Numbers as runs: (position, first, step >= 1, count). Raises Inexpressible for more than MOST_BOXES of them."""
    runs: list[tuple[int, int, int, int]] = []
    at = 0
    while at < len(picked):
        step = picked[at + 1] - picked[at] if at + 1 < len(picked) else 1
        count = 1
        while step > 0 and at + count < len(picked) and picked[at + count] - picked[at + count - 1] == step:
            count += 1
        runs.append((at, picked[at], max(step, 1) if count > 1 else 1, count))
        if len(runs) > MOST_BOXES:
            raise Inexpressible(f"its index has more than {MOST_BOXES} runs")
        at += count
    return runs


def _one_vector(recorder: Recording, indices: Sequence[Tensor | None]) -> tuple[int, list[int]] | None:
    """The dimension and the numbers of an index that has one known vector and otherwise takes all."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dim() != 1:
        return None
    numbers = recorder.numbers(given[0][1])
    return None if numbers is None else (given[0][0], numbers)


def like(source: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None) -> Tensor:
    """An empty meta tensor with the strides that a copy of `source` gets."""
    shadow = torch.empty_strided(source.shape, source.stride(), dtype=dtype or source.dtype, device="meta")
    return torch.empty_like(shadow, memory_format=memory_format or torch.preserve_format)


#: By operation, functions of (recorder, *arguments).
MOVES: Final[Mapping[str, Callable[..., Tensor | None]]] = {
    "aten::clone": _clone,
    "aten::_to_copy": _to_copy,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::index_select": _index_select,
    "aten::index": _index,
    "aten::index_put_": _index_put,
    "aten::index_copy_": _index_copy,
    "aten::flip": _flip,
    "aten::roll": _roll,
    "aten::repeat": _repeat,
    "aten::constant_pad_nd": _pad,
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
}
