"""What a rank has loaded, and how much of it is still there after the engine's post-processing.

Post-processing may leave a parameter alone, move it, rewrite it in place (requantize, repack) or free it. Nobody is asked
which: the digests taken before are compared with those of the memory afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LayoutError
from ..integrity.digest import DigestArray
from ..memory.space import Space, digest_layout, space_on
from ..model.boxes import IntArray
from ..model.layout import Layout, Pieces
from ..receipt import readable
from ..tracing.reachable import reachable_tensors
from ..tracing.trace import Traced

REWRITTEN = "rewritten by post-processing"
FREED = "freed by post-processing"


@dataclass(frozen=True, slots=True, eq=False)
class Offered:
    """What a seed can give: `layout`, its buffers at `address`. memory: bytes of each buffer, which keep it alive. copies:
    how many of the buffers, the last ones, are copies taken before post-processing. lost: reason by parameter not offered.
    proven: digest of each piece, by row of the layout, as the bytes had it when they arrived."""

    layout: Layout
    address: IntArray
    memory: list[Tensor]
    copies: int
    lost: Mapping[str, str]
    proven: Mapping[int, int]

    def __str__(self) -> str:
        text = f"{readable(int(self.layout.buffer_nbytes.sum()))} of {len(self.memory)} parameters as they were loaded"
        if self.copies:
            copied = sum(m.nbytes for m in self.memory[-self.copies :])
            text += f", {readable(copied)} of them ({self.copies} parameters) in copies"
        if self.lost:
            name, reason = next(iter(self.lost.items()))
            text += f"; {len(self.lost)} are not offered ({name}: {reason}), targets get them elsewhere"
        return text


@dataclass(slots=True, eq=False)
class Loaded:
    """The buffers of `layout` at `address`, as the engine's loader would have left them. Keeps no tensor of the model alive.

    before: [pieces] digests; copies: clones of some buffers, by row, as bytes."""

    layout: Layout
    address: IntArray
    space: Space
    before: DigestArray
    copies: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, traced: Traced, *, retain_nbytes: int, threads: int) -> Loaded:
        """Hashes everything, and clones the smallest tensors as long as they fit `retain_nbytes`: scales and the like, which
        post-processing rewrites most often."""
        tensors = [traced.tensors[name] for name in traced.layout.buffer_names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        space = space_on(device_of(tensors))
        loaded = cls(traced.layout, address, space, digest_layout(space, traced.layout, address, threads=threads))
        left = retain_nbytes
        for row in np.argsort(traced.layout.buffer_nbytes, kind="stable").tolist():
            left -= tensors[row].nbytes
            if left < 0:
                break
            loaded.copies[row] = _bytes(tensors[row]).clone()
        return loaded

    def prove(self, digests: Mapping[int, int]) -> None:
        """These digests of pieces, by row, were measured when the bytes arrived (`Receipt.digests`), and count."""
        self.before[list(digests)] = list(digests.values())

    def offered(self, model: nn.Module, *, threads: int) -> Offered:
        """What is left of it in `model`, in place, or else in our copies. Gives up the copies that aren't needed."""
        alive = _Spans(model, self.space.device)
        found: dict[int, Tensor] = {}
        for row, (address, nbytes) in enumerate(zip(self.address.tolist(), self.layout.buffer_nbytes.tolist(), strict=True)):
            memory = alive.at(address, nbytes)
            if memory is not None:
                found[row] = memory
        rewritten = found.keys() - self._intact(found, threads)
        for row in rewritten:
            del found[row]
        copies = {row: copy for row, copy in self.copies.items() if row not in found}
        self.copies.clear()
        for row in copies.keys() - self._intact(copies, threads):
            rewritten |= {row}
            del copies[row]
        lost = {
            name: REWRITTEN if row in rewritten else FREED
            for row, name in enumerate(self.layout.buffer_names)
            if row not in found and row not in copies
        }
        memory = found | copies
        kept, layout = _part(self.layout, list(memory), lost)
        address = np.array([m.data_ptr() for m in memory.values()], np.int64)
        proven = dict(enumerate(self.before[kept].tolist()))
        return Offered(layout, address, list(memory.values()), len(copies), lost, proven)

    def _intact(self, memory: Mapping[int, Tensor], threads: int) -> set[int]:
        """Rows of the buffers, now in `memory`, of which every piece still has its digest."""
        rows = np.array(sorted(memory), np.int64)
        address = self.address.copy()
        address[rows] = [memory[row].data_ptr() for row in rows.tolist()]
        pieces = np.flatnonzero(np.isin(self.layout.pieces.buffer, rows))
        now = digest_layout(self.space, self.layout, address, rows=pieces, threads=threads)
        changed = self.layout.pieces.buffer[pieces[now != self.before[pieces]]]
        return set(np.setdiff1d(rows, changed).tolist())


def device_of(tensors: list[Tensor]) -> str:
    """The one device of some tensors, as `Region` names it; "cpu" for none at all. Raises LayoutError for several."""
    devices = {str(t.device) for t in tensors} or {"cpu"}
    if len(devices) > 1:
        raise LayoutError(
            f"parameters lie on {', '.join(sorted(devices))}, and a rank is loaded on one device",
            next_step="don't offload weights, or let the engine load this model itself",
        )
    return devices.pop()


class _Spans:
    """The memory that a model's tensors keep alive on one device."""

    def __init__(self, model: nn.Module, device: str) -> None:
        storages = {
            s.data_ptr(): s
            for t in reachable_tensors(model).values()
            if str(t.device) == device and (s := t.untyped_storage()).nbytes()
        }
        self._begin = np.array(sorted(storages), np.int64)
        self._storages = storages

    def at(self, address: int, nbytes: int) -> Tensor | None:
        """These bytes, if all of them are part of one storage."""
        row = int(np.searchsorted(self._begin, address, "right")) - 1
        if row < 0:
            return None
        begin = int(self._begin[row])
        storage = self._storages[begin]
        if address + nbytes > begin + storage.nbytes():
            return None
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, address - begin, (nbytes,))


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, in order of address."""
    storage = tensor.untyped_storage()
    begin = tensor.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (tensor.nbytes,))


def _part(layout: Layout, rows: list[int], lost: Mapping[str, str]) -> tuple[IntArray, Layout]:
    """The buffers `rows` of a layout, in that order, and what lies in them; and which of its pieces that is."""
    number = np.full(len(layout.buffer_names), -1, np.int64)
    number[rows] = np.arange(len(rows))
    which = np.flatnonzero(number[layout.pieces.buffer] >= 0)
    kept = layout.pieces.take(which)
    pieces = Pieces(kept.tensor, kept.start, kept.stop, number[kept.buffer], kept.offset, kept.stride)
    return which, replace(
        layout,
        buffer_names=tuple(layout.buffer_names[r] for r in rows),
        buffer_nbytes=layout.buffer_nbytes[rows],
        pieces=pieces,
        constants=(),
        ignored={**layout.ignored, **dict(_ignored(layout, lost))},
    )


def _ignored(layout: Layout, lost: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for piece, buffer in enumerate(layout.pieces.buffer.tolist()):
        name = layout.buffer_names[buffer]
        if name in lost:
            yield layout.tensor_of(piece).name, f"{name} was {lost[name]}"
