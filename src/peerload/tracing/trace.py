"""The layout of an engine's model out of one run of its own `load_weights`, on the model itself or on a meta twin.

What the loader casts or computes is no reason to give up: it is described as a logical tensor of its own, which a seed with
the same cast, or of the same layout and rank, can feed like any other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ..errors import LayoutError
from ..model.catalog import Catalog, Parallel, TensorSpec
from ..model.layout import Constant, Layout, Pieces
from .blame import engine_frames, told
from .contents import Contents, Held, moved
from .follow import ENGINE, Follower
from .reachable import reachable_tensors
from .recorder import DTYPE_NAMES, DTYPES, view_of
from .views import Inexpressible, View, boxes, overlap


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """Values that only the engine's own loader can make out of the checkpoint tensors `covers`. `parameter` (the first one
    when there are several) has them; `reason` is the operation ("cast BF16 to F32", "aten::exp of ...")."""

    parameter: str
    covers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """What a rank's model holds after `load_weights`.

    layout: buffers named like parameters, and a piece or a constant for each of their elements. Parameters that share
        memory share a buffer, which has the first one's name.
    tensors: buffer name -> the model's own tensor; its `data_ptr()` is the buffer's address. Owned by the model.
    derived: logical name -> what it is, for those that the layout adds to the checkpoint's catalog.
    made: tensors that nothing of the checkpoint goes into; they are as the engine's constructor and loader left them.
    hidden: path -> how it came, for tensors outside the layout that `load_weights` made out of the checkpoint. On a real
        model these now hang on `meta` or have no values: the engine's code that makes them has to run again on real bytes."""

    layout: Layout
    tensors: Mapping[str, Tensor]
    derived: Mapping[str, Derived]
    made: tuple[str, ...]
    hidden: Mapping[str, str]


def trace_loader(
    model: nn.Module,
    load_weights: Callable[[Iterable[tuple[str, Tensor]]], object],
    catalog: Catalog,
    *,
    parallel: Parallel,
    rank: int,
    engine: str,
) -> Traced:
    """Run `load_weights` once on meta tensors that stand for `catalog`, in its order, and note where they go.

    model: as its constructor left it, on any device. Constants that the loader writes are written, as is everything in
    which the checkpoint has no part; nothing else is touched. A parameter that the loader replaced by a tensor of the
    checkpoint gets memory on its old device. After a LayoutError the model must be built anew.
    engine: name and version; derived tensors are exchanged between equal ones only.

    Raises LayoutError, naming tensor, parameter or operation, and the engine's line where its code fails, when the loader needs
    values, fails, or leaves something that can't be described."""
    with _uncollected():
        before, follower = reachable_tensors(model), Follower()
        follower.watch(before)
        sources = [(s.name, follower.source(s.name, (0,) * len(s.shape), s.shape, DTYPES[s.dtype])) for s in catalog]
        _run(follower, load_weights, sources)
        _house(follower, model, before)
        return _Describe(follower, model, before, catalog, parallel, rank, engine).run()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: beside an engine's own objects it takes a third of the time (36,945 copies: 2.1 s of 6.0 s)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(
    follower: Follower, load_weights: Callable[[Iterable[tuple[str, Tensor]]], object], sources: list[tuple[str, Tensor]]
) -> None:
    reading = ""

    def checkpoint() -> Iterator[tuple[str, Tensor]]:
        nonlocal reading
        for name, source in sources:
            reading = name
            yield name, source
        reading = ""

    try:
        with follower:
            load_weights(checkpoint())
    except (
        RuntimeError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
        ArithmeticError,
        OSError,
        ImportError,
    ) as error:
        if follower.refusals:
            raise follower.refusals[0] from error
        raise _failed(follower, reading, error) from error
    if follower.refusals:  # the engine caught it
        raise follower.refusals[0]
    if any(item() is not None for item in follower.items):
        gc.collect()
        for item in follower.items:
            kept = item()
            if kept is not None:
                raise follower.refuse("item()", [kept.source], "the engine keeps the value")


def _failed(follower: Follower, reading: str, error: Exception) -> LayoutError:
    """reading: the tensor that the loader asked for last, empty if it has read all of them."""
    names = [reading] if reading else []
    for frame, _ in engine_frames(error):
        storages = [follower.storage(value) for value in frame.f_locals.values() if isinstance(value, Tensor)]
        found = {storage.label for storage in storages if storage is not None and " " not in storage.label}
        if found:
            names += sorted(found - {*names})[:2]
            break
    where = f"{', '.join(names)}: " if names else ""
    if "meta" in str(error):
        return LayoutError(
            f"{where}the engine's loader asks for values, so it can't be followed: {told(error)}",
            next_step="let the engine load this model from disk; its layout can't be derived from its loader",
        )
    return LayoutError(
        f"{where}the engine's loader fails: {told(error)}",
        next_step="the engine alone is likely to fail in the same place: compare the checkpoint's tensors with its config.json",
    )


