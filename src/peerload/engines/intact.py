"""What a rank has loaded, and how much of it is still there after the engine's post-processing.

Post-processing may leave a parameter alone, move it, rewrite all or a part of it in place (requantize, repack) or free it.
Nobody is asked which: the digests taken before, of the bytes and of what recipes make of them, are compared with those of the
memory afterwards, piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
from .recipes import Taking, names_of, renamed

REWRITTEN = "rewritten by post-processing"
FREED = "freed by post-processing"


@dataclass(frozen=True, slots=True, eq=False)
class Offered:
    """What a seed can give: `layout`, its buffers at `address`. memory: bytes of each buffer, which keep it alive. copies:
    how many of the buffers, the last ones, are copies taken before post-processing. rewritten_nbytes: of pieces that are offered
    as what a recipe made of them. lost: reason by parameter of which a part or all is not offered. proven: digest of each piece,
    by row of the layout, as the bytes had it when they arrived."""

    layout: Layout
    address: IntArray
    memory: list[Tensor]
    copies: int
    rewritten_nbytes: int
    lost: Mapping[str, str]
    proven: Mapping[int, int]

    def __str__(self) -> str:
        nbytes, count = self.layout.nbytes, len(set(self.layout.buffer_names))
        text = f"{readable(nbytes - self.rewritten_nbytes)} of {count} parameters as they were loaded"
        if self.rewritten_nbytes:
            text += f", {readable(self.rewritten_nbytes)} as post-processing has made it"
        if self.copies:
            copied = sum(m.nbytes for m in self.memory[-self.copies :])
            text += f", {readable(copied)} of them ({self.copies} parameters) in copies"
        if self.lost:
            name, reason = next(iter(self.lost.items()))
            text += f"; {len(self.lost)} are not offered whole ({name}: {reason}), targets get the rest elsewhere"
        return text


class _Section(NamedTuple):
    """Pieces `rows` of a layout, in `memory` by row of their buffer. names: of R by piece, if it is R that they hold. digests:
    [pieces]."""

    memory: Mapping[int, Tensor]
    rows: IntArray
    names: Mapping[int, str]
    digests: DigestArray


@dataclass(slots=True, eq=False)
class Loaded:
    """The buffers of `layout` at `address`, as the engine's loader would have left them. Keeps no tensor of the model alive.

    before: [pieces] digests; recipes: what each of them may make of some pieces, by group: names and digests of R by row; copies:
    clones of some buffers, by row, as bytes."""

    layout: Layout
    address: IntArray
    space: Space
    before: DigestArray
    recipes: list[list[tuple[Mapping[int, str], dict[int, int]]]] = field(default_factory=list)
    copies: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        choice: Taking,
        *,
        retain_nbytes: int,
        staging_nbytes: int,
        threads: int,
    ) -> Loaded:
        """Hashes everything, and clones the smallest tensors as long as they fit `retain_nbytes`: scales and the like, which
        post-processing rewrites most often. Of what has come as the checkpoint has it, R is computed within `staging_nbytes`.
        Scales that a target needs as they were are cloned in any case."""
        traced = choice.traced
        tensors = [traced.tensors[name] for name in traced.layout.buffer_names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        space = space_on(device_of(tensors))
        layout = replace(choice.layout, ignored={**choice.layout.ignored, **choice.replaced})
        loaded = cls(layout, address, space, digest_layout(space, layout, address, threads=threads))
        for recipe in {group.recipe: None for group in choice.others}:
            groups = [group for group in choice.others if group.recipe is recipe]
            result, made = renamed(traced.layout, names_of(groups)), []  # a layout costs too much to have one for each group
            for group in groups:
                pair = tensors[group.weight], tensors[group.scale]
                found = group.digests(result, *pair, space, staging_nbytes=staging_nbytes, threads=threads)
                made.append((group.rewritten, found))
            loaded.recipes.append(made)
        always = {group.scale for group in choice.groups if not group.recipe.changes_scales}
        left = retain_nbytes
        for row in np.argsort(traced.layout.buffer_nbytes, kind="stable").tolist():
            if left >= tensors[row].nbytes or row in always:
                left -= tensors[row].nbytes
                loaded.copies[row] = _bytes(tensors[row]).clone()
        return loaded

    def prove(self, digests: Mapping[int, int]) -> None:
        """These digests of pieces, by row, were measured when the bytes arrived (`Receipt.digests`), and count."""
        self.before[list(digests)] = list(digests.values())

    def offered(self, model: nn.Module, *, threads: int) -> Offered:
        """What is left of it in `model`, piece by piece: as it was, as a recipe makes it (or both, if other pieces of the group
        were rewritten), or else in our copies. Gives up the copies that aren't needed."""
        alive = Spans(model, self.space.device)
        memory: dict[int, Tensor] = {}
        for row, (address, nbytes) in enumerate(zip(self.address.tolist(), self.layout.buffer_nbytes.tolist(), strict=True)):
            found = alive.at(address, nbytes)
            if found is not None:
                memory[row] = found
        same = self._same(memory, np.arange(len(self.layout.pieces)), self.layout, self.before, threads)
        changed = set(range(len(self.layout.pieces))) - set(same.tolist())
        made_of = np.zeros(len(self.layout.pieces), np.uint64)
        names: dict[int, str] = {}
        both: dict[int, str] = {}
        for groups in self.recipes:
            touched = [group for group in groups if changed & group[1].keys()]
            rewritten = {row: name for names_, _ in touched for row, name in names_.items()}
            made = {row: digest for _, digests in touched for row, digest in digests.items()}
            if not made:
                continue
            rows = np.array(sorted(made), np.int64)
            wanted = np.zeros(len(self.layout.pieces), np.uint64)
            wanted[rows] = [made[row] for row in rows.tolist()]
            for row in self._same(memory, rows, renamed(self.layout, rewritten), wanted, threads).tolist():
                (names if row in changed else both)[row] = rewritten[row]
                made_of[row] = made[row]
            changed -= names.keys()
        copies, self.copies = self.copies, {}
        lacking = np.array(sorted(changed | names.keys()), np.int64)  # a scale may be needed as it was, too
        kept = self._same(copies, lacking, self.layout, self.before, threads)
        parts = [
            _Section(memory, same, {}, self.before),
            _Section(memory, np.array(sorted(names | both), np.int64), names | both, made_of),
            _Section(copies, kept, {}, self.before),
        ]
        gone = np.array(sorted(changed - set(kept.tolist())), np.int64)
        lost = {row: REWRITTEN if row in memory else FREED for row in self.layout.pieces.buffer[gone].tolist()}
        return self._offered(parts, lost, self._ignored(lost, gone, np.setdiff1d(list(names), kept)))

    def _offered(self, parts: Sequence[_Section], lost: Mapping[int, str], ignored: Mapping[str, str]) -> Offered:
        """Each part has buffers of its own, which may be the same memory. The second one is of rewritten pieces, the last one of
        copies."""
        layout = renamed(self.layout, parts[1].names)
        pieces, held, number, rows, tensor = layout.pieces, list[Tensor](), [], [], []
        buffers: list[int] = []
        for part in parts:
            used, which = np.unique(pieces.buffer[part.rows], return_inverse=True)
            number.append(len(buffers) + which)
            rows.append(part.rows)
            tensor.append((pieces if part.names else self.layout.pieces).tensor[part.rows])
            buffers += used.tolist()
            held += [part.memory[row] for row in used.tolist()]
        which = np.concatenate(rows)
        start, stop, offset, stride = (getattr(pieces, column)[which] for column in ("start", "stop", "offset", "stride"))
        whole = replace(
            layout,
            buffer_names=tuple(layout.buffer_names[row] for row in buffers),
            buffer_nbytes=layout.buffer_nbytes[buffers],
            pieces=Pieces(np.concatenate(tensor), start, stop, np.concatenate(number), offset, stride),
            constants=(),
            ignored=ignored,
        )
        digests = np.concatenate([part.digests[part.rows] for part in parts])
        return Offered(
            whole,
            np.array([m.data_ptr() for m in held], np.int64),
            held,
            len(np.unique(pieces.buffer[parts[-1].rows])),
            int(layout.piece_nbytes[parts[1].rows].sum()),
            {layout.buffer_names[row]: reason for row, reason in lost.items()},
            dict(enumerate(digests.tolist())),
        )

    def _ignored(self, lost: Mapping[int, str], gone: IntArray, rewritten: IntArray) -> Mapping[str, str]:
        """Why tensors are not offered as the checkpoint has them. lost: reason by buffer, of the pieces `gone`."""
        layout, found = self.layout, dict(self.layout.ignored)
        for piece in [*gone.tolist(), *rewritten.tolist()]:
            buffer = int(layout.pieces.buffer[piece])
            found[layout.tensor_of(piece).name] = f"{layout.buffer_names[buffer]} was {lost.get(buffer, REWRITTEN)}"
        return found

    def _same(self, memory: Mapping[int, Tensor], rows: IntArray, layout: Layout, wanted: DigestArray, threads: int) -> IntArray:
        """Those of these pieces whose bytes, now in `memory` by row of their buffer, have the digests `wanted` [pieces]."""
        address = self.address.copy()
        address[list(memory)] = [m.data_ptr() for m in memory.values()]
        rows = rows[np.isin(layout.pieces.buffer[rows], list(memory))]
        now = digest_layout(self.space, layout, address, rows=rows, threads=threads)
        return rows[np.equal(now, wanted[rows])]


def device_of(tensors: list[Tensor]) -> str:
    """The one device of some tensors, as `Region` names it; "cpu" for none at all. Raises LayoutError for several."""
    devices = {str(t.device) for t in tensors} or {"cpu"}
    if len(devices) > 1:
        raise LayoutError(
            f"parameters lie on {', '.join(sorted(devices))}, and a rank is loaded on one device",
            next_step="don't offload weights, or let the engine load this model itself",
        )
    return devices.pop()


class Spans:
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
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, address - begin, (nbytes,), (1,))


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, in order of address."""
    storage = tensor.untyped_storage()
    begin = tensor.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (tensor.nbytes,), (1,))
