"""A recorder that never gives up on a model for one parameter: casts become tensors of their own, computed values are marked.

Under `Follower` the sources are meta tensors and the model's tensors may be real ones of any device. An operation on them is
- a view: made;
- the engine's own business, when nothing of the checkpoint is in its arguments: executed;
- a move of elements (copies, joins, flips, gathers by known indices): noted, not executed;
- a cast: noted as elements of the logical tensor `"<tensor> as F32"`. A wider dtype and back is the original again, up to
  the payloads of NaNs. float to integer depends on the hardware out of range, so it counts as computed;
- anything else: run on meta for shapes and dtypes only, and what it makes or writes is `Taint`ed with its sources' names;
- a question about values (`.item()`, `bool()`, a shape that depends on data): LayoutError. The one answer to `.item()` that
  can be followed is to hand it on to `fill_`: an `Item` stands for the value and does nothing else.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import LayoutError
from .contents import Contents, Held, Taint, count, cut, part
from .operations import MOVES
from .python_values import Functions, Item
from .recorder import DTYPE_NAMES, Recorder, Storage, tensors_in, view_of
from .views import MOST_BOXES, Inexpressible, View

#: What each dtype's values can be cast to and back without change (NaN payloads aside).
WIDER: Final[Mapping[torch.dtype, frozenset[torch.dtype]]] = {
    torch.float8_e4m3fn: frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    torch.float8_e5m2: frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    torch.bfloat16: frozenset((torch.float32, torch.float64)),
    torch.float16: frozenset((torch.float32, torch.float64)),
    torch.float32: frozenset((torch.float64,)),
}
#: Values of the engine's own that lie where they are: nothing of the checkpoint went into them, and memory has them.
ENGINE: Final = Taint(frozenset(), "the engine's own values")
#: The same, but noted elsewhere without being written there.
MOVED: Final = Taint(frozenset(), "the engine's own values, from elsewhere")

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


class Follower(Recorder):
    """Active as a context manager, in the thread that loads. `logical` says of each logical tensor that it saw which
    checkpoint tensor it is, and as which dtypes its elements went on."""

    def __init__(self) -> None:
        super().__init__()
        self.logical: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {}
        self.items: list[weakref.ref[Item]] = []
        self._functions = Functions(self)

    def __enter__(self) -> Follower:
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*error)  # type: ignore[no-untyped-call]

    def source(self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.logical.setdefault(name, (name, (dtype,)))
        return super().source(name, start, shape, dtype)

    def storage(self, tensor: Tensor) -> Storage | None:
        """What is known of a tensor's storage."""
        return self._storages.get(tensor.untyped_storage()._cdata)

    def loaded(self, tensor: Tensor) -> bool:
        """May it see what memory doesn't have, such as anything that depends on the checkpoint? Errs towards yes."""
        return any(h.name or (h.taint is not None and h.taint is not ENGINE) for h in self._near(tensor))

    def covers(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """The checkpoint tensors that these may see something of. Errs towards more."""
        found: set[str] = set()
        for tensor in tensors:
            for held in self._near(tensor):
                found |= self._bases(held)
        return frozenset(found)

    def _near(self, tensor: Tensor) -> list[Held]:
        """What it may see: what lies in its extent, or anywhere in the storage when that counts in other units."""
        storage = self.storage(tensor)
        if storage is None or not tensor.numel():
            return []
        return storage.held.near(view_of(tensor)) if tensor.element_size() == storage.itemsize else list(storage.held)

    def refuse(self, operation: str, tensors: Sequence[Tensor], why: str) -> LayoutError:
        return self._refuse(operation, tensors, why)

    # What happens to an operation

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
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
            raise self._refuse(name, tracked, "it exchanges the memory behind a tensor")
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
                self._put(tensor, [_computed(view_of(tensor), ENGINE)])
        return out

    def _made(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
        """A new meta tensor has no values that could be looked up later, so a constant is noted."""
        if not isinstance(out, Tensor) or out.device.type != "meta":
            return
        self._note(out, f"a result of {name}")
        at = _FULL.get(name)
        value = _FACTORIES[name] if at is None else kwargs.get("fill_value", args[at] if len(args) > at else None)
        if isinstance(value, int | float | bool) and out.numel():
            self._put(out, [_constant(view_of(out), value, out.dtype)])

    def _copied(self, func: torch._ops.OpOverload, into: Tensor, source: Tensor) -> Tensor:
        if (source.device.type == "meta" and self.known(source)) or self.loaded(source):
            self.move(into, source if source.shape == into.shape else source.expand(into.shape), "aten::copy_")
            return into
        if source.device.type == "meta":
            self._put(into, [_computed(view_of(into), ENGINE if into.device.type == "meta" else MOVED)])
            return into
        func(into, source)
        self._put(into, [_whole(view_of(into), source, into.dtype)])
        return into

    def _filled(self, into: Tensor, value: object) -> Tensor:
        if isinstance(value, Tensor):
            return self._copied(torch.ops.aten.copy_.default, into, value)
        into.fill_(value)  # type: ignore[call-overload]
        if into.numel():
            self._put(into, [_constant(view_of(into), value, into.dtype)])
        return into

    def _tainted(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object], why: str = ""
    ) -> object:
        """Run it on meta. What it writes or returns is computed from all that it saw."""
        tensors = list(tensors_in(args, kwargs))
        tracked = [t for t in tensors if self.known(t)]
        name = func._schema.name
        taint = Taint(self.covers(tracked), f"{name} of {self.named(tracked)}" + (f": {why}" if why else ""))
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
            raise self._refuse(name, tracked, f"its result depends on values ({first})") from problem
        back = {id(shadow): t for t in tensors for shadow in (shadows[id(t)],)}
        for tensor in _written(func, args, kwargs):
            own = not taint.covers and tensor.device.type == "meta"
            self._put(tensor, [_computed(view_of(tensor), ENGINE if own else taint)])
        leaves, form = tree_flatten(out)
        if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves):
            raise self._refuse(name, tracked, "a value is needed to go on")
        result = [back.get(id(leaf), leaf) for leaf in leaves]
        for tensor in result:
            if isinstance(tensor, Tensor) and not self.known(tensor):
                self._note(tensor, f"{name} of {self.named(tracked)}")
                if tensor.numel():
                    self._put(tensor, [_computed(view_of(tensor), taint)])
        return tree_unflatten(result, form)

    # Moving elements

    def move(self, into: Tensor, source: Tensor, operation: str) -> None:
        """`into` now holds what `source`, of the same shape, holds, cast to its dtype. Nothing is executed."""
        if not into.numel():
            return
        where = view_of(into)
        try:
            new = self._seen(source, where, into.dtype)
        except Inexpressible as problem:
            new = [_computed(where, Taint(self.covers([source]), f"{operation} of {self.named([source])}: {problem}"))]
        self._put(into, new, self._label(source), where)

    def _seen(self, source: Tensor, where: View, dtype: torch.dtype) -> list[Held]:
        """What a tensor holds, as it will lie in `where` (of the same shape) after a cast to `dtype`."""
        origin = self.storage(source)
        if origin is None:
            return [_elsewhere(_whole(where, source, dtype))]
        if source.element_size() != origin.itemsize:
            raise Inexpressible(f"elements of {origin.itemsize} bytes read as {source.dtype}")
        mine = view_of(source)
        near = origin.held.near(mine)
        if len(near) == 1:
            sliced = cut(near[0], mine, where)
            if sliced is not None:
                return [_elsewhere(self._cast(sliced, source.dtype, dtype))]
        repeated = [d for d, (n, s) in enumerate(zip(mine.shape, mine.stride, strict=True)) if n > 1 and s == 0]
        times = math.prod(mine.shape[d] for d in repeated)
        if times > MOST_BOXES:
            raise Inexpressible(f"each element goes to {times} places")
        found: list[Held] = []
        for index in itertools.product(*(range(mine.shape[d]) for d in repeated)):
            seen, target = _fixed(mine, repeated, index), _fixed(where, repeated, index)
            new = [h.at(start, view) for h in near for start, view in part(h, seen, target)]
            if count(new) < target.numel:
                new += _rest(target, new)
            found += new
        return [_elsewhere(self._cast(h, source.dtype, dtype)) for h in found]

    def _cast(self, held: Held, given: torch.dtype, wanted: torch.dtype) -> Held:
        if given == wanted or held.taint is not None:
            return held
        if not held.name:
            value = torch.frombuffer(bytearray(held.fill), dtype=torch.uint8).view(given).to(wanted)
            return Held("", held.start, held.view, value.view(torch.uint8).numpy().tobytes())
        base, dtypes = self.logical[held.name]
        how = f"cast of {held.name} from {given} to {wanted}"
        if dtypes[-1] != given or wanted not in DTYPE_NAMES or (given.is_floating_point and not wanted.is_floating_point):
            return _computed(held.view, Taint(frozenset((base,)), how))
        while len(dtypes) > 1 and dtypes[-1] in WIDER.get(dtypes[-2], ()):
            dtypes = dtypes[:-1]
        dtypes = dtypes if dtypes[-1] == wanted else (*dtypes, wanted)
        name = base + "".join(f" as {DTYPE_NAMES[d]}" for d in dtypes[1:])
        self.logical.setdefault(name, (base, dtypes))
        return Held(name, held.start, held.view)

    def _put(self, into: Tensor, new: list[Held], label: str = "", where: View | None = None) -> None:
        """The elements of a tensor hold `new`. A storage that nobody watched is taken in with the values it has."""
        if not into.numel():
            return
        storage = self.storage(into)
        if storage is None:
            storage = self._note(into, label or "a tensor of the engine's")
            if into.device.type != "meta":
                storage.held.add([_whole(_flat(into), into.as_strided(_flat(into).shape, (1,), 0), into.dtype)])
        if into.element_size() != storage.itemsize:
            self._spoil(storage, into, new, f"elements of {storage.itemsize} bytes written as {into.dtype}")
            return
        where = view_of(into) if where is None else where
        if self.items:
            new = [self.checked(h, into.dtype) for h in new]
        if into.device.type != "meta":
            _write_constants(into, new)
        try:
            if storage.watched:
                new = self._ordered(storage, where, new)
            storage.held.replace(where, new)
        except Inexpressible as problem:
            self._spoil(storage, into, new, str(problem))

    def _ordered(self, storage: Storage, where: View, new: list[Held]) -> list[Held]:
        """Two checkpoint tensors written to one place: which one stays depends on the order in which they are read."""
        near = storage.held.near(where)
        if not near:
            return new
        names = frozenset[str]().union(*map(self._bases, new))
        for old in near if names else ():
            bases = self._bases(old)
            if not bases <= names and any(True for _ in part(old, where, where)):
                reason = (
                    f"{min(bases - names)} and {min(names)} are loaded into one place: which one stays depends on their order"
                )
                return [_computed(where, Taint(bases | names, reason))]
        return new

    def _bases(self, held: Held) -> frozenset[str]:
        """The checkpoint tensors that went into it."""
        if held.name:
            return frozenset((self.logical[held.name][0],))
        return held.taint.covers if held.taint is not None else frozenset()

    def _spoil(self, storage: Storage, into: Tensor, new: Iterable[Held], why: str) -> None:
        """Give up on where things lie in this storage: all of it is computed."""
        covers = set(self.covers([into]))
        for held in (*storage.held, *new):
            covers |= self._bases(held)
        size = into.untyped_storage().nbytes() // storage.itemsize
        storage.held.clear()
        storage.held.add([_computed(View(0, (size,), (1,)), Taint(frozenset(covers), why))])

    # What moves.py and others need to know

    def checked(self, held: Held, dtype: torch.dtype) -> Held:
        """NaN as a constant may have been computed from an `Item` by code that doesn't ask it."""
        if self.items and held.fill and dtype.is_floating_point:
            value = torch.frombuffer(bytearray(held.fill), dtype=torch.uint8).view(dtype).float()
            if bool(value.isnan()):
                raise self._refuse("item()", [], "it stores NaN after asking for a value")
        return held

    def constant(self, into: Tensor, value: float) -> None:
        """All elements of a meta tensor are `value`."""
        if into.numel():
            self._put(into, [_constant(view_of(into), value, into.dtype)])

    def numbers(self, index: Tensor) -> list[int] | None:
        """The elements of an index vector, when memory has them; a mask's are the positions that it picks."""
        if index.device.type == "meta" or self.loaded(index):
            return None
        return (index.nonzero().flatten() if index.dtype in (torch.bool, torch.uint8) else index).tolist()

    def label(self, tensor: Tensor, label: str) -> None:
        self._note(tensor, label)

    def housed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Unwritten memory on `device` that is known to hold what a meta tensor holds."""
        real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        self._note(real, self._label(tensor))
        if tensor.numel():
            self._put(real, [_computed(view_of(real), MOVED)])
        self.move(real, tensor, "aten::copy_")
        return real

    def _label(self, tensor: Tensor) -> str:
        storage = self.storage(tensor)
        return storage.label if storage is not None else "a tensor of the engine's"

    def named(self, tensors: Iterable[Tensor]) -> str:
        labels = sorted({self._label(t) for t in tensors})
        return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


@contextmanager
def _again(follower: Follower) -> Iterator[None]:
    """The recorder's own mode on, which is off while it handles an operation."""
    TorchDispatchMode.__enter__(follower)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(follower, None, None, None)  # type: ignore[no-untyped-call]


