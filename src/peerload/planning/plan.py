"""Who reads which box from whom: a plan, proven before a byte moves.

`make_plan` intersects the boxes a rank wants with the boxes on offer and chooses a holder for each part. A `Plan` proves
itself when it is made: every wanted element is written exactly once, out of a piece that holds it, with equal dtypes.
One that doesn't can't be constructed. First try, lost source, resume and disk fallback are the same call with other
arguments: `make_plan(plan.rest(undone), remaining_offers)`.

Pure: standard library and NumPy only, no I/O, the same result for the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import PlanError, Refusal
from ..model.boxes import IntArray, pad_left, volumes
from ..model.catalog import frozen, is_derived
from ..model.layout import Layout
from ..model.offer import Offer, SourceId
from .holders import Cells, choose
from .proof import Proof
from .wants import Wants, rows_in


@dataclass(frozen=True, eq=False)
class Plan:
    """Copy i fills box [start[i], stop[i]) of want `want[i]` from piece `piece[i]` of offer `offer[i]`.

    `refusals` says which offers were left out, and why. Boxes are global coordinates of the logical tensor, `width` of the
    wanting catalog.
    """

    wants: Wants
    offers: tuple[Offer, ...]
    want: IntArray
    offer: IntArray
    piece: IntArray
    start: IntArray
    stop: IntArray
    refusals: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        for name in ("want", "offer", "piece", "start", "stop"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        Proof(self.wants, self.offers, self.want, self.offer, self.piece, self.start, self.stop).check()

    def __len__(self) -> int:
        return len(self.want)

    @cached_property
    def copy_nbytes(self) -> IntArray:
        """[n], bytes each copy writes."""
        return frozen(volumes(self.start, self.stop) * self.wants.layout.catalog.itemsize[self.wants.tensor[self.want]])

    @property
    def nbytes(self) -> int:
        """Bytes written; equal to the bytes wanted."""
        return int(self.copy_nbytes.sum())

    @cached_property
    def bytes_by_source(self) -> Mapping[SourceId, int]:
        size = np.bincount(self.offer, self.copy_nbytes, len(self.offers)).astype(np.int64).tolist()
        return {o.source: n for o, n in zip(self.offers, size, strict=True) if n}

    def rest(self, undone: IntArray) -> Wants:
        """What is still wanted when only the copies in rows `undone` have not been done."""
        piece = self.wants.piece[self.want[undone]]
        return Wants(self.wants.layout, piece, self.start[undone], self.stop[undone])


def make_plan(
    wants: Wants | Layout,
    offers: Sequence[Offer],
    *,
    reserve: Sequence[Offer] = (),
    match: str = "any",
    salt: str = "",
    loads: Mapping[SourceId, int] | None = None,
    refused: Sequence[Refusal] = (),
) -> Plan:
    """Plan one target rank.

    offers: all source ranks that may be read, of any layout. reserve: the last resort (a checkpoint on disk), read only
    for boxes that `offers` lacks. match: "any", or "same-parallelism" to refuse offers of other TP, PP or EP sizes.
    salt: ranks that plan for themselves with different salts spread their reads differently. loads: bytes each source is
    already asked for. refused: what the caller has left out of `offers`, and why. Raises PlanError with every hole and refusal.
    """
    wants = Wants.of(wants) if isinstance(wants, Layout) else wants
    usable, refusals = _admit(wants.layout, [*offers, *reserve], match, frozenset(o.source for o in reserve))
    refusals = [*refused, *refusals]
    tiers = [1 if any(o is r for r in reserve) else 0 for o in usable]
    load = [(loads or {}).get(o.source, 0) for o in usable]
    cells = _cells(wants, usable, tiers)
    chosen = choose(cells, wants.start, wants.stop, wants.layout.catalog.itemsize[wants.tensor], usable, load, salt)
    holes = [wants.hole(row, start, stop, _why(wants, row, usable)) for row, start, stop in chosen.holes]
    if holes:
        if usable:
            missing = "the offers don't cover what is wanted"
        else:
            missing = "every offer was refused" if refusals else "nobody offers anything"
        raise PlanError(
            f"rank {wants.layout.rank} ({wants.layout.parallel}) can't be planned: {missing}",
            holes=tuple(holes),
            refusals=tuple(refusals),
            next_step="start a seed that holds the missing tensors, allow fallback=disk, or see the refusals above",
        )
    return Plan(wants, tuple(usable), chosen.want, chosen.offer, chosen.piece, chosen.start, chosen.stop, tuple(refusals))


def _admit(
    layout: Layout, offers: Sequence[Offer], match: str, reserve: frozenset[SourceId]
) -> tuple[list[Offer], list[Refusal]]:
    usable, refusals = [], []
    verdicts: dict[int, str] = {}
    for offer in offers:
        theirs = offer.layout
        if match == "same-parallelism" and theirs.parallel != layout.parallel and offer.source not in reserve:
            refusals.append(
                Refusal(str(offer.source), f"is {theirs.parallel}, this instance {layout.parallel}, and match=same-parallelism")
            )
            continue
        if id(theirs) not in verdicts:
            verdicts[id(theirs)] = _contradiction(layout, theirs)
        if verdicts[id(theirs)]:
            refusals.append(Refusal(str(offer.source), verdicts[id(theirs)]))
        else:
            usable.append(offer)
    return usable, refusals


def _contradiction(ours: Layout, theirs: Layout) -> str:
    """Why a layout of this catalog can't feed ours, or an empty string."""
    if ours.catalog == theirs.catalog:
        return ""
    known, tied = ours.catalog.row, theirs.aliases
    for spec in theirs.catalog:
        row = known.get(spec.name)
        if row is None:
            unused = spec.name in ours.ignored or spec.name in theirs.ignored or is_derived(spec.name)
            if not unused and tied.get(spec.name) not in known:
                return f"holds {spec.name}, which this target neither has nor ignores"
        elif ours.catalog.dtypes[row] != spec.dtype:
            return f"holds {spec.name} as {spec.dtype}, wanted is {ours.catalog.dtypes[row]}"
        elif ours.catalog.shapes[row] != spec.shape:
            return f"holds {spec.name} with shape {spec.shape}, wanted is {ours.catalog.shapes[row]}"
    return ""


