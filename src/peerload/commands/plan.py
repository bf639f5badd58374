"""Explain who would read what from whom, from a model's config alone: no weights, no device, no peers. The engine's own model
is laid out for every source rank and target rank, planned, proven and lowered as a real load would be.

Examples:
  peerload plan --model config.json --from tp=2 --to tp=4
  peerload plan --model /models/my-llama --from tp=4 --to tp=2,pp=2 --rank 3 --transport nixl
  peerload plan --model /models/my-llama --from disk --to tp=4 --tensors '*.layers.0.*'
  peerload plan --model /models/my-moe --from tp=8,ep=8 --to tp=4,ep=4 --engine vllm

If no plan exists, the exit status is 3 and the holes (wanted boxes that nobody holds) and refusals (offers left out) are named.

"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..config import Config
from ..console import Console
from ..engines.offline import Engine, add_engine
from ..errors import ConfigError, PlanError
from ..job.reader import WORKERS
from ..model.boxes import IntArray
from ..model.catalog import Parallel
from ..model.layout import Layout
from ..model.offer import Binding, Offer, SourceId
from ..planning.lower import Lowered, lower
from ..planning.plan import Plan, make_plan
from ..planning.wants import box_text
from ..transport.base import Limits
from ..transport.files import FilesTransport
from ..transport.local import LocalTransport
from ..transport.nixl import NixlTransport
from .options import add_config, config_of, parse_parallel

T = TypeVar("T")
DISK = "disk"
#: What a transport asks of a plan is known without opening it.
LIMITS = {"local": LocalTransport.limits, "nixl": NixlTransport.limits, DISK: FilesTransport.limits}
#: A wider matrix doesn't fit a page and is told as a list.
MOST_COLUMNS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", type=Path, help="a config.json, or a directory with one")
    parser.add_argument(
        "--from",
        required=True,
        dest="held",
        metavar="LAYOUT|disk",
        help="what a seed holds, as in tp=2 or tp=2,pp=2; or the files",
    )
    parser.add_argument("--to", required=True, dest="wanted", metavar="LAYOUT", help="what the target wants, as in tp=4")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="only this target rank (default: all)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of that layout (default: %(default)s)")
    parser.add_argument("--lost", type=int, action="append", default=[], metavar="R", help="as if this rank of seed 0 were gone")
    parser.add_argument(
        "--tensors", default="", metavar="PATTERN", help="also show every copy of tensors like this, as in '*.norm*'"
    )
    add_engine(parser, "transformers")
    add_config(parser, "transport", "match", "staging_bytes")


@dataclass(frozen=True, slots=True)
class _PlannedRank:
    """One target rank, planned. Seconds of this process."""

    plan: Plan
    lowered: Lowered
    layout_s: float
    plan_s: float
    lower_s: float

    @property
    def number(self) -> int:
        return self.plan.wants.layout.rank

    def document(self) -> dict[str, object]:
        plan, lowered = self.plan, self.lowered
        return {
            "rank": self.number,
            "needed_nbytes": plan.nbytes,
            "wire_nbytes": lowered.wire_nbytes,
            "copies": len(plan),
            "operations": lowered.operations,
            "batches": len(lowered.steps),
            "staging_nbytes": lowered.staging_nbytes,
            "layout_s": round(self.layout_s, 4),
            "plan_s": round(self.plan_s, 4),
            "lower_s": round(self.lower_s, 4),
            "from": {str(source): n for source, n in plan.bytes_by_source.items()},
            "refusals": [r._asdict() for r in plan.refusals],
        }

    def row(self) -> tuple[object, ...]:
        plan, lowered = self.plan, self.lowered
        overhead = lowered.wire_nbytes / max(1, plan.nbytes)
        return (
            self.number,
            _mb(plan.nbytes),
            _mb(lowered.wire_nbytes),
            f"{overhead:.3f}x",
            len(plan),
            lowered.operations,
            len(lowered.steps),
            _mb(lowered.staging_nbytes),
            round(self.layout_s, 3),
            round(self.plan_s, 3),
            round(self.lower_s, 3),
        )


#: Titles of `_PlannedRank.row`.
COLUMNS = (
    "rank",
    "needed MB",
    "wire MB",
    "wire/needed",
    "copies",
    "operations",
    "batches",
    "staging MB",
    "lay out s",
    "plan s",
    "lower s",
)


@dataclass(slots=True)
class _Ask:
    """What the operator wants to know, checked."""

    config: Config
    source: Parallel | None
    target: Parallel
    ranks: Sequence[int]
    seeds: int
    lost: Sequence[int]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Ask:
        source = None if args.held == DISK else parse_parallel(args.held)
        target = parse_parallel(args.wanted)
        size, held = target.tp * target.pp, 1 if source is None else source.tp * source.pp
        if args.rank is not None and not 0 <= args.rank < size:
            raise ConfigError(f"--rank is {args.rank}, {target} has ranks 0 to {size - 1}")
        if args.seeds < 1:
            raise ConfigError("--seeds must be at least 1")
        for rank in args.lost:
            if not 0 <= rank < held:
                raise ConfigError(f"--lost is {rank}, {args.held} has ranks 0 to {held - 1}")
        return cls(config_of(args), source, target, range(size) if args.rank is None else [args.rank], args.seeds, args.lost)

    @property
    def transport(self) -> str:
        """auto: as on one host."""
        named = "local" if self.config.transport == "auto" else self.config.transport
        return DISK if self.source is None else named


def run(args: argparse.Namespace, console: Console) -> int:
    ask = _Ask.of(args)
    with console.progress() as progress:
        bar = progress.add_task(f"laying out {args.held} and {ask.target}", total=None)
        offers, layouts = _lay_out(args, ask, lambda: progress.advance(bar))
    ranks = [_plan(layout, seconds, offers, ask) for layout, seconds in layouts]
    copies = [row for rank in ranks for row in _copies(rank.plan, args.tensors)] if args.tensors else []
    catalog = layouts[0][0].catalog
    if args.tensors and not copies:
        raise ConfigError(f"no tensor is like {args.tensors!r}", next_step=f"names look like {catalog.names[0]}")
    document: dict[str, object] = {
        "model": str(args.model),
        "engine": args.engine,
        "tensors": len(catalog),
        "nbytes": catalog.nbytes,
        "from": args.held,
        "to": str(ask.target),
        "transport": ask.transport,
        "match": ask.config.match,
        "sources": [{"source": str(o.source), "parallel": str(o.layout.parallel), "nbytes": o.layout.nbytes} for o in offers],
        "seconds": {name: round(s, 4) for name, s in ask.seconds.items()},
        "ranks": [rank.document() for rank in ranks],
    }
    if args.tensors:
        document["copies"] = copies
    console.document(document)
    title = f"{args.model}, {_mb(catalog.nbytes):,} MB: {args.held} -> {ask.target} over {ask.transport}"
    _show(console, title, ask, ranks, offers)
    if copies:
        columns = ("rank", "tensor", "box", "from", "MB")
        rows = [(r["rank"], r["tensor"], r["box"], r["from"], _mb(int(str(r["nbytes"])), 3)) for r in copies]
        console.table(f"copies of {args.tensors}, boxes in the whole tensor's coordinates", columns, rows)
    return 0


def _lay_out(args: argparse.Namespace, ask: _Ask, advance: Callable[[], None]) -> tuple[list[Offer], list[tuple[Layout, float]]]:
    """The offers of every source rank, and each target rank's layout with the seconds it took."""
    offers: list[Offer] = []
    engine = Engine.of(args)
    with _timed(ask, "import"):
        engine.start()
    with _timed(ask, "catalog"):
        _ = engine.catalog
    with _timed(ask, "source_layouts"):
        if ask.source is None:
            if engine.checkpoint is None:
                raise ConfigError(f"--from disk: {args.model} is no directory with safetensors files")
            offers = [] if ask.lost else [engine.checkpoint.offer()]
        else:
            held: list[Layout] = []
            for rank in range(ask.source.tp * ask.source.pp):
                held.append(engine.layout(ask.source, rank).layout)
                advance()
            offers = [_offer(h, seed) for seed in range(ask.seeds) for h in held if seed > 0 or h.rank not in ask.lost]
    layouts: list[tuple[Layout, float]] = []
    with _timed(ask, "target_layouts"):
        for rank in ask.ranks:
            answer = engine.layout(ask.target, rank)
            layouts.append((answer.layout, answer.seconds))
            advance()
    return offers, layouts


