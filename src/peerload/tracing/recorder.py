"""The one recorder of all engines: it runs an engine's own loading code and notes which checkpoint element each byte holds.

The sources stand for the checkpoint's tensors: meta tensors. The model's tensors may be real ones of any device. An operation is
- a view: made;
- the engine's own business, when nothing of the checkpoint is in its arguments: executed;
- a move of elements (copies, joins, flips, gathers by known indices): noted, not executed;
- a cast: noted as a move, see `storages.py`;
- anything else: run on meta for shapes and dtypes only, and what it makes or writes is `Taint`ed with its sources' names;
- a question about values (`.item()`, `bool()`, a shape that depends on data): LayoutError. The one answer to `.item()` that
  can be followed is to hand it on to `fill_`: an `Item` stands for the value and does nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import LayoutError
from .contents import Held, Taint
from .operations import MOVES
from .python_values import Functions, Item
from .storages import ENGINE, MOVED, Storages, computed, constant, view_of, whole
from .views import Inexpressible, View

#: Operations that look at a tensor's shape, dtype or storage only, by the constant that they fill their result with.
_FACTORIES: Final[Mapping[str, object]] = {
    "aten::empty_like": None,
    "aten::new_empty": None,
    "aten::new_empty_strided": None,
    "aten::empty": None,
    "aten::empty_strided": None,
    "aten::new_zeros": 0,
    "aten::zeros_like": 0,
    "aten::zeros": 0,
    "aten::new_ones": 1,
    "aten::ones_like": 1,
    "aten::ones": 1,
}
_FULL: Final[Mapping[str, int]] = {"aten::full": 1, "aten::full_like": 1, "aten::new_full": 2}
_SHAPE_QUESTIONS: Final = frozenset(("aten::is_same_size", "aten::size", "aten::sym_size", "aten::stride", "aten::numel"))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active as a context manager, in the thread that loads. `storages` has what it has seen.

    `refusals` keeps every LayoutError raised, because engines catch errors of their conversions and report others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: Final = Storages()
        self.refusals: list[LayoutError] = []
        self._functions = Functions(self)
        self.known, self.loaded, self.named = self.storages.known, self.storages.loaded, self.storages.named

    def __enter__(self) -> Recorder:
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*error)  # type: ignore[no-untyped-call]

    def source(self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A meta tensor that stands for the box of checkpoint tensor `name` of this `shape` from index `start`."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.storages.source(tensor, name, start)
        return tensor

    def refuse(self, operation: str, tensors: Sequence[Tensor], why: str) -> LayoutError:
        """The error to raise for an operation that can't be followed."""
        labels = sorted({self.storages.label(t) for t in tensors})
        error = LayoutError(
            f"{', '.join(labels[:3])}: the engine's loader applies {operation}, which can't be followed: {why}",
            next_step="let the engine load this model itself; its layout can't be derived from its loader",
        )
        self.refusals.append(error)
        return error

    def require_followed(self) -> None:
        """Raise LayoutError for what it has refused, also if the engine caught that, and for a value that the engine keeps."""
        if self.refusals:
            raise self.refusals[0]
        if self._kept_item() is not None:
            gc.collect()
            kept = self._kept_item()
            if kept is not None:
                raise self.refuse("item()", [kept.source], "the engine keeps the value")

    def _kept_item(self) -> Item | None:
        """One of the values that the engine asked for and still holds."""
        return next((item for item in (reference() for reference in self._functions.items) if item is not None), None)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if FakeTensor in types:
            return func(*args, **(kwargs or {}))  # DTensor's shape arithmetic
        plain = torch._C._disabled_torch_dispatch_impl
        if any(getattr(kind, "__torch_dispatch__", plain) is not plain for kind in types):
            return NotImplemented  # DTensor and its like come back with their local tensors
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if _is_view(func):
            return func(*args, **kwargs)
        tensors = list(tensors_in(args, kwargs))
        tracked = [t for t in tensors if self.known(t)]
        name = func._schema.name
        if not tracked:
            out = func(*args, **kwargs)
            if name in _FACTORIES or name in _FULL:
                self._made(name, args, kwargs, out)
            return out
        if name == "aten::copy_":
            return self._copied(func, args[0], args[1])  # type: ignore[arg-type]
        if name in ("aten::resize_", "aten::set_"):
            raise self.refuse(name, tracked, "it exchanges the memory behind a tensor")
        if name in ("aten::zero_", "aten::fill_"):
            return self._filled(args[0], 0 if name == "aten::zero_" else args[1])  # type: ignore[arg-type]
        if name in _FACTORIES or name in _FULL:
            out = func(*args, **kwargs)
            self._made(name, args, kwargs, out)
            return out
        if all(t.device.type != "meta" and not self.loaded(t) for t in tensors):
            return self._executed(func, args, kwargs)
        if _is_composite(func):
            with _again(self):  # under inference_mode operations come before they are decomposed
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        move = MOVES.get(name)
        if move is not None:
            try:
                out = move(self, *args, **kwargs)
            except Inexpressible as problem:
                return self._tainted(func, args, kwargs, str(problem))
            if out is not None:
                return out
        if name in _SHAPE_QUESTIONS:
            return func(*args, **kwargs)
        if name == "aten::equal" and len(tracked) == 2 and self._same(tracked[0], tracked[1]):
            return True
        return self._tainted(func, args, kwargs)

    def _executed(self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Nothing of the checkpoint is in it: it really happens, and what it wrote is the engine's own."""
        out = func(*args, **kwargs)
        for tensor in _written(func, args, kwargs):
            if self.known(tensor):
                self._put(tensor, [computed(view_of(tensor), ENGINE)])
        return out

    def _made(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
        """A new meta tensor has no values that could be looked up later, so a constant is noted."""
        if not isinstance(out, Tensor) or out.device.type != "meta":
            return
        self.storages.note(out, f"a result of {name}")
        at = _FULL.get(name)
        value = _FACTORIES[name] if at is None else kwargs.get("fill_value", args[at] if len(args) > at else None)
        if isinstance(value, int | float | bool) and out.numel():
            self._put(out, [constant(view_of(out), value, out.dtype)])

    def _copied(self, func: torch._ops.OpOverload, into: Tensor, source: Tensor) -> Tensor:
        if (source.device.type == "meta" and self.known(source)) or self.loaded(source):
            self.move(into, source if source.shape == into.shape else source.expand(into.shape), "aten::copy_")
            return into
        if source.device.type == "meta":
            self._put(into, [computed(view_of(into), ENGINE if into.device.type == "meta" else MOVED)])
            return into
        func(into, source)
        self._put(into, [whole(view_of(into), source, into.dtype)])
        return into

    def _filled(self, into: Tensor, value: object) -> Tensor:
        if isinstance(value, Tensor):
            return self._copied(torch.ops.aten.copy_.default, into, value)
        into.fill_(value)  # type: ignore[call-overload]
        if into.numel():
            self._put(into, [constant(view_of(into), value, into.dtype)])
        return into

    def _tainted(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object], why: str = ""
    ) -> object:
        """Run it on meta. What it writes or returns is computed from all that it saw."""
        tensors = list(tensors_in(args, kwargs))
        tracked = [t for t in tensors if self.known(t)]
        name = func._schema.name
        taint = Taint(self.storages.covers(tracked), f"{name} of {self.storages.named(tracked)}" + (f": {why}" if why else ""))
        flat, spec = tree_flatten((args, dict(kwargs)))
        shadows: dict[int, Tensor] = {id(t): _shadow(t) for t in tensors}
        flat = [
            shadows.get(id(x), x) if isinstance(x, Tensor) else torch.device("meta") if isinstance(x, torch.device) else x
            for x in flat
        ]
        meta_args, meta_kwargs = tree_unflatten(flat, spec)
        try:
            out = func(*meta_args, **meta_kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as problem:
            first = (str(problem).splitlines() or [repr(problem)])[0]
            raise self.refuse(name, tracked, f"its result depends on values ({first})") from problem
        back = {id(shadow): t for t in tensors for shadow in (shadows[id(t)],)}
        for tensor in _written(func, args, kwargs):
            own = not taint.covers and tensor.device.type == "meta"
            self._put(tensor, [computed(view_of(tensor), ENGINE if own else taint)])
        leaves, form = tree_flatten(out)
        if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves):
            raise self.refuse(name, tracked, "a value is needed to go on")
        result = [back.get(id(leaf), leaf) for leaf in leaves]
        for tensor in result:
            if isinstance(tensor, Tensor) and not self.known(tensor):
                self.storages.note(tensor, f"{name} of {self.storages.named(tracked)}")
                if tensor.numel():
                    self._put(tensor, [computed(view_of(tensor), taint)])
        return tree_unflatten(result, form)

    # What operations.py and python_values.py are given

    def move(self, into: Tensor, source: Tensor, operation: str) -> None:
        """`into` now holds what `source`, of the same shape, holds, cast to its dtype. Nothing is executed."""
        if not into.numel():
            return
        where = view_of(into)
        try:
            new = self.storages.seen(source, where, into.dtype)
        except Inexpressible as problem:
            why = f"{operation} of {self.named([source])}: {problem}"
            new = [computed(where, Taint(self.storages.covers([source]), why))]
        self._put(into, new, self.storages.label(source), where)

    def constant(self, into: Tensor, value: object) -> None:
        """All elements of a tensor are `value`."""
        if into.numel():
            self._put(into, [constant(view_of(into), value, into.dtype)])

    def numbers(self, index: Tensor) -> list[int] | None:
        """The elements of an index vector, when memory has them; a mask's are the positions that it picks."""
        if index.device.type == "meta" or self.loaded(index):
            return None
        return (index.nonzero().flatten() if index.dtype in (torch.bool, torch.uint8) else index).tolist()

    def fresh(self, shape: Sequence[int], dtype: torch.dtype, label: str) -> Tensor:
        """A meta tensor about to be written."""
        out = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.storages.note(out, label)
        return out

    def housed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Unwritten memory on `device` that is known to hold what a meta tensor holds."""
        real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        self.storages.note(real, self.storages.label(tensor))
        if tensor.numel():
            self._put(real, [computed(view_of(real), MOVED)])
        self.move(real, tensor, "aten::copy_")
        return real

    def _put(self, into: Tensor, new: list[Held], label: str = "", where: View | None = None) -> None:
        """NaN as a constant may have been computed from an `Item` by code that doesn't ask it."""
        if self._functions.items and into.dtype.is_floating_point:
            for held in new:
                if held.fill and bool(torch.frombuffer(bytearray(held.fill), dtype=torch.uint8).view(into.dtype).float().isnan()):
                    raise self.refuse("item()", [], "it stores NaN after asking for a value")
        self.storages.put(into, new, label, where)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata and view_of(a) == view_of(b)


def tensors_in(args: Iterable[object], kwargs: Mapping[str, object]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))


@contextmanager
def _again(recorder: Recorder) -> Iterator[None]:
    """The recorder's own mode on, which is off while it handles an operation."""
    TorchDispatchMode.__enter__(recorder)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(recorder, None, None, None)  # type: ignore[no-untyped-call]


def _is_composite(func: torch._ops.OpOverload) -> bool:
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _is_view(func: torch._ops.OpOverload) -> bool:
    known = _VIEWS.get(func)
    if known is None:
        returns = func._schema.returns
        known = any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or (
            torch.Tag.inplace_view in func.tags and func._schema.name not in ("aten::resize_", "aten::set_")
        )
        known = known and not _is_composite(func)  # reshape, contiguous, to: perhaps a view
        known = _VIEWS[func] = known or func._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias")
    return known


_VIEWS: Final[dict[torch._ops.OpOverload, bool]] = {}


def _written(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterator[Tensor]:
    """The arguments that an operation writes, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (v for v in tree_leaves(value) if isinstance(v, Tensor))


def _shadow(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
