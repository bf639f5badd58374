"""Say which checkpoint element each byte of an engine's parameters holds, for any rank of any parallel layout: by following the
engine's own loader on a model without memory. No weights, no GPU and no peers are needed, the engine is.

Examples:
  peerload layout --engine vllm --model /models/my-llama --tp 2
  peerload layout --engine sglang --model /models/my-moe --tp 8 --ep 8 --rank 3 --tensors '*.layers.0.*'
  peerload layout --engine vllm --model config.json --tp 2 --layers 2 --probe
  peerload layout --engine vllm --model /models/remote --tp 2 --engine-arg trust_remote_code=true --platform cuda

With --probe the engine's real load is run too, several times and in memory, on values that say where they come from: the two
must agree on every element, or the exit status is 3 and the differences are named. It also tells what the engine's
post-processing makes of each parameter. Use --layers to cut a large model down for it.

"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import numpy as np

from ..console import Console
from ..engines.offline import Answer, Engine, add_engine
from ..errors import ConfigError, LayoutError
from ..model.catalog import Parallel
from ..model.layout import Layout
from .options import add_parallel, parallel_of

#: A page has no room for more regions; --json gives all.
MOST_ROWS: Final = 400
#: Differences that are told.
MOST_TOLD: Final = 10


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", type=Path, help="a model directory, or a config.json alone")
    add_engine(parser)
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="only this rank (default: all)")
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="as if the model had N layers")
    parser.add_argument("--tensors", default="*", metavar="PATTERN", help="only parameters or tensors like this, as in '*.norm*'")
    parser.add_argument("--probe", action="store_true", help="load coded values into the real model and compare")
    parser.add_argument(
        "--bits",
        type=int,
        choices=(2, 4, 8),
        default=None,
        help="with --probe: follow packed numbers of so many bits, each by itself (for 4-bit weights)",
    )
    add_parallel(parser)


@dataclass(frozen=True, slots=True)
class Extent:
    """A row of the answer. offset and strides in bytes, of the parameter; tensor: of the checkpoint, or derived; note: what it is
    when no box of a tensor, or why the tensor is derived."""

    parameter: str
    offset: int
    nbytes: int
    tensor: str
    box: str
    strides: tuple[int, ...]
    note: str

    def document(self) -> dict[str, object]:
        told: dict[str, object] = {"parameter": self.parameter, "offset": self.offset, "nbytes": self.nbytes}
        if self.tensor:
            told |= {"tensor": self.tensor, "box": self.box, "strides": self.strides}
        return told | ({"note": self.note} if self.note else {})

    def row(self) -> tuple[object, ...]:
        held = self.tensor + (f" ({self.note})" if self.note else "") if self.tensor else self.note
        return self.parameter, self.offset, self.nbytes, held, self.box, ", ".join(map(str, self.strides))


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe said of one rank. changes: parameter -> (what post-processing does to it, in words). unprocessed: why it
    couldn't be run here."""

    agreed: int
    differences: tuple[str, ...]
    changes: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    unprocessed: str = ""

    def document(self) -> dict[str, object]:
        return {
            "agreed": self.agreed,
            "differences": self.differences,
            "seconds": round(self.seconds, 4),
            "post_processing": {name: {"kind": kind, "reason": why} for name, (kind, why) in self.changes.items()},
            "not_post_processed": self.unprocessed,
        }


def run(args: argparse.Namespace, console: Console) -> int:
    parallel = parallel_of(args)
    size = parallel.tp * parallel.pp
    if args.rank is not None and not 0 <= args.rank < size:
        raise ConfigError(f"--rank is {args.rank}, {parallel} has ranks 0 to {size - 1}")
    engine = Engine.of(args, args.layers)
    ranks: list[dict[str, object]] = []
    differences: list[str] = []
    for rank in range(size) if args.rank is None else [args.rank]:
        answer = engine.layout(parallel, rank)
        rows = [r for r in regions(answer) if fnmatchcase(r.parameter, args.tensors) or fnmatchcase(r.tensor, args.tensors)]
        if not rows:
            raise ConfigError(
                f"no parameter or tensor is like {args.tensors!r}", next_step=f"names look like {answer.layout.buffer_names[0]}"
            )
        verdict = _probe(engine, answer, parallel, rank, args.bits) if args.probe else None
        _show(console, f"{args.model} under {engine.name} {engine.version}, {parallel}, rank {rank}", answer, rows, verdict)
        ranks.append(_document(answer, rows, verdict))
        differences += [f"rank {rank}: {d}" for d in verdict.differences] if verdict else []
    if differences:
        told = [f"  {d}" for d in differences[:MOST_TOLD]]
        told += [f"  ... and {len(differences) - MOST_TOLD} more" for _ in differences[MOST_TOLD : MOST_TOLD + 1]]
        raise LayoutError(
            "\n".join([f"trace and probe differ in {len(differences)} places:", *told]),
            next_step="don't exchange weights of this model between layouts; please report it",
        )
    console.document(
        {
            "model": str(args.model),
            "engine": engine.name,
            "version": engine.version,
            "parallel": str(parallel),
            "ranks": ranks,
        }
    )
    return 0


