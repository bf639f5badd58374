"""How fast digests are, against memcpy in the same run; and the comparison of 100,000 measured boxes.

    peerload bench digest -- [--gib 1] [--rounds 5]

The limit is memory: a digest reads each byte once, a copy reads and writes it. Shares are of the memcpy rate (bytes copied
per second) with as many threads; both are medians of runs that alternate. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from ..integrity.claims import Claims, Measured
from ..integrity.digest import PRIME, digest_boxes
from ..integrity.verdict import State, compare
from ..memory.space import HOST, digest_layout
from ..model.boxes import Box
from ..model.catalog import ITEMSIZE, Catalog, TensorSpec
from ..model.layout import Layout, Piece, Pieces
from ..model.offer import SourceId

HIDDEN, INTER = 8192, 28672  # Llama-3.3-70B
memcpy = ctypes.CDLL(None).memcpy
memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
memcpy.restype = None


def copy(to: np.ndarray, source: np.ndarray, threads: int) -> None:
    edges = np.linspace(0, len(source), threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        for a, b in itertools.pairwise(edges):
            pool.submit(memcpy, to.ctypes.data + a, source.ctypes.data + a, b - a)


def held(kind: str, dtype: str, nbytes: int) -> Layout:
    """About `nbytes` of MLP matrices of TP2's rank 1, as many tensors as fit.

    column: gate_proj, whole rows. row: down_proj, half of each row, dense. strided: the same half inside whole rows.
    transposed: column, stored [in, out]."""
    size = ITEMSIZE[dtype]
    shape, box = ((INTER, HIDDEN), Box((INTER // 2, 0), (INTER, HIDDEN)))
    strides: tuple[int, ...] = (HIDDEN * size, size)
    if kind == "transposed":
        strides = (size, INTER // 2 * size)
    if kind in ("row", "strided"):
        shape, box = (HIDDEN, INTER), Box((0, INTER // 2), (HIDDEN, INTER))
        strides = ((INTER if kind == "strided" else INTER // 2) * size, size)
    each = shape[0] * shape[1] * size // (1 if kind == "strided" else 2)
    count = nbytes // each
    catalog = Catalog.of(TensorSpec(f"model.layers.{i}.mlp.weight", dtype, shape) for i in range(count))
    pieces = Pieces.of([Piece(i, box, 0, i * each, strides) for i in range(count)], 2)
    return Layout(catalog, ("memory",), np.array([nbytes]), pieces)


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def against_memcpy(source: np.ndarray, to: np.ndarray, rounds: int) -> dict[str, dict[str, float]]:
    address = np.array([source.ctypes.data])
    cases = [(k, d) for k in ("column", "row", "strided") for d in ("BF16", "F8_E4M3", "F32")] + [
        ("transposed", "F8_E4M3"),
        ("transposed", "BF16"),
    ]
    layouts = {f"{kind} {dtype}": held(kind, dtype, len(source)) for kind, dtype in cases}
    rates: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for threads in (1, 2):
            for name, layout in layouts.items():
                row = rates.setdefault(f"{name}, {threads} thread{'s'[: threads - 1]}", {"memcpy": [], "digest": []})
                row["memcpy"].append(len(source) / timed(partial(copy, to, source, threads)) / 1e9)
                seconds = timed(partial(digest_layout, HOST, layout, address, threads=threads))
                row["digest"].append(layout.nbytes / seconds / 1e9)
    found = {}
    for name, row in sorted(rates.items()):
        middle = {what: statistics.median(values) for what, values in row.items()}
        found[name] = {f"{w}_gb_per_s": round(v, 2) for w, v in middle.items()} | {
            "share": round(middle["digest"] / middle["memcpy"], 2)
        }
        print(f"{name:30} memcpy {middle['memcpy']:5.1f} GB/s  digest {middle['digest']:5.1f} GB/s  {found[name]['share']:5.2f}x")
    return found


def small_pieces(source: np.ndarray, rounds: int, count: int = 100_000) -> dict[str, float]:
    """Microseconds a piece for norms and scales of 256 bytes, one thread."""
    catalog = Catalog.of(TensorSpec(f"scale.{i}", "F32", (64,)) for i in range(count))
    zero = np.zeros((count, 1), np.int64)
    columns = (np.arange(count), zero, zero + 64, source.ctypes.data + np.arange(count) * 320, zero + 4)
    first = timed(lambda: digest_boxes(catalog, *columns, threads=1))  # hashes the names, once for a catalog
    later = statistics.median(timed(lambda: digest_boxes(catalog, *columns, threads=1)) for _ in range(rounds))
    found = {"pieces": count, "first_us_per_piece": round(first / count * 1e6, 3), "us_per_piece": round(later / count * 1e6, 3)}
    print(f"{count} pieces of 256 bytes: first {first:.3f} s, then {later:.3f} s")
    return found


def comparison(rounds: int, tensors: int = 25_000) -> dict[str, float]:
    """TP2 seeds, TP4 targets: 50,000 claims, 100,000 measured boxes, half of them cut along each dimension."""
    catalog = Catalog.of(TensorSpec(f"model.{i}.weight", "BF16", (512, 1024)) for i in range(tensors))
    quarter = np.random.default_rng(0).integers(0, PRIME // 2, (tensors, 4), np.uint64)

    def boxes(tp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tensor, rank = np.repeat(np.arange(tensors), tp), np.tile(np.arange(tp), tensors)
        start, stop, row = np.zeros((len(tensor), 2), np.int64), catalog.shape[tensor], np.arange(len(tensor))
        size = stop[row, tensor % 2] // tp
        start[row, tensor % 2], stop[row, tensor % 2] = rank * size, (rank + 1) * size
        return tensor, rank, start, stop

    tensor, rank, start, stop = boxes(2)
    halves = (quarter.reshape(tensors, 2, 2).sum(axis=2) % np.uint64(PRIME)).reshape(-1)
    claims = Claims(catalog, tensor, start, stop, halves, rank, ("seed/rank 0", "seed/rank 1"))
    tensor, rank, start, stop = boxes(4)
    sources = tuple(SourceId("seed", r, "1") for r in (0, 1))
    measured = Measured(catalog, rank, tensor, start, stop, quarter.reshape(-1), rank // 2, sources)
    assert compare(claims, measured).nbytes(State.UNPROVEN) == 0
    judge = statistics.median(timed(lambda: compare(claims, measured)) for _ in range(rounds))
    encode = statistics.median(timed(measured.encode) for _ in range(rounds))
    data = measured.encode()
    decode = statistics.median(timed(lambda: Measured.decode(data, catalog)) for _ in range(rounds))
    print(
        f"comparison of {len(measured)} measured boxes {judge:.3f} s; exchange {len(data)} bytes, packed {encode:.3f} s, "
        f"unpacked {decode:.3f} s"
    )
    return {
        "measured": len(measured),
        "compare_s": round(judge, 4),
        "encode_s": round(encode, 4),
        "decode_s": round(decode, 4),
        "nbytes": len(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    nbytes = int(options.gib * (1 << 30))
    source = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    to = np.zeros_like(source)
    to[::4096] = 1  # touch it
    result = {"cpus": len(os.sched_getaffinity(0)), "nbytes": nbytes, "rates": against_memcpy(source, to, options.rounds)}
    result |= {"small": small_pieces(source, options.rounds), "comparison": comparison(options.rounds)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