def _cells(wants: Wants, offers: Sequence[Offer], tiers: Sequence[int]) -> Cells:
    """Every intersection of a wanted box with an offered piece. Offers that share a layout are joined once."""
    catalog, width = wants.layout.catalog, wants.layout.catalog.width
    layouts: dict[tuple[int, int], list[int]] = {}
    for i, offer in enumerate(offers):
        layouts.setdefault((tiers[i], id(offer.layout)), []).append(i)
    wanted = np.zeros(len(catalog) + 1, np.bool_)  # the last row answers for -1
    wanted[wants.tensor] = True
    parts: list[tuple[IntArray, ...]] = []
    for k, holders in enumerate(layouts.values()):
        theirs = offers[holders[0]].layout
        tensor = rows_in(wants.layout, theirs)[theirs.pieces.tensor]
        rows = np.flatnonzero(wanted[tensor])
        cut = max(0, theirs.pieces.start.shape[1] - width)
        start = pad_left(theirs.pieces.start[rows, cut:], width, 0)
        stop = pad_left(theirs.pieces.stop[rows, cut:], width, 1)
        parts.append((np.full(len(rows), k), tensor[rows], rows, start, stop))
    if not parts:
        empty = np.zeros(0, np.int64)
        return Cells(empty, empty, empty, np.zeros((0, width), np.int64), np.zeros((0, width), np.int64), (), ())
    which, tensor, piece, start, stop = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(tensor, kind="stable")
    count = np.bincount(tensor, minlength=len(catalog))
    first = np.cumsum(count) - count
    times = count[wants.tensor]
    want = np.repeat(np.arange(len(wants)), times)
    at = order[np.arange(len(want)) - np.repeat(np.cumsum(times) - times, times) + first[wants.tensor][want]]
    low, high = np.maximum(wants.start[want], start[at]), np.minimum(wants.stop[want], stop[at])
    met = (low < high).all(axis=1)
    want, at = want[met], at[met]
    return Cells(
        want,
        which[at],
        piece[at],
        low[met],
        high[met],
        tuple(tuple(h) for h in layouts.values()),
        tuple(tier for tier, _ in layouts),
    )


def _why(wants: Wants, row: int, offers: Sequence[Offer]) -> str:
    name = wants.layout.catalog.names[int(wants.tensor[row])]
    if not offers:
        return "there is no usable offer"
    if not any(name in o.layout.catalog.row for o in offers):
        return "no usable offer's model has this tensor"
    return "no usable offer holds this part"