def regions(answer: Answer) -> Iterator[Extent]:
    """All of a rank's pieces and constants, buffer by buffer and in order of their offsets."""
    layout = answer.layout
    found: list[tuple[int, Extent]] = []
    for piece in layout.written.tolist():
        spec, buffer = layout.tensor_of(piece), int(layout.pieces.buffer[piece])
        strides = tuple(layout.pieces.stride[piece, layout.pieces.stride.shape[1] - len(spec.shape) :].tolist())
        offset, nbytes = int(layout.pieces.offset[piece]), int(layout.piece_nbytes[piece])
        name, note = layout.buffer_names[buffer], answer.kept.derived.get(spec.name, "")
        found.append((buffer, Extent(name, offset, nbytes, spec.name, str(layout.box_of(piece)), strides, note)))
    for c in layout.constants:
        note = f"constant 0x{c.fill[::-1].hex()} in {list(c.shape)}"
        nbytes = math.prod(c.shape) * len(c.fill)
        found.append((c.buffer, Extent(layout.buffer_names[c.buffer], c.offset, nbytes, "", "", c.strides, note)))
    return (region for _, region in sorted(found, key=lambda f: (f[0], f[1].offset)))


def _probe(engine: Engine, answer: Answer, parallel: Parallel, rank: int, bits: int | None) -> ProbeResult:
    from ..tracing.probe.agree import agree
    from ..tracing.probe.decoded import told_boxes
    from ..tracing.probe.run import changes, groups_of

    covers = {name: c for name, c in answer.kept.covers.items() if name.rpartition(" as ")[0] not in engine.catalog.row}
    groups = () if bits else groups_of(covers.values())
    loaded = engine.probe(parallel, rank, processed=False, bits=bits, groups=groups)
    found = agree(answer.layout, loaded, covers)
    wrong = {d.partition(": ")[0] for d in found}
    agreed = sum(name not in wrong for name in answer.layout.buffer_names)
    if not engine.post_processes:
        return ProbeResult(agreed, tuple(found), {}, loaded.seconds)
    try:
        processed = engine.probe(parallel, rank, processed=True, bits=bits)
    except LayoutError as error:  # kernels that this host's device lacks
        return ProbeResult(agreed, tuple(found), {}, loaded.seconds, error.message)
    changed = changes(loaded, processed)
    for name, (kind, why) in changed.items():
        if kind == "permuted":
            boxes = told_boxes(processed, processed.buffers[name])
            changed[name] = (kind, f"{why}; {boxes}" if why else boxes)
    return ProbeResult(agreed, tuple(found), changed, loaded.seconds + processed.seconds)


def _document(answer: Answer, rows: Sequence[Extent], verdict: ProbeResult | None) -> dict[str, object]:
    layout = answer.layout
    return {
        "rank": layout.rank,
        "parameters": len(layout.buffer_names),
        "nbytes": int(layout.buffer_nbytes.sum()),
        "pieces": len(layout.written),
        "constants": len(layout.constants),
        "seconds": round(answer.seconds, 4),
        "cached": answer.cached,
        "regions": [r.document() for r in rows],
        "derived": dict(answer.kept.derived),
        "made": answer.kept.made,
        "hidden": dict(answer.kept.hidden),
        "aliases": dict(layout.aliases),
        "ignored": dict(layout.ignored),
        **({"probe": verdict.document()} if verdict else {}),
    }


def _show(console: Console, title: str, answer: Answer, rows: Sequence[Extent], verdict: ProbeResult | None) -> None:
    columns = ("parameter", "offset", "bytes", "checkpoint tensor", "box", "strides")
    console.table(title, columns, [r.row() for r in rows[:MOST_ROWS]])
    if len(rows) > MOST_ROWS:
        console.text(f"... and {len(rows) - MOST_ROWS} more regions: choose with --tensors, or see all with --json")
    for name, other in answer.layout.aliases.items():
        console.text(f"tied: {name} is {other}")
    _listed(console, "derived", answer.kept.derived)
    _listed(console, "kept outside of parameters", answer.kept.hidden)
    _listed(console, "ignored", answer.layout.ignored)
    if answer.kept.made:
        console.text(f"not of the checkpoint: {', '.join(answer.kept.made[:8])}{', ...' if len(answer.kept.made) > 8 else ''}")
    console.text(summary(answer.layout, answer.seconds, cached=answer.cached))
    if verdict is not None:
        _tell(console, len(answer.layout.buffer_names), verdict)


def summary(layout: Layout, seconds: float, *, cached: bool) -> str:
    """One line: what there is, and how long it took to know."""
    how = "read from the cache" if cached else "derived"
    written = int(np.sum(layout.piece_nbytes[layout.written]))
    return (
        f"rank {layout.rank}: {int(layout.buffer_nbytes.sum()) / 1e6:,.1f} MB in {len(layout.buffer_names)} parameters, "
        f"{written / 1e6:,.1f} MB of them {len(layout.written)} pieces, {len(layout.constants)} constants; "
        f"{how} in {seconds:.2f} s"
    )


def _tell(console: Console, parameters: int, verdict: ProbeResult) -> None:
    console.text(f"trace == probe on {verdict.agreed} of {parameters} parameters ({verdict.seconds:.1f} s)")
    if not verdict.changes:
        console.text(f"post-processing: {verdict.unprocessed or 'this engine has none'}")
        return
    kinds = [kind for kind, _ in verdict.changes.values()]
    console.text("post-processing: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
    changed = [(name, kind, why) for name, (kind, why) in verdict.changes.items() if kind not in ("unchanged", "constant")]
    if changed:
        console.table("what post-processing changes", ("tensor", "becomes", "how"), changed[:MOST_ROWS])


def _listed(console: Console, what: str, reasons: Mapping[str, str]) -> None:
    """Names with reasons, as many as a page has room for."""
    for name, reason in list(reasons.items())[:MOST_TOLD]:
        console.text(f"{what}: {name}: {reason}")
    if len(reasons) > MOST_TOLD:
        console.text(f"{what}: ... and {len(reasons) - MOST_TOLD} more")
