"""What this host's memory can do at best: the limits that every rate is held against."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def memcpy_gb_per_s(threads: int = 0, nbytes: int = 1 << 30, repeats: int = 3) -> float:
    """10^9 bytes a second that `threads` threads (0: one for each core this process may use) copy between touched buffers
    of `nbytes` (more than any cache holds), best of `repeats`. Takes twice the memory."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return max(_copy_gb_per_s(source, lambda: target, threads) for _ in range(repeats))


def fresh_gb_per_s(threads: int = 0, nbytes: int = 512 << 20, repeats: int = 3) -> float:
    """The same into shared memory that nobody has touched yet: what a new process can receive at best, since every page of it
    must first be found and zeroed."""
    source = np.ones(nbytes, np.uint8)
    return max(_copy_gb_per_s(source, lambda: np.frombuffer(mmap.mmap(-1, nbytes), np.uint8), threads) for _ in range(repeats))


def _copy_gb_per_s(source: Bytes, make_target: Callable[[], Bytes], threads: int) -> float:
    threads, target = threads or len(os.sched_getaffinity(0)), make_target()
    grain = 4 << 20
    parts = [slice(at, at + grain) for at in range(0, len(source), grain)]

    def copy(part: slice) -> None:
        target[part] = source[part]  # memcpy, without the interpreter lock

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(str, range(threads)))  # the threads are there before the clock starts
        begin_s = time.perf_counter()
        list(pool.map(copy, parts))
        return len(source) / (time.perf_counter() - begin_s) / 1e9