def _offer(layout: Layout, seed: int) -> Offer:
    """As if a process held the layout: its buffers side by side."""
    source = SourceId(f"seed-{seed}", layout.rank, "planned")
    return Offer(layout, Binding(source, _side_by_side(layout), ()))


def _side_by_side(layout: Layout, align: int = 64) -> IntArray:
    nbytes = -(-layout.buffer_nbytes // align) * align
    address: IntArray = (1 << 40) + np.cumsum(nbytes) - nbytes
    return address


def _plan(layout: Layout, layout_s: float, offers: Sequence[Offer], ask: _Ask) -> _PlannedRank:
    plan, plan_s = _clocked(lambda: make_plan(layout, offers, match=ask.config.match, salt=f"target/{layout.rank}"))
    limits: Limits = LIMITS[ask.transport]
    staging = ask.config.staging_bytes // WORKERS
    lowered, lower_s = _clocked(lambda: lower(plan, limits, _side_by_side(layout), staging))
    if lowered.nbytes != plan.nbytes:
        raise PlanError(f"rank {layout.rank}: lowering moves {lowered.nbytes} bytes, the plan needs {plan.nbytes}")
    return _PlannedRank(plan, lowered, layout_s, plan_s, lower_s)


def _copies(plan: Plan, pattern: str) -> Iterator[dict[str, object]]:
    catalog = plan.wants.layout.catalog
    tensors = plan.wants.tensor[plan.want]
    like = np.array([fnmatchcase(name, pattern) for name in catalog.names], np.bool_)
    for row in np.flatnonzero(like[tensors]).tolist():
        spec = catalog[int(tensors[row])]
        box = box_text(plan.start[row], plan.stop[row], len(spec.shape))
        yield {
            "rank": plan.wants.layout.rank,
            "tensor": spec.name,
            "box": box,
            "from": str(plan.offers[int(plan.offer[row])].source),
            "nbytes": int(plan.copy_nbytes[row]),
        }


def _show(console: Console, title: str, ask: _Ask, ranks: Sequence[_PlannedRank], offers: Sequence[Offer]) -> None:
    needed, wire = sum(r.plan.nbytes for r in ranks), sum(r.lowered.wire_nbytes for r in ranks)
    proof = f"{_mb(wire):,} MB on the wire for {_mb(needed):,} MB needed; no holes: every byte is written exactly once"
    console.table(title, COLUMNS, [rank.row() for rank in ranks], caption=proof)
    names = [str(o.source) for o in offers]
    read = [{str(source): n for source, n in r.plan.bytes_by_source.items()} for r in ranks]
    what = "MB that each target rank reads from each source"
    if len(names) <= MOST_COLUMNS:
        rows = [(str(r.number), *(_mb(mine.get(name, 0)) for name in names)) for r, mine in zip(ranks, read, strict=True)]
        total = ("all", *(_mb(sum(mine.get(name, 0) for mine in read)) for name in names))
        console.table(what, ("rank", *names), [*rows, total])
    else:
        pairs = [(r.number, name, _mb(n)) for r, mine in zip(ranks, read, strict=True) for name, n in mine.items()]
        console.table(what, ("rank", "source", "MB"), pairs)
    for refusal in sorted({str(refusal) for r in ranks for refusal in r.plan.refusals}):
        console.text(f"refused: {refusal}")
    console.text("seconds: " + ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in ask.seconds.items()))


def _mb(nbytes: int, digits: int = 1) -> float:
    return round(nbytes / 1e6, digits)


def _clocked(work: Callable[[], T]) -> tuple[T, float]:
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


@contextmanager
def _timed(ask: _Ask, name: str) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    ask.seconds[name] = time.perf_counter() - began_s
