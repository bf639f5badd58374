"""How long planning and lowering take for one target rank, and how much memory.

    peerload bench plan -- [--runs 5] [--case NAME]

The limit is the size of the answer: DeepSeek-V3 on 8 ranks is 100,000 pieces on offer, about 12 MB of columns, which NumPy
walks in milliseconds. Each case runs in its own process. Seeds' layouts are decoded from their wire format anew for each
run, with their own catalog object, so nothing is cached from the run before; one warm-up, then the median of `--runs` runs
for each of the first, a middle and the last target rank, of which the slowest counts. Lowering is timed for a transport that
takes strided copies (local) and for one that takes runs (NIXL's limits); the slower one counts. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from ..coordinator.codec import decode_catalog, decode_layout, encode_catalog, encode_layout
from ..model.catalog import Catalog, Parallel
from ..model.layout import Layout
from ..model.offer import Binding, Offer, SourceId
from ..planning.lower import Lowered, lower
from ..planning.plan import Plan, make_plan
from ..testing.layouts import FP8_BLOCK, Model, Storing, deepseek_v3, kimi_k2, layout, layouts, llama_70b, qwen3_235b
from ..transport.base import Limits

STAGING_NBYTES = 256 << 20
STRIDED = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=256 << 20)
RUNS = Limits(strided=False, operation_nbytes=20 << 10, max_operations=1 << 16, max_batch_nbytes=64 << 20)


@dataclasses.dataclass(frozen=True)
class Case:
    """seeds: instances of the model, each with its arrangement. limit_ms: what planning and lowering together may take."""

    model: Callable[[], Model]
    seeds: tuple[Parallel, ...]
    target: Parallel
    limit_ms: float | None = None


def separate() -> Model:
    """DeepSeek-V3 with a buffer for each expert's matrix."""
    return deepseek_v3(Storing("fp8_block", fused_experts=False))


CASES = {
    "llama-70b fp8 tp2 -> tp4": Case(lambda: llama_70b(FP8_BLOCK), (Parallel(2),), Parallel(4), 50),
    "llama-70b fp8 tp4 -> tp2": Case(lambda: llama_70b(FP8_BLOCK), (Parallel(4),), Parallel(2), 50),
    "deepseek-v3 tp8ep8 -> tp16ep16": Case(deepseek_v3, (Parallel(8, ep=8),), Parallel(16, ep=16), 500),
    "deepseek-v3 tp8ep8 -> tp16ep16, expert buffers": Case(separate, (Parallel(8, ep=8),), Parallel(16, ep=16), 500),
    "kimi-k2 tp8ep8 -> tp16ep16": Case(kimi_k2, (Parallel(8, ep=8),), Parallel(16, ep=16), 1000),
    # No target was set for these; they are the hard ones.
    "deepseek-v3 tp8ep8 -> tp16": Case(deepseek_v3, (Parallel(8, ep=8),), Parallel(16)),
    "deepseek-v3 tp16 -> tp8ep8": Case(deepseek_v3, (Parallel(16),), Parallel(8, ep=8)),
    "deepseek-v3 4 x tp8ep8 -> tp16ep16": Case(deepseek_v3, (Parallel(8, ep=8),) * 4, Parallel(16, ep=16)),
    "deepseek-v3 tp8ep8 and tp16 -> tp16ep16": Case(deepseek_v3, (Parallel(8, ep=8), Parallel(16)), Parallel(16, ep=16)),
    "qwen3-235b tp8 -> tp4, shards end inside blocks": Case(qwen3_235b, (Parallel(8),), Parallel(4)),
}


