"""Who reads which box from whom: a plan, proven before a byte moves.

`make_plan` intersects the boxes a rank wants with the boxes on offer and chooses a holder for each part. A `Plan` proves
itself when it is made: every wanted element is written exactly once, out of a piece that holds it, with equal dtypes.
One that doesn't can't be constructed. First try, lost source, resume and disk fallback are the same call with other
arguments: `make_plan(plan.rest(undone), remaining_offers)`.

Pure: standard library and NumPy only, no I/O, the same result for the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import Hole, PlanError, Refusal
from ..model.boxes import IntArray, first_overlap, pad_left, volumes
from ..model.catalog import Catalog, frozen, is_derived
from ..model.layout import Layout
from ..model.offer import Offer, SourceId
from .holders import Cells, choose


@dataclass(frozen=True, eq=False)
class Wants:
    """Boxes that a target rank has yet to receive: start[n, width], stop[n, width] inside the layout's pieces `piece[n]`."""

    layout: Layout
    piece: IntArray
    start: IntArray
    stop: IntArray

    @classmethod
    def of(cls, layout: Layout) -> Wants:
        """Everything the layout's loader has to write. Raises ManifestError if two pieces share a byte."""
        layout.prove_disjoint()
        rows = layout.written
        pieces = layout.pieces
        return cls(layout, rows, pieces.start[rows], pieces.stop[rows])

    def __len__(self) -> int:
        return len(self.piece)

    @property
    def tensor(self) -> IntArray:
        return self.layout.pieces.tensor[self.piece]

    @cached_property
    def nbytes(self) -> int:
        return int((volumes(self.start, self.stop) * self.layout.catalog.itemsize[self.tensor]).sum())

    def hole(self, row: int, start: IntArray, stop: IntArray, reason: str) -> Hole:
        spec = self.layout.catalog[int(self.tensor[row])]
        return Hole(spec.name, self.layout.rank, box_text(start, stop, len(spec.shape)), reason)


def box_text(start: IntArray, stop: IntArray, ndim: int) -> str:
    cut = len(start) - ndim
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start[cut:].tolist(), stop[cut:].tolist(), strict=True)) + "]"


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
        _prove(self)

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

    def source_boxes(self) -> tuple[IntArray, IntArray]:
        """Per copy, the start and stop of the source piece it reads from, [n, width] each."""
        width = self.start.shape[1]
        start, stop = np.zeros_like(self.start), np.ones_like(self.stop)
        for i, offer in enumerate(self.offers):
            rows = np.flatnonzero(self.offer == i)
            pieces = offer.layout.pieces
            common = min(width, pieces.start.shape[1])
            start[rows, width - common :] = pieces.start[self.piece[rows], -common:]
            stop[rows, width - common :] = pieces.stop[self.piece[rows], -common:]
        return start, stop


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


def _rows_in(ours: Layout, theirs: Layout) -> IntArray:
    """Our catalog row for each of their catalog rows, -1 for tensors we don't have. A tied tensor that they lack under
    our name is found under its other name."""
    if ours.catalog == theirs.catalog:
        rows = np.arange(len(theirs.catalog))
    else:
        rows = np.fromiter((ours.catalog.row.get(n, -1) for n in theirs.catalog.names), np.int64, len(theirs.catalog))
    held = set(np.unique(theirs.pieces.tensor).tolist()) if ours.aliases else set()
    for alias, name in ours.aliases.items():
        other = theirs.catalog.row.get(alias)
        if other in held and theirs.catalog.row.get(name) not in held:
            rows = rows.copy()
            rows[other] = ours.catalog.row[name]
    return rows


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
        tensor = _rows_in(wants.layout, theirs)[theirs.pieces.tensor]
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


def _prove(plan: Plan) -> None:
    """Raise PlanError unless the copies write every wanted element exactly once out of pieces that hold it."""
    wants, layout = plan.wants, plan.wants.layout
    catalog, width = layout.catalog, layout.catalog.width

    def refuse(row: int, problem: str) -> None:
        want = int(plan.want[row])
        name = catalog.names[int(wants.tensor[want])] if 0 <= want < len(wants) else f"want {want}"
        box = box_text(plan.start[row], plan.stop[row], width)
        raise PlanError(f"invalid plan: copy {row} of {name}{box} for rank {layout.rank} {problem}")

    layout.prove_disjoint()
    twice = first_overlap(wants.piece, wants.start, wants.stop)
    if twice is not None:
        hole = wants.hole(twice[1], wants.start[twice[1]], wants.stop[twice[1]], f"is wanted again by want {twice[0]}")
        raise PlanError("invalid plan: wants overlap", holes=(hole,))
    n = len(plan)
    columns_fit = len(plan.offer) == len(plan.piece) == n and plan.start.shape == plan.stop.shape == (n, width)
    if not columns_fit:
        raise PlanError("invalid plan: columns differ in length")
    for column, limit in ((plan.want, len(wants)), (plan.offer, len(plan.offers))):
        for row in np.flatnonzero((column < 0) | (column >= limit))[:1]:
            refuse(int(row), "names a want or an offer that does not exist")
    for row in np.flatnonzero(
        ((plan.start < wants.start[plan.want]) | (plan.stop > wants.stop[plan.want]) | (plan.start >= plan.stop)).any(axis=1)
    )[:1]:
        refuse(int(row), "lies outside the wanted box")
    mapped: dict[int, IntArray] = {}
    for i, offer in enumerate(plan.offers):
        rows = np.flatnonzero(plan.offer == i)
        pieces = offer.layout.pieces
        for row in rows[(plan.piece[rows] < 0) | (plan.piece[rows] >= len(pieces))][:1]:
            refuse(int(row), f"names a piece that {offer.source} does not have")
        theirs = pieces.tensor[plan.piece[rows]]
        if id(offer.layout) not in mapped:
            mapped[id(offer.layout)] = _rows_in(layout, offer.layout)
        for row in rows[mapped[id(offer.layout)][theirs] != wants.tensor[plan.want[rows]]][:1]:
            refuse(int(row), f"reads another tensor of {offer.source}")
        if offer.layout.catalog is not catalog:
            _check_dtypes(catalog, offer.layout.catalog, theirs, wants.tensor[plan.want[rows]], rows, refuse)
    held_start, held_stop = plan.source_boxes()
    for row in np.flatnonzero(((plan.start < held_start) | (plan.stop > held_stop)).any(axis=1))[:1]:
        refuse(int(row), f"lies outside the piece that {plan.offers[int(plan.offer[row])].source} holds")
    clash = first_overlap(plan.want, plan.start, plan.stop)
    if clash is not None:
        refuse(clash[1], f"writes elements that copy {clash[0]} writes too")
    written = np.bincount(plan.want, volumes(plan.start, plan.stop), len(wants)).astype(np.int64)
    for want in np.flatnonzero(written != volumes(wants.start, wants.stop))[:1]:
        hole = wants.hole(int(want), wants.start[want], wants.stop[want], f"only {written[want]} of its elements are written")
        raise PlanError("invalid plan: a wanted box is not covered", holes=(hole,))


def _check_dtypes(
    ours: Catalog, theirs: Catalog, their_rows: IntArray, our_rows: IntArray, rows: IntArray, refuse: Callable[[int, str], None]
) -> None:
    for mine, other in dict.fromkeys(zip(our_rows.tolist(), their_rows.tolist(), strict=True)):
        if ours.dtypes[mine] != theirs.dtypes[other]:
            row = rows[np.flatnonzero(their_rows == other)[0]]
            refuse(int(row), f"would read {theirs.dtypes[other]} into {ours.dtypes[mine]}")
