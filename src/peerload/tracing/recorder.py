"""Traced layouts: run an engine's own loading code on tracked tensors and note which checkpoint element each byte holds.

`Recorder.source` stands in for a box of a checkpoint tensor. Under the recorder, views of it are free, what copies it
(clone, cat, stack, copy_, a change of device) is noted and *not executed*, and anything that would compute with it is a
`LayoutError` naming tensor and operation. So it is the same code on `meta` tensors (no weights, no memory) and on real
memory that nobody has touched yet. `layout_of` then turns parameters into a `Layout`, or names the parameter it can't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LayoutError
from ..model.boxes import Box
from ..model.catalog import Catalog, Parallel
from ..model.layout import Constant, Layout, Piece, Pieces
from .contents import Contents, Held, count, moved, part
from .views import Inexpressible, View

#: Makes memory for tensors that the recorder creates: (shape, dtype) -> a contiguous tensor in a storage of its own or of
#: the caller's. Its contents are neither read nor written here.
Allocate: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]

#: torch dtype by safetensors name.
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

#: Operations that look at a tensor's shape and dtype only.
_SHAPE_ONLY: Final = frozenset(
    f"aten::{name}"
    for name in (
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "new_zeros",
        "new_ones",
        "new_full",
        "zeros_like",
        "ones_like",
        "full_like",
    )
)


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The allocator for tracing without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(slots=True)
class Storage:
    """What is known of a storage. The weak reference keeps its address from being given to another one. `itemsize` (bytes)
    is the unit that `held` counts in; `watched`: it existed before loading."""

    alive: StorageWeakRef
    label: str
    itemsize: int
    watched: bool = False
    held: Contents = field(default_factory=Contents)


def view_of(tensor: Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active as a context manager, in the thread that loads. Holds no memory: storages live as long as their tensors.

    `refusals` keeps every LayoutError raised, because engines catch errors of their conversions and report others."""

    def __init__(self, allocate: Allocate = on_meta) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusals: list[LayoutError] = []
        self._allocate = allocate
        self._storages: dict[int, Storage] = {}

    def source(self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that stands for the box of checkpoint tensor `name` of this `shape` from index `start`."""
        tensor = self._allocate(tuple(shape), dtype)
        held = [Held(name, tuple(start), view_of(tensor))] if tensor.numel() else []
        self._note(tensor, name).held.add(held)
        return tensor

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters that exist before loading: from here on, whatever is written into them must be explained."""
        for name, tensor in parameters.items():
            self._note(tensor, name).watched = True

    def known(self, tensor: Tensor) -> bool:
        """Does its storage hold (or await) checkpoint elements?"""
        return tensor.untyped_storage()._cdata in self._storages

    def held(self, tensor: Tensor) -> list[Held]:
        """What a tensor of a known storage holds, `view`s being offsets from the tensor's first element."""
        mine, found = view_of(tensor), []
        inside = mine.dense
        for held in self._storages[tensor.untyped_storage()._cdata].held.near(mine):
            if inside and mine.offset <= held.view.offset and held.view.stop <= mine.stop:
                found.append(held.at(held.start, moved(held.view, -mine.offset)))
                continue
            found += [held.at(start, moved(view, -mine.offset)) for start, view in part(held, mine, mine)]
        return found

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        kinds = {kind for kind in types if kind is not Tensor and kind is not torch.nn.Parameter}
        if FakeTensor in kinds:
            return func(*args, **kwargs)  # DTensor's shape arithmetic
        if kinds:
            return NotImplemented  # DTensor and its like come back with their local tensors
        tracked = [t for t in tensors_in(args, kwargs) if self.known(t)]
        if not tracked:
            return func(*args, **kwargs)
        name = func._schema.name
        try:
            if name == "aten::copy_":
                return self._copy(args)
            if name in ("aten::zero_", "aten::fill_"):
                return self._fill(args[0], 0 if name == "aten::zero_" else args[1])
            if name in ("aten::clone", "aten::_to_copy"):
                return self._clone(func, tracked[0], kwargs)
            if name in ("aten::cat", "aten::stack"):
                return self._join(name == "aten::stack", args, kwargs)
            if name == "aten::equal":
                # Two tensors of a checkpoint are never assumed equal; one is equal to itself.
                return len(tracked) == 2 and self._same(tracked[0], tracked[1])
        except Inexpressible as problem:
            raise self._refuse(name, tracked, str(problem)) from problem
        if name in _SHAPE_ONLY:
            return func(*args, **kwargs)
        if name == "aten::_unsafe_view" or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            out = func(*args, **kwargs)
            views = list(tensors_in((out,), {}))
            if all(self.known(v) and v.element_size() == tracked[0].element_size() for v in views):
                return out
        raise self._refuse(name, tracked, "it is neither a view nor a copy")

    def _note(self, tensor: Tensor, label: str) -> Storage:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None:
            alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = self._storages[storage._cdata] = Storage(alive, label, tensor.element_size())
        return known

    def _refuse(self, operation: str, tensors: Sequence[Tensor], why: str) -> LayoutError:
        labels = sorted({self._storages[t.untyped_storage()._cdata].label for t in tensors})
        error = LayoutError(
            f"{', '.join(labels[:3])}: the engine's loader applies {operation}, which can't be followed: {why}",
            next_step="let the engine load this model itself; its layout can't be derived from its loader",
        )
        self.refusals.append(error)
        return error

    def _copy(self, args: tuple[object, ...]) -> Tensor:
        into, source = args[0], args[1]
        assert isinstance(into, Tensor)  # by the operation's schema, as is what follows
        assert isinstance(source, Tensor)
        if not self.known(source):
            raise self._refuse("aten::copy_", [into], "the values come from no checkpoint tensor")
        if source.dtype != into.dtype:
            raise self._refuse("aten::copy_", [source], f"it casts {source.dtype} to {into.dtype}")
        self._write(into, source.expand(into.shape))
        return into

    def _fill(self, into: object, value: object) -> Tensor:
        assert isinstance(into, Tensor)  # by the operation's schema
        if not isinstance(value, int | float | bool):
            labelled = [t for t in (into, value) if isinstance(t, Tensor) and self.known(t)]
            raise self._refuse("aten::fill_", labelled, "the value is no constant")
        if into.numel():
            fill = torch.full((1,), value, dtype=into.dtype).view(torch.uint8).numpy().tobytes()
            self._storages[into.untyped_storage()._cdata].held.replace(
                view_of(into), [Held("", (0,) * into.dim(), view_of(into), fill)]
            )
        return into

    def _clone(self, func: torch._ops.OpOverload, source: Tensor, kwargs: Mapping[str, object]) -> Tensor:
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype != source.dtype:
            raise self._refuse(func._schema.name, [source], f"it casts {source.dtype} to {dtype}")
        shadow = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        like = torch.clone(shadow, memory_format=kwargs.get("memory_format") or torch.preserve_format)  # type: ignore[arg-type]
        out = self._allocate(tuple(like.shape), source.dtype)
        if out.stride() != like.stride():
            out = out.as_strided(like.shape, like.stride())
        self._write(out, source)
        return out

    def _join(self, stack: bool, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
        operation = "aten::stack" if stack else "aten::cat"
        parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        assert isinstance(parts, list | tuple)  # by the operation's schema, as is what follows
        assert isinstance(dim, int)
        parts = [p for p in parts if stack or p.dim() > 1 or p.numel()]  # cat ignores empty vectors
        stray = [p for p in parts if not self.known(p)]
        if stray:
            raise self._refuse(operation, [p for p in parts if self.known(p)], "some of the parts come from no checkpoint tensor")
        if len({p.dtype for p in parts}) > 1:
            raise self._refuse(operation, parts, "the parts differ in dtype")
        shape = list(parts[0].shape)
        dim %= len(shape) + stack
        if stack:
            shape.insert(dim, len(parts))
        else:
            shape[dim] = sum(p.shape[dim] for p in parts)
        out, at = self._allocate(tuple(shape), parts[0].dtype), 0
        self._note(out, f"{operation} of {self._storages[parts[0].untyped_storage()._cdata].label}")
        for piece in parts:
            size = 1 if stack else piece.shape[dim]
            self._write(out.narrow(dim, at, size), piece.unsqueeze(dim) if stack else piece, fresh=True)
            at += size
        return out

    def _write(self, into: Tensor, source: Tensor, *, fresh: bool = False) -> None:
        """Note that `into` now holds what `source`, of the same shape, holds. `fresh`: it held nothing before."""
        origin = self._storages[source.untyped_storage()._cdata]
        target = self._note(into, origin.label)
        if not into.numel():
            return
        mine, where = view_of(source), view_of(into)
        new = [h.at(start, view) for h in origin.held.near(mine) for start, view in part(h, mine, where)]
        if fresh:
            target.held.add(new)
        else:
            target.held.replace(where, new)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata and view_of(a) == view_of(b)


def tensors_in(args: Iterable[object], kwargs: Mapping[str, object]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))


def layout_of(
    recorder: Recorder,
    parameters: Mapping[str, Tensor],
    catalog: Catalog,
    *,
    parallel: Parallel,
    rank: int,
    ignored: Mapping[str, str],
) -> Layout:
    """Where the (local) `parameters` of a rank keep the tensors of `catalog`: one buffer each, named like the parameter,
    tied ones sharing the first one's. A tied name that the catalog lacks is added to it, as an alias.

    Raises LayoutError, naming the parameter, unless each of its elements is a checkpoint element or a stated constant.
    """
    groups: dict[tuple[int, View], list[str]] = {}
    for name, tensor in parameters.items():
        if tensor.numel():
            groups.setdefault((tensor.untyped_storage()._cdata, view_of(tensor)), []).append(name)
    explained = {names[0]: _explained(recorder, names[0], parameters[names[0]]) for names in groups.values()}
    aliases: dict[str, str] = {}
    for first, *others in groups.values():
        stored = {h.name for h in explained[first]}
        if others and len(stored) == 1:
            name = stored.pop()
            aliases.update((other, name) for other in (first, *others) if name in (first, *others) and other != name)
    extra = [catalog[catalog.row[name]]._replace(name=alias) for alias, name in aliases.items() if alias not in catalog.row]
    catalog = Catalog.of([*catalog, *extra]) if extra else catalog
    tied: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        tied.setdefault(name, []).append(alias)
    pieces: list[Piece] = []
    constants: list[Constant] = []
    for buffer, (name, parts) in enumerate(explained.items()):
        itemsize = parameters[name].element_size()
        for held in parts:
            offset, strides = held.view.offset * itemsize, tuple(s * itemsize for s in held.view.stride)
            if not held.name:
                constants.append(Constant(buffer, offset, held.view.shape, strides, held.fill))
                continue
            stop = tuple(a + n for a, n in zip(held.start, held.view.shape, strict=True))
            names = (held.name, *tied.get(held.name, ()))
            pieces += [Piece(catalog.row[n], Box(held.start, stop), buffer, offset, strides) for n in names]
    nbytes = [parameters[name].numel() * parameters[name].element_size() for name in explained]
    return Layout(
        catalog,
        tuple(explained),
        np.array(nbytes, np.int64),
        Pieces.of(pieces, catalog.width),
        tuple(constants),
        aliases=aliases,
        ignored=ignored,
        parallel=parallel,
        rank=rank,
    )


def _explained(recorder: Recorder, name: str, tensor: Tensor) -> list[Held]:
    """What a parameter holds, or LayoutError when that isn't all of it."""
    if not recorder.known(tensor):
        raise LayoutError(f"{name}: the engine made it without a checkpoint tensor", next_step="look for it in the checkpoint")
    if not view_of(tensor).dense:
        raise LayoutError(f"{name}: its {tuple(tensor.shape)} elements lie scattered, with strides {tuple(tensor.stride())}")
    try:
        held = recorder.held(tensor)
    except Inexpressible as problem:
        raise LayoutError(f"{name}: where its elements come from can't be described: {problem}") from problem
    missing = tensor.numel() - count(held)
    if missing:
        raise LayoutError(
            f"{name}: {missing} of its {tensor.numel()} elements are neither a checkpoint tensor's nor a stated constant",
            next_step="the engine's loader would leave them as they are; is the checkpoint complete?",
        )
    return held
