"""The layout of an engine's model out of one run of its own `load_weights`, on the model itself or on a meta twin.

What the loader casts or computes is no reason to give up: it is described as a logical tensor of its own, which a seed with
the same cast, or of the same layout and rank, can feed like any other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import LayoutError
from ..model.catalog import Catalog, Parallel
from ..model.layout import Layout
from .blame import engine_frames, told
from .described import Derived, Describer
from .dtypes import DTYPES
from .reachable import reachable_tensors
from .recorder import Recorder
from .storages import ENGINE, Storages, view_of
from .views import Inexpressible, View


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
    with uncollected():
        before, recorder = reachable_tensors(model), Recorder()
        recorder.storages.watch(before)
        sources = [(s.name, recorder.source(s.name, (0,) * len(s.shape), s.shape, DTYPES[s.dtype])) for s in catalog]
        _run(recorder, load_weights, sources)
        _house(recorder, model, before)
        describer = Describer(recorder.storages, catalog, parallel, rank, engine)
        return _Tensors.of(recorder.storages, model, before).described(describer)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: beside an engine's own objects it takes a third of the time (36,945 copies: 2.1 s of 6.0 s)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(
    recorder: Recorder, load_weights: Callable[[Iterable[tuple[str, Tensor]]], object], sources: list[tuple[str, Tensor]]
) -> None:
    reading = ""

    def checkpoint() -> Iterator[tuple[str, Tensor]]:
        nonlocal reading
        for name, source in sources:
            reading = name
            yield name, source
        reading = ""

    try:
        with recorder:
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
        if recorder.refusals:
            raise recorder.refusals[0] from error
        raise _failed(recorder, reading, error) from error
    recorder.require_followed()


def _failed(recorder: Recorder, reading: str, error: Exception) -> LayoutError:
    """reading: the tensor that the loader asked for last, empty if it has read all of them."""
    names = [reading] if reading else []
    for frame, _ in engine_frames(error):
        storages = [recorder.storages.storage(value) for value in frame.f_locals.values() if isinstance(value, Tensor)]
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


def _house(recorder: Recorder, model: nn.Module, before: Mapping[str, Tensor]) -> None:
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
            home = nn.Parameter(recorder.housed(old.data, device), requires_grad=old.requires_grad)
            home.__class__ = old.__class__
            home.__dict__.update(old.__dict__)
            homes[id(old)] = home
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._parameters[name] = homes[id(old)]


@dataclass(slots=True)
class _Tensors:
    """A model's tensors after loading: `kept` get buffers, `made` hold nothing of the checkpoint, `odd` are hidden state."""

    storages: Storages
    before: Mapping[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    odd: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, storages: Storages, model: nn.Module, before: Mapping[str, Tensor]) -> _Tensors:
        found = cls(storages, before)
        homes: dict[int, list[View]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for path, tensor in reachable_tensors(model).items():
            if not tensor.numel():
                continue
            where, storage = view_of(tensor), tensor.untyped_storage()._cdata
            if any(v.offset <= where.offset and where.stop <= v.stop for v in homes.get(storage, ())):
                continue  # tied, or a view: the buffer's bytes are its bytes
            written = found._written(tensor)
            if not written or (not storages.loaded(tensor) and not found._constant(tensor, path in parameters)):
                found.made.append(path)
            elif path in parameters or found._stayed(path, tensor):
                found.kept[path] = tensor
                homes.setdefault(storage, []).append(where)
            else:
                found.odd[path] = tensor
        return found

    def described(self, describer: Describer) -> Traced:
        for path, tensor in self.kept.items():
            describer.add(path, tensor)
        used = describer.used()
        ignored = {name: "the engine's loader skipped it" for name in describer.catalog.names if name not in used}
        for path, tensor in self.odd.items():
            why = f"only in {path}, which the engine makes of it"
            ignored.update((c, why) for c in self.storages.covers([tensor]) if c in ignored)
        hidden = {path: self._origin(tensor) for path, tensor in self.odd.items()}
        return Traced(describer.layout(ignored), self.kept, describer.derived, tuple(self.made), hidden)

    def _written(self, tensor: Tensor) -> bool:
        storage = self.storages.storage(tensor)
        return storage is not None and any(h.taint is not ENGINE for h in storage.held.near(view_of(tensor)))

    def _constant(self, tensor: Tensor, parameter: bool) -> bool:
        """Is it a parameter that the loader filled with constants all over?"""
        if not parameter:
            return False
        try:
            held = self.storages.held(tensor)
        except Inexpressible:
            return False
        return sum(h.view.numel for h in held if h.fill) == tensor.numel()

    def _stayed(self, path: str, tensor: Tensor) -> bool:
        old = self.before.get(path)
        return old is not None and old.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    def _origin(self, tensor: Tensor) -> str:
        covers = sorted(self.storages.covers([tensor]))
        storage = self.storages.storage(tensor)
        reasons = sorted({h.taint.reason for h in storage.held.near(view_of(tensor)) if h.taint is not None}) if storage else []
        what = ", ".join(covers[:3]) + (f" and {len(covers) - 3} more" if len(covers) > 3 else "")
        return f"computed: {reasons[0]}" if reasons else f"a copy of {what}" if covers else "the engine's own values"
