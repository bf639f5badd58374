"""How fast the transports move bytes between two processes of this host, and how fast they could.

The limits come first, measured in the same run: memcpy on one thread and on two into touched memory, and two threads into
untouched memory of the kind that a fresh target receives into (a memfd arena). Limit and candidates alternate, several
times; the numbers are medians, for such machines are noisy. Ends in one JSON line.

    peerload bench transport -- [--rounds 7] [--mebibytes 1024]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from ..deadline import Deadline
from ..memory.arena import Arena
from ..planning.batch import Batch
from ..testing.source_process import SourceProcess
from ..transport.base import Transport
from ..transport.probes import cma_error, probe
from ..transport.registry import open_transport

memcpy = ctypes.CDLL(None).memcpy
memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def limit(src: int, dst: int, nbytes: int, threads: int, pool: ThreadPoolExecutor, grain: int) -> float:
    """Seconds for `threads` threads to copy nbytes with libc's memcpy in pieces of `grain`."""
    offsets = range(0, nbytes, grain)

    def work(first: int) -> None:
        for offset in offsets[first::threads]:
            memcpy(dst + offset, src + offset, min(grain, nbytes - offset))

    began = time.perf_counter()
    list(pool.map(work, range(threads)))
    return time.perf_counter() - began


def shapes(src: int, dst: int, nbytes: int) -> dict[str, Batch]:
    """The patterns of a model's weights: one block, tensors, scattered pages, and the halves of a row-parallel cut."""
    rng = np.random.default_rng(0)
    mib = np.arange(nbytes >> 20, dtype=np.int64)[:1000] << 20
    pages = min(100_000, nbytes // 4096)
    there = rng.permutation(nbytes // 4096)[:pages].astype(np.int64) * 4096
    here = np.sort(rng.permutation(nbytes // 4096)[:pages].astype(np.int64)) * 4096
    one = np.ones(1, np.int64)
    rows = nbytes // 8192
    halves = Batch(src * one, dst * one, 4096 * one, np.array([[1, 1, rows]]), np.array([[0, 0, 8192]]), np.array([[0, 0, 4096]]))
    return {
        "one_block": Batch.of_runs(src * one, dst * one, nbytes * one),
        "tensors_1mib": Batch.of_runs(src + mib, dst + rng.permutation(mib), np.full(len(mib), 1 << 20)),
        "scattered_4kib": Batch.of_runs(src + there, dst + here, np.full(pages, 4096)),
        "row_halves_4kib": halves,
    }


def read(transport: Transport, peer: str, batch: Batch) -> float:
    """Seconds, batch by batch as lowering would hand them out."""
    limits = transport.limits
    began = time.perf_counter()
    if not limits.strided:
        batch = Batch.of_runs(*batch.runs())
    rows, _ = batch.cut(limits.max_batch_nbytes)
    size = rows.run * rows.count.prod(axis=1)
    group = (np.cumsum(size) - size) // limits.max_batch_nbytes
    edges = [0, *(1 + np.flatnonzero(np.diff(group))).tolist(), len(rows)]
    for a, b in itertools.pairwise(edges):
        transport.read(peer, rows.take(slice(a, b)), Deadline.after(120))
    return time.perf_counter() - began


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--mebibytes", type=int, default=1024)
    told = options.parse_args()
    nbytes = told.mebibytes << 20
    candidates = {
        "local_mapped": ("local", "memfd"),
        "local_huge": ("local", "huge"),
        "local_cma": ("local", "plain"),
        "nixl": ("nixl", "plain"),
    }
    if cma_error():
        del candidates["local_cma"]
    if not probe("nixl").available:
        del candidates["nixl"]
        print("nixl is left out:", probe("nixl").reason, file=sys.stderr)
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        arena = stack.enter_context(Arena(2 * nbytes))
        ours, here = arena.allocate(nbytes, 4096), arena.allocate(nbytes, 4096)
        for address in (ours, here):
            arena.view(address, nbytes)[:] = bytes(nbytes)
        sides = {name: open_side(stack, arena, here, nbytes, *how) for name, how in candidates.items()}
        grown = dict.fromkeys(sides, 0.0)
        for turn in range(told.rounds + 1):
            for name, measure in one_round(sides, ours, here, nbytes, pool, grown):
                if turn > 0:  # the first round only warms up
                    seconds.setdefault(name, []).append(measure)
    for name, mebibytes in grown.items():
        print(f"{name}: resident set grew by at most {mebibytes:.0f} MiB while {told.mebibytes} MiB were read", file=sys.stderr)
    return report(seconds, nbytes, list(candidates))


@dataclass(frozen=True, slots=True)
class Side:
    """An open transport, connected to a source process of its own."""

    transport: Transport
    peer: str
    first: int
    batches: dict[str, Batch]


def open_side(stack: ExitStack, arena: Arena, here: int, nbytes: int, kind: str, memory: str) -> Side:
    source = stack.enter_context(SourceProcess(kind, [nbytes], memory=memory, random=False))
    transport = open_transport(kind, Config(threads=2, interface="lo"))
    stack.callback(transport.close)
    transport.register([arena.region()])
    first = source.address[0]
    return Side(transport, transport.connect(source.description, kind, Deadline.after(20)), first, shapes(first, here, nbytes))


def one_round(
    sides: dict[str, Side], ours: int, here: int, nbytes: int, pool: ThreadPoolExecutor, grown: dict[str, float]
) -> Iterator[tuple[str, float]]:
    """Everything once, limits and candidates by turns: (name, seconds)."""
    for threads in (1, 2):  # the limit is the better of one piece per thread and of 16 MiB pieces
        for grain in (nbytes // threads, 16 << 20):
            yield f"memcpy_{threads}/{grain}", limit(ours, here, nbytes, threads, pool, grain)
    for shape in next(iter(sides.values())).batches:
        for name, side in sides.items():
            before = resident_mib()
            yield f"{name}/{shape}", read(side.transport, side.peer, side.batches[shape])
            grown[name] = max(grown[name], resident_mib() - before)
    with Arena(nbytes) as target:
        yield "memcpy_2_fresh", limit(ours, target.allocate(nbytes, 4096), nbytes, 2, pool, 4 << 20)
    for name, side in sides.items():
        with Arena(nbytes) as target:
            there = target.allocate(nbytes, 4096)
            side.transport.register([target.region()])
            one = np.ones(1, np.int64)
            yield f"{name}/fresh", read(side.transport, side.peer, Batch.of_runs(side.first * one, there * one, nbytes * one))


def report(seconds: dict[str, list[float]], nbytes: int, candidates: list[str]) -> int:
    def rate(name: str, moved: int) -> float:
        return moved / statistics.median(seconds[name]) / 1e9

    limits = {threads: max(rate(name, nbytes) for name in seconds if name.startswith(f"memcpy_{threads}/")) for threads in (1, 2)}
    fresh = rate("memcpy_2_fresh", nbytes)
    print(f"memcpy, GB/s: 1 thread {limits[1]:.1f}, 2 threads {limits[2]:.1f}; 2 threads into untouched memory {fresh:.1f}")
    moved = {
        "one_block": nbytes,
        "tensors_1mib": min(1000, nbytes >> 20) << 20,
        "scattered_4kib": min(100_000, nbytes // 4096) * 4096,
        "row_halves_4kib": nbytes // 2,
        "fresh": nbytes,
    }
    rates = {c: {shape: round(rate(f"{c}/{shape}", n), 2) for shape, n in moved.items()} for c in candidates}
    print(f"{'GB/s':14}" + "".join(f"{shape:>17}" for shape in moved))
    for name, row in rates.items():
        print(f"{name:14}" + "".join(f"{row[shape]:17.2f}" for shape in moved))
    best = rates["local_mapped"]
    result = {
        "bench": "transport",
        "nbytes": nbytes,
        "cores": len(os.sched_getaffinity(0)),
        "memcpy_1_gb_s": round(limits[1], 2),
        "memcpy_2_gb_s": round(limits[2], 2),
        "memcpy_2_fresh_gb_s": round(fresh, 2),
        "rates_gb_s": rates,
        "touched_share": round(best["one_block"] / limits[2], 3),
        "touched_target": 0.70,
        "fresh_share": round(best["fresh"] / fresh, 3),
        "fresh_target": 0.90,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
