"""Whether post-processing has left what arrived as a recipe's result as it arrived.

A target puts R's right inverse into its parameters and runs the engine's own post-processing. If that applies another recipe, or
none, the memory afterwards isn't what a load from disk would have left, and the digests say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import CommitError, CoordinatorError, DeadlineExceeded
from ..integrity.digest import DigestArray
from ..memory.space import Space, digest_layout, space_on
from ..model.boxes import IntArray
from ..model.catalog import ModelKey
from ..model.layout import Layout
from ..model.offer import Offer
from .intact import Spans, device_of
from .recipes import Rewritable, Taking, names_of, suffices


@dataclass(slots=True)
class Said:
    """What a rank says at a step of its load, and then what all ranks say together. key: the model, the same for all.
    seeds: found by this rank, and then by all; None: it doesn't ask. recipes: does it take what recipes have made?
    problem: with that, in words."""

    key: str = ""
    seeds: frozenset[str] | None = None
    recipes: bool = False
    problem: str = ""

    def encode(self) -> bytes:
        seeds = None if self.seeds is None else sorted(self.seeds)
        return json.dumps([self.key, seeds, self.recipes, self.problem]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises ValueError, TypeError or RecursionError for what no rank has encoded."""
        key, seeds, recipes, problem = json.loads(data)
        return cls(str(key), None if seeds is None else frozenset(map(str, seeds)), bool(recipes), str(problem))

    def join(self, heard: Sequence[bytes]) -> None:
        """heard: what each rank has encoded. Raises CommitError for different models, and for what no rank has encoded."""
        first = self.problem = ""
        for rank, data in enumerate(heard):
            try:
                other = Said.decode(data)
            except (ValueError, TypeError, RecursionError) as error:
                raise CommitError(
                    f"rank {rank} sent what makes no sense: {error}",
                    next_step="start all ranks of an instance with the same version of peerload",
                ) from error
            first = other.key if rank == 0 else first
            if other.key != first:
                raise CommitError(
                    f"ranks 0 and {rank} would load different models: {first} and {other.key}",
                    next_step="give all hosts the same checkpoint, or set model_name and revision in the configuration",
                )
            if other.seeds is not None:
                self.seeds = other.seeds if self.seeds is None else self.seeds & other.seeds
            self.recipes |= other.recipes
            self.problem = self.problem or (other.problem and f"rank {rank}: {other.problem}")


@dataclass(slots=True, eq=False)
class Unsettled:
    """The pieces `rows` of a layout that arrived as R's results, with digests `arrived`. scales: address and bytes of scales
    that R replaces, as the right inverse leaves them. Keeps no tensor of the model alive."""

    layout: Layout
    address: IntArray
    space: Space
    rows: IntArray
    arrived: DigestArray
    scales: Mapping[str, tuple[int, Tensor]]

    @classmethod
    def of(cls, choice: Taking, *, threads: int) -> Unsettled:
        """Before the right inverse is put in. Hashes these pieces."""
        traced, groups, layout = choice.traced, choice.taken, choice.layout
        names = layout.buffer_names
        tensors: list[Tensor] = [traced.tensors[name] for name in names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        rows = np.array(sorted(names_of(groups)), np.int64)
        space = space_on(device_of(tensors))
        arrived = digest_layout(space, layout, address, rows=rows, threads=threads)
        scales = {}
        for group in groups:
            if not group.recipe.changes_scales:
                prepared = group.recipe.prepare(tensors[group.weight].data, tensors[group.scale].data)
                left = prepared.contiguous().reshape(-1).view(torch.uint8)
                scales[names[group.scale]] = int(address[group.scale]), left
        return cls(layout, address, space, rows, arrived, scales)

    def prove(self, digests: Mapping[int, int]) -> None:
        """These digests of pieces, by row, were measured when the bytes arrived (`Receipt.digests`), and count."""
        self.arrived = np.array(
            [digests.get(row, old) for row, old in zip(self.rows.tolist(), self.arrived.tolist(), strict=True)], np.uint64
        )

    def problem(self, model: nn.Module, *, threads: int) -> str:
        """Which of them post-processing has made into something else, in words; "" if none."""
        alive, address = Spans(model, self.space.device), self.address
        nbytes = self.layout.buffer_nbytes
        buffers = self.layout.pieces.buffer[self.rows]
        here = {b for b in np.unique(buffers).tolist() if alive.at(int(address[b]), int(nbytes[b])) is not None}
        found = np.isin(buffers, list(here))
        now = digest_layout(self.space, self.layout, address, rows=self.rows[found], threads=threads)
        wrong = [*self.rows[~found].tolist(), *self.rows[found][now != self.arrived[found]].tolist()]
        if wrong:
            return f"post-processing has not made {self.layout.describe(wrong[0])} again, and {len(wrong) - 1} more"
        for name, (begin, left) in self.scales.items():
            memory = alive.at(begin, left.nbytes)
            if memory is not None and torch.equal(memory, left):
                return f"post-processing has left {name} alone, where one scale was expected of it"
        return ""


def held_by_seeds(
    client: CoordinatorClient,
    key: ModelKey,
    groups: Sequence[Rewritable],
    waiting: Deadline,
    deadline: Deadline,
    *,
    proven: bool,
) -> dict[str, frozenset[str]]:
    """Names of the logical tensors that seeds hold parts of, by seed; waits until they hold all of `groups` that they ever
    will, at most while `waiting` lasts. proven: seeds whose digests are missing or unknown don't count."""

    def names(offers: Sequence[Offer]) -> dict[str, frozenset[str]]:
        """Ranks of one layout share it."""
        known: dict[int, frozenset[str]] = {}
        for layout in (o.layout for o in offers):
            if id(layout) not in known:
                rows = np.unique(layout.pieces.tensor).tolist()
                known[id(layout)] = frozenset(layout.catalog.names[row] for row in rows)
        usable = (o for o in offers if o.binding.digests is not None or not proven)
        return {f"{o.source} {o.source.generation}": known[id(o.layout)] for o in usable}

    def enough(offers: Sequence[Offer]) -> bool:
        held = names(offers)
        gone = (frozenset(o.layout.ignored) for o in offers)  # what they have given up isn't waited for
        return bool(held) and suffices(groups, frozenset().union(*held.values()), frozenset().union(*gone))

    if waiting.remaining_s > 0:
        with suppress(DeadlineExceeded, CoordinatorError):  # what nobody has by then comes from elsewhere
            return names(client.wait_for(key, deadline.within(waiting.remaining_s), enough))
    return names(client.discover(key, deadline))