def _write_constants(into: Tensor, new: Iterable[Held]) -> None:
    """Real memory has the constants that are noted for it, so that the engine may read them."""
    for held in new:
        if not held.name and held.taint is None:
            value = torch.frombuffer(bytearray(held.fill), dtype=torch.uint8).view(into.dtype).to(into.device)
            into.as_strided(held.view.shape, held.view.stride, held.view.offset).copy_(value)


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


def _flat(tensor: Tensor) -> View:
    return View(0, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,))


def _fixed(view: View, dims: Sequence[int], index: Sequence[int]) -> View:
    """A view with some of its dimensions cut to one index."""
    shape, offset = list(view.shape), view.offset
    for dim, at in zip(dims, index, strict=True):
        shape[dim] = 1
        offset += at * view.stride[dim]
    return View(offset, tuple(shape), view.stride)


def _computed(view: View, taint: Taint) -> Held:
    return Held("", (0,) * len(view.shape), view, taint=taint)


def _constant(view: View, value: object, dtype: torch.dtype) -> Held:
    fill = torch.full((1,), value, dtype=dtype).view(torch.uint8).numpy().tobytes()  # type: ignore[call-overload]
    return Held("", (0,) * len(view.shape), view, fill)


def _elsewhere(held: Held) -> Held:
    return _computed(held.view, MOVED) if held.taint is ENGINE else held


def _whole(view: View, values: Tensor, dtype: torch.dtype) -> Held:
    """What elements at `view` hold that got these real values, which come from no checkpoint tensor."""
    if values.device.type == "meta" or not values.numel():
        return _computed(view, ENGINE)
    each = values.reshape(-1, 1).view(torch.uint8)
    if not bool((each == each[0]).all()):
        return _computed(view, ENGINE)
    fill = values.as_strided((1,), (1,)).to("cpu", dtype).view(torch.uint8).numpy().tobytes()
    return Held("", (0,) * len(view.shape), view, fill)


def _rest(where: View, held: Sequence[Held]) -> list[Held]:
    """The elements of `where` that none of `held` describes: nobody wrote them, so they are the engine's own."""
    left = Contents()
    left.add([_computed(where, ENGINE)])
    for h in held:
        left.replace(h.view, [])
    return list(left)
