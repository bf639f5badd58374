"""Probed layouts: feed an engine's real load values that encode their own coordinates and read back where each went.

The oracle of `tracing/trace.py`, which it shares no reasoning with, and the only eye for what post-processing makes of weights.
It needs the model's memory and several loads (about 50 ns an element and pass): for modules and shrunken configs.

    load = probe(build, lambda model, weights: model.load_weights(weights), catalog)
    assert not agree(traced.layout, load)                                # agree.py
    processed = probe(build, load_weights, catalog, finish=post_processing)
    changes(load, processed)["model.layers.0.mlp.down_proj.weight"]      # ("permuted", "...")

`build` makes a *fresh* model with memory, once for each pass; under what context it and `load` must run is the caller's
affair. Engines that check values (scales that must be equal, indices that must be in range) are given those tensors as
`fixed` values instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import ConfigError, LayoutError
from ...model.boxes import BoolArray, IntArray
from ...model.catalog import Catalog
from ..blame import told
from ..dtypes import DTYPE_NAMES, DTYPES
from .codes import (
    RANDOM_PASSES,
    Code,
    Numbering,
    Patterns,
    Reading,
    code_of,
    code_of_bits,
    coded,
    digit_passes,
    fill_patterns,
    is_integer,
    patterns_of,
    readings,
    sentinels,
    split_patterns,
)

#: Instead of a unit's number in `Seen.ids`: what no checkpoint unit was copied to.
UNWRITTEN: Final = -1
CONSTANT: Final = -2
COMPUTED: Final = -3

#: Passes for groups of tensors, at most.
MOST_GROUPS: Final = 8

COPY, MADE, OPAQUE, UNTOUCHED, EMPTY = "copy", "constant", "opaque", "unwritten", "empty"

Build: TypeAlias = Callable[[], nn.Module]
Load: TypeAlias = Callable[[nn.Module, Iterable[tuple[str, Tensor]]], object]
#: What engines raise when they dislike a value, or lack a package or a device.
_DISLIKES: Final = (RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ImportError)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one tensor of the model turned out to hold.

    kind: `copy` (checkpoint elements, perhaps among constants; cast ones included), `constant` (the same whatever the
    checkpoint says), `opaque` (some values are computed), `unwritten` (as the constructor left it), `empty`. reason: in words.
    ids: one number (of `Probed.numbering`) for each unit in memory order, or UNWRITTEN, CONSTANT, COMPUTED. split: units in
    an element; itemsize: its bytes. offset: [elements] where they lie, in elements from the first one, ascending; None when
    side by side. casts: checkpoint tensors whose values were cast. last: the elements' bit patterns in the last pass; made:
    those the constructor left, None for what is no parameter. shares: an earlier tensor's name whose memory this is (a part of).
    steady: for each of `Probed.groups`, [elements] that stay the same when all tensors outside of the group have other values.
    """

    kind: str
    reason: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    ids: IntArray
    split: int
    itemsize: int
    offset: IntArray | None
    casts: frozenset[str]
    last: Patterns
    made: Patterns | None
    shares: str = ""
    steady: tuple[BoolArray, ...] = ()

    @property
    def numel(self) -> int:
        return len(self.ids) // self.split

    @property
    def where(self) -> IntArray:
        """[elements]: offsets from the first one, in elements."""
        return np.arange(self.numel, dtype=np.int64) if self.offset is None else self.offset


@dataclass(frozen=True, eq=False)
class Probed:
    """The result of a probe. passes: loads that were made. seconds: of all of it, building models included. groups: of tensors
    that had values of their own for one pass."""

    numbering: Numbering
    buffers: Mapping[str, Seen]
    passes: int
    seconds: float
    groups: tuple[frozenset[str], ...] = ()

    @property
    def catalog(self) -> Catalog:
        return self.numbering.catalog

    def origin(self, unit: int) -> str:
        """For people: what an entry of `Seen.ids` stands for."""
        special = {UNWRITTEN: "nothing (unwritten)", CONSTANT: "a constant", COMPUTED: "a computed value"}
        return special[unit] if unit in special else self.numbering.name(unit)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied names included; of a DTensor its local part."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: t._local_tensor if isinstance(t, DTensor) else t for name, t in named}


def groups_of(covers: Iterable[Collection[str]]) -> tuple[frozenset[str], ...]:
    """What `probe` needs to check that values are computed from these checkpoint tensors and no others: each collection is part
    of a group, and there are at most MOST_GROUPS."""
    distinct = list(dict.fromkeys(map(frozenset, covers)))
    return tuple(frozenset[str]().union(*distinct[i::MOST_GROUPS]) for i in range(min(len(distinct), MOST_GROUPS)))


