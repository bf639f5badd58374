"""What this host's memory can do at best: the limit that every rate is held against."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def memcpy_gb_per_s(threads: int = 0, nbytes: int = 1 << 30, repeats: int = 3) -> float:
    """10^9 bytes a second that `threads` threads (0: one for each core this process may use) copy between touched buffers
    of `nbytes` (more than any cache holds), best of `repeats`. Takes twice the memory."""
    threads = threads or len(os.sched_getaffinity(0))
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    edges = [nbytes * i // threads for i in range(threads + 1)]

    def copy(i: int) -> None:
        target[edges[i] : edges[i + 1]] = source[edges[i] : edges[i + 1]]  # memcpy, without the interpreter lock

    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begin_s = time.perf_counter()
            list(pool.map(copy, range(threads)))
            best_s = min(best_s, time.perf_counter() - begin_s)
    return nbytes / best_s / 1e9