def _house(follower: Follower, model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Parameters that the loader replaced by meta tensors, in a model that is real, get memory. Ties stay ties."""
    devices = {t.device for t in before.values() if t.device.type != "meta" and isinstance(t, nn.Parameter)}
    if not devices:
        return
    homes: dict[int, nn.Parameter] = {}
    for path, old in list(model.named_parameters(remove_duplicate=False)):
        if old.device.type != "meta" or (path in before and before[path].device.type == "meta"):
            continue
        device = before[path].device if path in before else min(devices, key=str)
        if id(old) not in homes:
            home = nn.Parameter(follower.housed(old.data, device), requires_grad=old.requires_grad)
            home.__class__ = old.__class__
            home.__dict__.update(old.__dict__)
            homes[id(old)] = home
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._parameters[name] = homes[id(old)]


@dataclass(slots=True)
class _Describe:
    """Builds a `Traced` out of what the follower saw."""

    follower: Follower
    model: nn.Module
    before: Mapping[str, Tensor]
    catalog: Catalog
    parallel: Parallel
    rank: int
    engine: str
    pieces: list[tuple[str, tuple[int, ...], View, int, int]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    derived: dict[str, Derived] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)  # what the catalog lacks

    def run(self) -> Traced:
        kept: dict[str, Tensor] = {}
        made: list[str] = []
        odd: dict[str, Tensor] = {}
        homes: dict[int, list[View]] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for path, tensor in reachable_tensors(self.model).items():
            if not tensor.numel():
                continue
            where, storage = view_of(tensor), tensor.untyped_storage()._cdata
            if any(v.offset <= where.offset and where.stop <= v.stop for v in homes.get(storage, ())):
                continue  # tied, or a view: the buffer's bytes are its bytes
            written = self._written(tensor)
            if not written or (not self.follower.loaded(tensor) and not self._constant(tensor, path in parameters)):
                made.append(path)
            elif path in parameters or self._stayed(path, tensor):
                kept[path] = tensor
                homes.setdefault(storage, []).append(where)
            else:
                odd[path] = tensor
        for buffer, (path, tensor) in enumerate(kept.items()):
            self._buffer(buffer, path, tensor)
        hidden = {path: self._origin(tensor) for path, tensor in odd.items()}
        return Traced(self._layout(kept, odd), kept, self.derived, tuple(made), hidden)

    def _written(self, tensor: Tensor) -> bool:
        storage = self.follower.storage(tensor)
        return storage is not None and any(h.taint is not ENGINE for h in storage.held.near(view_of(tensor)))

    def _constant(self, tensor: Tensor, parameter: bool) -> bool:
        """Is it a parameter that the loader filled with constants all over?"""
        if not parameter:
            return False
        try:
            held = self.follower.held(tensor)
        except Inexpressible:
            return False
        return sum(h.view.numel for h in held if h.fill) == tensor.numel()

    def _stayed(self, path: str, tensor: Tensor) -> bool:
        old = self.before.get(path)
        return old is not None and old.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    def _origin(self, tensor: Tensor) -> str:
        covers = sorted(self.follower.covers([tensor]))
        storage = self.follower.storage(tensor)
        reasons = sorted({h.taint.reason for h in storage.held.near(view_of(tensor)) if h.taint is not None}) if storage else []
        what = ", ".join(covers[:3]) + (f" and {len(covers) - 3} more" if len(covers) > 3 else "")
        return f"computed: {reasons[0]}" if reasons else f"a copy of {what}" if covers else "the engine's own values"

    def _buffer(self, buffer: int, path: str, tensor: Tensor) -> None:
        """Pieces and constants for every element of one tensor."""
        mine = moved(view_of(tensor), -int(tensor.storage_offset()))
        if not mine.dense:
            raise LayoutError(f"{path}: its {tuple(tensor.shape)} elements lie scattered, with strides {tuple(tensor.stride())}")
        if tensor.dtype not in DTYPE_NAMES:
            raise LayoutError(f"{path}: its dtype {tensor.dtype} has no name in a checkpoint")
        size = tensor.element_size()
        storage = self.follower.storage(tensor)
        assert storage is not None  # it was written
        try:
            if storage.itemsize != size:
                raise Inexpressible(f"elements of {storage.itemsize} bytes seen as {tensor.dtype}")  # noqa: TRY301
            held = self.follower.held(tensor)
            computed = [h for h in held if h.taint is not None]
            places = [p for v in (*(h.view for h in computed), *_unwritten(mine, held)) for p in _places(mine, v)]
        except Inexpressible as problem:
            held, computed, places = [], [], [((0,) * len(mine.shape), mine)]
            reasons, covers = {str(problem)}, set(self.follower.covers([tensor]))
        else:
            reasons = {h.taint.reason for h in computed if h.taint is not None}
            covers = {c for h in computed if h.taint is not None for c in h.taint.covers}
            lone = sum(v.numel for _, v in places) - sum(h.view.numel for h in computed)
            if lone:
                reasons.add(f"{lone} of its {tensor.numel()} elements are neither a checkpoint tensor's nor a stated constant")
            if lone or any(h.taint is not None and not h.taint.covers for h in computed):
                covers |= self.follower.covers([tensor])
        for h in held:
            if h.name:
                self._piece(h.name, h.start, h.view, buffer, size, path)
            elif h.taint is None:
                self.constants.append(Constant(buffer, h.view.offset * size, h.view.shape, _bytes(h.view, size), h.fill))
        if places:
            if not covers:
                raise LayoutError(f"{path}: {min(reasons)}, and no checkpoint tensor has a part in it")
            p = self.parallel
            name = f"{path} by {self.engine} tp{p.tp} ep{p.ep} pp{p.pp} rank {self.rank}"
            self.specs[name] = TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            self.derived[name] = Derived(path, tuple(sorted(covers)), "; ".join(sorted(reasons)[:3]))
            for start, view in places:
                self._piece(name, start, view, buffer, size, path)

    def _piece(self, name: str, start: tuple[int, ...], view: View, buffer: int, size: int, path: str) -> None:
        if name not in self.catalog.row and name not in self.specs:
            base, dtypes = self.follower.logical[name]
            chain = [DTYPE_NAMES[d] for d in dtypes]
            self.specs[name] = TensorSpec(name, chain[-1], self.catalog[self.catalog.row[base]].shape)
            self.derived[name] = Derived(path, (base,), f"cast {' to '.join(chain)}")
        self.pieces.append((name, start, view, buffer, size))

    def _layout(self, kept: Mapping[str, Tensor], odd: Mapping[str, Tensor]) -> Layout:
        used = {name for name, *_ in self.pieces} | {c for d in self.derived.values() for c in d.covers}
        used |= {self.follower.logical[n][0] for n in used if n in self.follower.logical}
        reason = "the engine's loader skipped it"
        ignored = {name: reason for name in self.catalog.names if name not in used}
        for path, tensor in odd.items():
            ignored.update(
                (c, f"only in {path}, which the engine makes of it") for c in self.follower.covers([tensor]) if c in ignored
            )
        catalog = Catalog.of([*self.catalog, *self.specs.values()]) if self.specs else self.catalog
        nbytes = np.array([t.numel() * t.element_size() for t in kept.values()], np.int64)
        layout = Layout(
            catalog,
            tuple(kept),
            nbytes,
            self._columns(catalog),
            tuple(self.constants),
            ignored=ignored,
            parallel=self.parallel,
            rank=self.rank,
        )
        layout.prove_cover()
        return layout

    def _columns(self, catalog: Catalog) -> Pieces:
        """Thousands of experts: rows go straight into arrays."""
        n, width = len(self.pieces), catalog.width
        start, shape, stride = (np.full((n, width), fill, np.int64) for fill in (0, 1, 0))
        ranks = np.fromiter((len(first) for _, first, *_ in self.pieces), np.int64, n)
        for ndim in set(ranks.tolist()) - {0}:
            rows = np.flatnonzero(ranks == ndim)
            same = [self.pieces[i] for i in rows.tolist()]
            start[rows, width - ndim :] = [first for _, first, *_ in same]
            shape[rows, width - ndim :] = [view.shape for _, _, view, *_ in same]
            stride[rows, width - ndim :] = [view.stride for _, _, view, *_ in same]
        size = np.fromiter((p[4] for p in self.pieces), np.int64, n)
        offset = np.fromiter((p[2].offset for p in self.pieces), np.int64, n) * size
        tensor = np.fromiter((catalog.row[p[0]] for p in self.pieces), np.int64, n)
        buffer = np.fromiter((p[3] for p in self.pieces), np.int64, n)
        return Pieces(tensor, start, start + shape, buffer, offset, stride * size[:, None])


def _bytes(view: View, size: int) -> tuple[int, ...]:
    return tuple(s * size for s in view.stride)


def _unwritten(mine: View, held: Iterable[Held]) -> Iterator[View]:
    """The elements that nothing is known of."""
    held = list(held)
    if sum(h.view.numel for h in held) == mine.numel:
        return
    left = Contents()
    left.add([Held("", (0,) * len(mine.shape), mine, taint=ENGINE)])
    for h in held:
        left.replace(h.view, [])
    yield from (h.view for h in left)


def _places(mine: View, region: View) -> Iterator[tuple[tuple[int, ...], View]]:
    """A region of a tensor as boxes of its own coordinates: (first index, where it lies)."""
    for cell in overlap(region, mine):
        yield from boxes(cell, region, len(mine.shape))