def probe(
    build: Build,
    load: Load,
    catalog: Catalog,
    *,
    finish: Callable[[nn.Module], object] | None = None,
    tensors_of: Callable[[nn.Module], Mapping[str, Tensor]] = tensors_of,
    bits: int | None = None,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    groups: Sequence[frozenset[str]] = (),
) -> Probed:
    """Where the model's tensors have their values from, after `load` and, if given, post-processing by `finish`.

    tensors_of: the model's tensors by name, asked after all that. Those that `build` made are set to impossible values first
    if they are nn.Parameters; of others it is noted what they hold, which may be uninitialised memory. What `build` left on
    meta, and nobody gave memory, is left out. bits: 2, 4 or 8 looks into integer tensors at that granularity, for packed
    weights. fixed: values of tensors that the engine would check; what it does with them shows as constant. groups: of
    checkpoint tensors, for `Seen.steady`; each costs a load.
    Raises LayoutError when the engine fails on a pass, ConfigError for tensors that can't be coded.
    """
    began_s = time.perf_counter()
    numbering = Numbering(catalog, bits, frozenset(catalog.row[name] for name in fixed))
    codes = _codes(numbering)
    digits = digit_passes(int(numbering.start[-1]), codes)
    last, every = digits + RANDOM_PASSES - 1, frozenset(catalog.names)
    held = [*([every] * (last + 1)), *groups]
    seen, left = list[dict[str, _Pass]](), list[dict[str, _Pass]]()
    made: dict[str, Patterns] = {}
    for turn, own in enumerate(held):
        number, model = min(turn, last), build()
        found = {name: t for name, t in tensors_of(model).items() if not t.is_meta}
        before = {name: t for name, t in found.items() if isinstance(t, nn.Parameter)}
        if not found and any(t.is_meta for t in model.parameters()):
            raise ConfigError(f"{type(model).__name__}: all of it lies on the meta device; a probe needs a model with memory")
        with torch.no_grad():
            if turn == 0:
                made = {name: read.patterns for name, read in _read(before).items()}
            for tensor in before.values():
                plain = _plain(tensor)
                fill_patterns(plain, sentinels(plain.dtype)[number % 2])
            left.append(_read({name: t for name, t in found.items() if name not in before}))
            stage = "loader"
            try:
                load(model, _weights(numbering, codes, fixed, number, digits, own))
                if finish is not None:
                    stage = "post-processing"
                    finish(model)
            except _DISLIKES as error:
                raise LayoutError(
                    f"the engine's {stage} fails on coded values in pass {turn + 1} of {len(held)}: {told(error)}",
                    next_step="if it checks values of some tensors, give it fixed ones; it may also lack this host's device",
                ) from error
            seen.append(_read({name: t for name, t in tensors_of(model).items() if not t.is_meta}))
        del model, found, before
    decoder = _Decoder(numbering, codes, digits)
    buffers = {
        name: decoder.seen([p.get(name) for p in seen], made.get(name), [p.get(name) for p in left[: last + 1]])
        for name in seen[last]
    }
    return Probed(numbering, MappingProxyType(buffers), len(held), time.perf_counter() - began_s, tuple(groups))


def changes(loaded: Probed, processed: Probed) -> dict[str, tuple[str, str]]:
    """What post-processing did to each tensor of either: (`unchanged` | `permuted` | `opaque` | `constant` | `gone` | `new`,
    the reason in words). Both are probes of one model and catalog; `loaded` was made without `finish`."""
    found: dict[str, tuple[str, str]] = {}
    for name, old in loaded.buffers.items():
        now = processed.buffers.get(name)
        if now is None or (now.kind == EMPTY and old.kind != EMPTY):
            found[name] = ("gone", "post-processing frees it")
        elif now.kind == OPAQUE:
            found[name] = ("opaque", now.reason)
        elif now.kind != COPY:
            found[name] = ("unchanged" if old.kind == now.kind else "constant", now.reason)
        elif _same(old, now):
            found[name] = ("unchanged", now.reason)
        else:
            what = [f"{old.dtype}{list(old.shape)} -> {now.dtype}{list(now.shape)}"] if _form(old) != _form(now) else []
            found[name] = ("permuted", "; ".join(filter(None, [*what, now.reason])))
    for name, now in processed.buffers.items():
        if name not in found:
            found[name] = ("new", now.reason or f"made by post-processing ({now.kind})")
    return found


def _same(old: Seen, now: Seen) -> bool:
    """The same bytes in the same order in memory, whatever the shape."""
    return (old.dtype, old.split) == (now.dtype, now.split) and np.array_equal(old.ids, now.ids) and _lie(old) == _lie(now)