def addresses(held: Layout) -> np.ndarray:
    """Every buffer on its own 256-byte boundary, never touching the next."""
    room = (held.buffer_nbytes // 256 + 1) * 256
    return (1 << 40) + np.cumsum(room) - room


def decoder(case: Case) -> Callable[[], list[Offer]]:
    """Offers as a target gets them: decoded from the wire, every call anew."""
    made = [(i, x) for i, parallel in enumerate(case.seeds) for x in layouts(case.model(), parallel)]
    catalog = encode_catalog(made[0][1].catalog)
    blobs = {id(x): encode_layout(x, catalog.digest).data for _, x in made}

    def decode() -> list[Offer]:
        book = decode_catalog(catalog.data)
        decoded = {key: decode_layout(data, lambda _: book) for key, data in blobs.items()}
        return [Offer(decoded[id(x)], Binding(SourceId(f"seed{i}", x.rank, "1"), addresses(x), ())) for i, x in made]

    return decode


def fresh(held: Layout) -> Layout:
    """The same layout with nothing worked out about it yet."""
    c = held.catalog
    return dataclasses.replace(held, catalog=Catalog(c.names, c.dtypes, c.shapes))


def once(wanted: Layout, offers: list[Offer]) -> tuple[Plan, list[Lowered], list[float]]:
    """The plan, its lowerings (strided, runs), and the milliseconds of each of the three steps."""
    address, times = addresses(wanted), [time.perf_counter()]
    plan = make_plan(wanted, offers, salt=str(wanted.rank))
    times.append(time.perf_counter())
    lowered = []
    for limits in (STRIDED, RUNS):
        lowered.append(lower(plan, limits, address, STAGING_NBYTES))
        times.append(time.perf_counter())
    return plan, lowered, [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def measure(name: str, runs: int) -> dict[str, object]:
    case = CASES[name]
    decode = decoder(case)
    world = case.target.tp * case.target.pp
    wanted = [layout(case.model(), case.target, rank) for rank in sorted({0, world // 2, world - 1})]
    once(fresh(wanted[0]), decode())
    rows = []
    for want in wanted:
        decode_ms, steps = [], []
        for _ in range(runs):
            began = time.perf_counter()
            offers, mine = decode(), fresh(want)
            decode_ms.append(1e3 * (time.perf_counter() - began))
            plan, (strided, by_runs), times = once(mine, offers)
            steps.append(times)
        plan_ms, strided_ms, runs_ms = (statistics.median(column) for column in zip(*steps, strict=True))
        rows.append(
            {
                "rank": want.rank,
                "plan_ms": round(plan_ms, 1),
                "lower_strided_ms": round(strided_ms, 1),
                "lower_runs_ms": round(runs_ms, 1),
                "total_ms": round(plan_ms + max(strided_ms, runs_ms), 1),
                "decode_ms": round(statistics.median(decode_ms), 1),
                "copies": len(plan),
                "operations_strided": strided.operations,
                "operations_runs": by_runs.operations,
                "nbytes": plan.nbytes,
                "wire_strided": round(strided.wire_nbytes / plan.nbytes, 4),
                "wire_runs": round(by_runs.wire_nbytes / plan.nbytes, 4),
            }
        )
    worst = max(rows, key=lambda row: float(str(row["total_ms"])))
    offers, mine = decode(), fresh(wanted[0])
    tracemalloc.start()
    once(mine, offers)
    peak = tracemalloc.get_traced_memory()[1]
    return {
        "case": name,
        "pieces_on_offer": sum(len(o.layout.pieces) for o in offers),
        **worst,
        "limit_ms": case.limit_ms,
        "met": None if case.limit_ms is None else bool(float(str(worst["total_ms"])) <= case.limit_ms),
        "peak_mb": round(peak / 1e6, 1),
        "process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--case", choices=CASES)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.runs)))
        return
    heads = ("plan", "lower", "total", "limit ms", "copies", "ops strided", "ops runs", "wire runs", "peak MB", "process MB")
    print(f"{'':48}" + "".join(f"{head:>12}" for head in heads))
    results = []
    for name in CASES:
        command = [sys.executable, "-m", __spec__.name, "--runs", str(args.runs), "--case", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
        r = json.loads(out)
        results.append(r)
        lowering = max(r["lower_strided_ms"], r["lower_runs_ms"])
        cells = (
            r["plan_ms"],
            lowering,
            r["total_ms"],
            r["limit_ms"] or "-",
            r["copies"],
            r["operations_strided"],
            r["operations_runs"],
            f"{r['wire_runs']:.3f}x",
            r["peak_mb"],
            r["process_peak_mb"],
        )
        print(f"{name:48}" + "".join(f"{cell!s:>12}" for cell in cells), flush=True)
    print(json.dumps({"bench": "plan", "met": all(r["met"] is not False for r in results), "cases": results}))


if __name__ == "__main__":
    main()
