"""The table of storages: what is known of each, and what its elements hold.

A cast is noted as elements of the logical tensor `"<tensor> as F32"`. A wider dtype and back is the original again, up to the
payloads of NaNs. float to integer depends on the hardware out of range, so it counts as computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .contents import Contents, Held, Taint, count, cut, moved, part
from .dtypes import DTYPE_NAMES, WIDER
from .views import MOST_BOXES, Inexpressible, View

#: Values of the engine's own that lie where they are: nothing of the checkpoint went into them, and memory has them.
ENGINE: Final = Taint(frozenset(), "the engine's own values")
#: The same, but noted elsewhere without being written there.
MOVED: Final = Taint(frozenset(), "the engine's own values, from elsewhere")
#: How a storage is called of which nothing else is known.
_NAMELESS: Final = "a tensor of the engine's"


@dataclass(slots=True)
class Storage:
    """What is known of a storage. The weak reference keeps its address from being given to another one. `itemsize` (bytes)
    is the unit that `held` counts in; `watched`: it existed before loading."""

    alive: StorageWeakRef
    label: str
    itemsize: int
    watched: bool = False
    held: Contents = field(default_factory=Contents)


class Storages:
    """Storages live as long as their tensors: the table holds no memory. `logical` says of each logical tensor which checkpoint
    tensor it is, and as which dtypes its elements went on."""

    def __init__(self) -> None:
        self.logical: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {}
        self._known: dict[int, Storage] = {}

    def source(self, tensor: Tensor, name: str, start: Sequence[int]) -> None:
        """`tensor` stands for the box of checkpoint tensor `name` of its shape from index `start`."""
        self.logical.setdefault(name, (name, (tensor.dtype,)))
        storage = self.note(tensor, name)
        storage.label = name  # an active recorder has seen the tensor made
        storage.held.add([Held(name, tuple(start), view_of(tensor))] if tensor.numel() else [])

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Tensors that exist before loading."""
        for name, tensor in parameters.items():
            self.note(tensor, name).watched = True

    def note(self, tensor: Tensor, label: str) -> Storage:
        """What is known of a tensor's storage from here on. `label` is its name for people, unless it has one."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None:
            alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = self._known[storage._cdata] = Storage(alive, label, tensor.element_size())
        return known

    def known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def storage(self, tensor: Tensor) -> Storage | None:
        """What is known of a tensor's storage."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def held(self, tensor: Tensor) -> list[Held]:
        """What a tensor of a known storage holds, `view`s being offsets from the tensor's first element."""
        mine, found = view_of(tensor), []
        inside = mine.dense
        for held in self._known[tensor.untyped_storage()._cdata].held.near(mine):
            if inside and mine.offset <= held.view.offset and held.view.stop <= mine.stop:
                found.append(held.at(held.start, moved(held.view, -mine.offset)))
                continue
            found += [held.at(start, moved(view, -mine.offset)) for start, view in part(held, mine, mine)]
        return found

    def near(self, tensor: Tensor) -> list[Held]:
        """What it may see: what lies in its extent, or anywhere in the storage when that counts in other units."""
        storage = self.storage(tensor)
        if storage is None or not tensor.numel():
            return []
        return storage.held.near(view_of(tensor)) if tensor.element_size() == storage.itemsize else list(storage.held)

    def loaded(self, tensor: Tensor) -> bool:
        """May it see what memory doesn't have, such as anything that depends on the checkpoint? Errs towards yes."""
        return any(h.name or (h.taint is not None and h.taint is not ENGINE) for h in self.near(tensor))

    def covers(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """The checkpoint tensors that these may see something of. Errs towards more."""
        return frozenset[str]().union(*(self._bases(held) for tensor in tensors for held in self.near(tensor)))

    def label(self, tensor: Tensor) -> str:
        storage = self.storage(tensor)
        return storage.label if storage is not None else _NAMELESS

    def named(self, tensors: Iterable[Tensor]) -> str:
        """For people."""
        labels = sorted({self.label(t) for t in tensors})
        return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")

    def seen(self, source: Tensor, where: View, dtype: torch.dtype) -> list[Held]:
        """What a tensor holds, as it will lie in `where` (of the same shape) after a cast to `dtype`."""
        origin = self.storage(source)
        if origin is None:
            return [_elsewhere(whole(where, source, dtype))]
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
            return computed(held.view, Taint(frozenset((base,)), how))
        while len(dtypes) > 1 and dtypes[-1] in WIDER.get(dtypes[-2], ()):
            dtypes = dtypes[:-1]
        dtypes = dtypes if dtypes[-1] == wanted else (*dtypes, wanted)
        name = base + "".join(f" as {DTYPE_NAMES[d]}" for d in dtypes[1:])
        self.logical.setdefault(name, (base, dtypes))
        return Held(name, held.start, held.view)

    def put(self, into: Tensor, new: list[Held], label: str = "", where: View | None = None) -> None:
        """The elements of a tensor hold `new`. A storage that nobody watched is taken in with the values it has."""
        if not into.numel():
            return
        storage = self.storage(into)
        if storage is None:
            storage = self.note(into, label or _NAMELESS)
            if into.device.type != "meta":
                storage.held.add([whole(_flat(into), into.as_strided(_flat(into).shape, (1,), 0), into.dtype)])
        if into.element_size() != storage.itemsize:
            self._spoil(storage, into, new, f"elements of {storage.itemsize} bytes written as {into.dtype}")
            return
        where = view_of(into) if where is None else where
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
                return [computed(where, Taint(bases | names, reason))]
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
        storage.held.add([computed(View(0, (size,), (1,)), Taint(frozenset(covers), why))])


def view_of(tensor: Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _write_constants(into: Tensor, new: Iterable[Held]) -> None:
    """Real memory has the constants that are noted for it, so that the engine may read them."""
    for held in new:
        if not held.name and held.taint is None:
            value = torch.frombuffer(bytearray(held.fill), dtype=torch.uint8).view(into.dtype).to(into.device)
            into.as_strided(held.view.shape, held.view.stride, held.view.offset).copy_(value)


def _flat(tensor: Tensor) -> View:
    return View(0, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,))


def _fixed(view: View, dims: Sequence[int], index: Sequence[int]) -> View:
    """A view with some of its dimensions cut to one index."""
    shape, offset = list(view.shape), view.offset
    for dim, at in zip(dims, index, strict=True):
        shape[dim] = 1
        offset += at * view.stride[dim]
    return View(offset, tuple(shape), view.stride)


def computed(view: View, taint: Taint) -> Held:
    return Held("", (0,) * len(view.shape), view, taint=taint)


def constant(view: View, value: object, dtype: torch.dtype) -> Held:
    fill = torch.full((1,), value, dtype=dtype).view(torch.uint8).numpy().tobytes()  # type: ignore[call-overload]
    return Held("", (0,) * len(view.shape), view, fill)


def _elsewhere(held: Held) -> Held:
    return computed(held.view, MOVED) if held.taint is ENGINE else held


def whole(view: View, values: Tensor, dtype: torch.dtype) -> Held:
    """What elements at `view` hold that got these real values, which come from no checkpoint tensor."""
    if values.device.type == "meta" or not values.numel():
        return computed(view, ENGINE)
    each = values.reshape(-1, 1).view(torch.uint8)
    if not bool((each == each[0]).all()):
        return computed(view, ENGINE)
    fill = values.as_strided((1,), (1,)).to("cpu", dtype).view(torch.uint8).numpy().tobytes()
    return Held("", (0,) * len(view.shape), view, fill)


def _rest(where: View, held: Sequence[Held]) -> list[Held]:
    """The elements of `where` that none of `held` describes: nobody wrote them, so they are the engine's own."""
    left = Contents()
    left.add([computed(where, ENGINE)])
    for h in held:
        left.replace(h.view, [])
    return list(left)