def _lie(seen: Seen) -> bytes:
    return b"" if seen.offset is None else seen.offset.tobytes()


def _form(seen: Seen) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return seen.dtype, seen.shape, seen.stride


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One tensor after one pass: patterns in memory order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: IntArray | None
    patterns: Patterns
    shares: str

    def alike(self, other: _Pass | None) -> bool:
        return other is not None and (self.dtype, self.shape, self.stride) == (other.dtype, other.shape, other.stride)


def _plain(tensor: Tensor) -> Tensor:
    """Without the engine's tensor subclass."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    with torch._C.DisableTorchFunctionSubclass():
        return local.detach().as_subclass(Tensor)


def _read(tensors: Mapping[str, Tensor]) -> dict[str, _Pass]:
    found: dict[str, _Pass] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}  # by storage: first byte, one past the last, name
    for name, tensor in tensors.items():
        plain = _plain(tensor)
        flat, offset = _in_memory(plain)
        extent = 0 if not plain.numel() else len(flat) if offset is None else int(offset[-1]) + 1
        first, known = plain.data_ptr(), spans.setdefault(plain.untyped_storage().data_ptr(), [])
        last = first + extent * plain.element_size()
        shares = next((other for a, b, other in known if a <= first and last <= b), "") if extent else ""
        if extent and not shares:
            known.append((first, last, name))
        found[name] = _Pass(plain.dtype, tuple(plain.shape), tuple(plain.stride()), offset, patterns_of(flat), shares)
    return found


def _in_memory(tensor: Tensor) -> tuple[Tensor, IntArray | None]:
    """The elements in the order in which they lie, and where, unless side by side. An expanded element comes once."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != expected:
            break
        expected *= size
    else:
        if tensor.numel():
            return tensor.as_strided((tensor.numel(),), (1,)), None
        return tensor.reshape(-1), None
    where = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        where = (where[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    where = np.unique(where)
    extent = tensor.as_strided((int(where[-1]) + 1,), (1,))
    return extent[torch.from_numpy(where).to(tensor.device)], where


def _codes(numbering: Numbering) -> dict[str, Code]:
    """By dtype; "" is the code of packed units. Raises ConfigError."""
    catalog, codes = numbering.catalog, {}
    if numbering.bits not in (None, 2, 4, 8):
        raise ConfigError(f"bits is {numbering.bits}, must be 2, 4 or 8")
    for row, dtype in enumerate(catalog.dtypes):
        if row in numbering.fixed:
            continue
        if dtype == "BOOL":
            raise ConfigError(f"{catalog.names[row]}: a BOOL tensor has no room for a code", next_step="give it fixed values")
        packed = numbering.bits is not None and is_integer(dtype)
        key = "" if packed else dtype
        if key not in codes:
            codes[key] = code_of_bits(numbering.bits or 0) if packed else code_of(dtype)
    return codes


def _weights(
    numbering: Numbering, codes: Mapping[str, Code], fixed: Mapping[str, Tensor], number: int, digits: int, own: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint of one pass; but for the tensors in `own`, of the pass before it. Every tensor is made anew: the engine may
    do with it what it likes."""
    catalog = numbering.catalog
    for row, spec in enumerate(catalog):
        if row in numbering.fixed:
            value = fixed[spec.name]
            if tuple(value.shape) != spec.shape or value.dtype != DTYPES[spec.dtype]:
                raise ConfigError(
                    f"{spec.name}: the fixed value is {value.dtype}{list(value.shape)}, not {spec.dtype}{list(spec.shape)}"
                )
            yield spec.name, value.clone()
        else:
            code = codes["" if numbering.bits and is_integer(spec.dtype) else spec.dtype]
            yield spec.name, coded(numbering, row, code, number if spec.name in own else number - 1, digits)


@dataclass(frozen=True, eq=False)
class _Decoder:
    numbering: Numbering
    codes: Mapping[str, Code]
    digits: int
    _ways: dict[torch.dtype, list[tuple[str, Reading]]] = field(default_factory=dict)

    @cached_property
    def _coded_as(self) -> npt.NDArray[np.str_]:
        """[tensors]: key of `codes`, "?" for fixed ones."""
        n = self.numbering
        keys = ["" if n.bits and is_integer(d) else d for d in n.catalog.dtypes]
        return np.array(["?" if row in n.fixed else key for row, key in enumerate(keys)])

    def seen(self, passes: list[_Pass | None], made: Patterns | None, left: list[_Pass | None]) -> Seen:
        """One tensor. made: what the constructor left there, of a parameter; left: what lay there before each load, of others.
        There may be more passes than loads in `left`: those of groups."""
        passes, more = passes[: len(left)], passes[len(left) :]
        last = passes[-1]
        assert last is not None  # the last pass says which names there are
        n, size = len(last.patterns), last.dtype.itemsize
        dtype = DTYPE_NAMES.get(last.dtype, str(last.dtype))
        bits = self.numbering.bits
        packed = bits is not None and is_integer(dtype) and "" in self.codes
        split = 8 * size // bits if packed and bits else 1

        steady = tuple(p.patterns == last.patterns if p is not None and last.alike(p) else np.zeros(n, np.bool_) for p in more)

        def result(kind: str, reason: str, ids: IntArray, casts: Iterable[str] = ()) -> Seen:
            kept = made if made is not None and len(made) == n else None
            return Seen(
                kind,
                reason,
                dtype,
                last.shape,
                last.stride,
                ids,
                split,
                size,
                last.offset,
                frozenset(casts),
                last.patterns,
                kept,
                last.shares,
                steady,
            )

        if not n:
            return result(EMPTY, "has no elements", np.zeros(0, np.int64))
        reads = [p for p in passes if p is not None and last.alike(p)]
        if len(reads) < len(passes):
            return result(OPAQUE, "its shape or dtype depends on the values", np.full(n * split, COMPUTED, np.int64))
        ids, casts = self._decode([r.patterns for r in reads], last.dtype, bits if packed else None, made is not None)
        if all(last.alike(old) for old in left):
            same = [r.patterns == old.patterns for r, old in zip(reads, left, strict=True) if old is not None]
            untouched = np.logical_and.reduce(same).repeat(split)
            ids[untouched & (ids == COMPUTED)] = UNWRITTEN  # uninitialised memory differs from pass to pass
        return result(*_verdict(ids, split, casts), ids, casts)

    def _decode(
        self, passes: list[Patterns], dtype: torch.dtype, bits: int | None, filled: bool
    ) -> tuple[IntArray, frozenset[str]]:
        """ids, and the names of the tensors that were cast. filled: sentinels were there before the load."""
        marks = [np.array([m], np.uint64) for m in sentinels(dtype)]
        if bits is not None:
            passes = [split_patterns(p, dtype.itemsize, bits) for p in passes]
            marks = [split_patterns(m, dtype.itemsize, bits)[:1] for m in marks]
        steady, blank = np.ones(len(passes[0]), np.bool_), np.full(len(passes[0]), filled)
        for number, seen in enumerate(passes):
            steady &= seen == passes[0]
            blank &= seen == marks[number % 2]
        ids = np.full(len(passes[0]), COMPUTED, np.int64)
        ids[steady] = CONSTANT
        ids[blank] = UNWRITTEN
        casts: set[str] = set()
        for key, reading in self._readings(dtype, bits):
            open_ = np.flatnonzero(ids == COMPUTED)
            if not len(open_):
                break
            numbers = reading.decode([p[open_] for p in passes[: self.digits]], int(self.numbering.start[-1]))
            valid = numbers >= 0
            rows = self.numbering.tensor_of(np.maximum(numbers, 0))
            valid &= self._coded_as[rows] == key
            for number in range(self.digits, len(passes)):
                valid &= reading.confirms(numbers, passes[number][open_], number, self.digits)
            ids[open_[valid]] = numbers[valid]
            if reading.cast_to is not None:
                casts.update(self.numbering.catalog.names[row] for row in np.unique(rows[valid]).tolist())
        return ids, frozenset(casts)

    def _readings(self, dtype: torch.dtype, bits: int | None) -> list[tuple[str, Reading]]:
        if bits is not None:
            return [("", Reading(self.codes[""]))]
        if dtype not in self._ways:
            self._ways[dtype] = [(key, way) for key, ways in readings(dtype, self.codes).items() for way in ways]
        return self._ways[dtype]


def _verdict(ids: IntArray, split: int, casts: frozenset[str]) -> tuple[str, str]:
    """Kind and reason."""
    what = "elements" if split == 1 else "packed units"
    computed, unwritten, constant = (int((ids == code).sum()) for code in (COMPUTED, UNWRITTEN, CONSTANT))
    if computed:
        return OPAQUE, f"{computed} of {len(ids)} {what} are computed from the checkpoint, not copied"
    notes = [f"{n} of {len(ids)} {what} are {word}" for n, word in ((constant, "constant"), (unwritten, "unwritten")) if n]
    if unwritten == len(ids):
        return UNTOUCHED, "the loader doesn't write it"
    if unwritten + constant == len(ids):
        return MADE, "the same whatever the checkpoint says" if not unwritten else "; ".join(notes)
    if casts:
        notes.append(f"cast from {', '.join(sorted(casts)[:3])}")
    return COPY, "; ".join(notes)
