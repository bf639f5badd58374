"""The threads of a transport, and how they share one batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition
from typing import Final

import numpy as np

from ..deadline import Deadline
from ..errors import HostError
from ..model.boxes import IntArray
from ..planning.batch import Batch

#: What one thread takes at a time: short enough to share a batch evenly and to notice deadlines (1 ms), long enough for
#: its system calls not to count. Measured, two threads: 4 MiB 22.9, 8 MiB 23.7, 16 MiB 24.0, 32 MiB 23.8 GB/s.
CHUNK_NBYTES: Final = 16 << 20


class Crew:
    """`threads` threads, started when first needed. Several reads may share them. Owned by one transport."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, f"peerload-{name}")
        self._idle = Condition()
        self._jobs = 0
        self._closed = False

    @contextmanager
    def job(self) -> Iterator[None]:
        """Keeps `close` waiting. Raises HostError when the transport is already closed."""
        with self._idle:
            if self._closed:
                raise HostError("the transport is closed")
            self._jobs += 1
        try:
            yield
        finally:
            with self._idle:
                self._jobs -= 1
                self._idle.notify_all()

    def run(self, edges: Sequence[int], work: Callable[[int, int], None], deadline: Deadline, doing: str) -> None:
        """work(begin, end) for all neighbours in `edges`, on several threads when there are several. Returns when none is
        at work any more. Raises what the first failing call raised, or DeadlineExceeded naming `doing`."""
        chunks = list(itertools.pairwise(edges))
        turn = itertools.count()
        failed = False

        def drain() -> None:
            nonlocal failed
            while not failed and (mine := next(turn)) < len(chunks):
                try:
                    deadline.check(doing)
                    work(*chunks[mine])
                except BaseException:
                    failed = True
                    raise

        hands = min(self._threads, len(chunks))
        if hands <= 1:
            drain()
        else:
            futures = [self._pool.submit(drain) for _ in range(hands)]
            wait(futures)
            for future in futures:
                future.result()

    def close(self) -> None:
        """Wait for all jobs and end the threads. Safe to call twice."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._jobs == 0)
        self._pool.shutdown()


def chunked(batch: Batch, key: IntArray) -> tuple[Batch, IntArray, list[int]]:
    """The same bytes as rows of at most about CHUNK_NBYTES, the key of each, and the edges of chunks of rows of about that
    size. Rows of one chunk have the same `key` [n], which says how a row is read."""
    rows, parent = batch.cut(CHUNK_NBYTES)
    keys = key[parent]
    if len(rows) == 0:
        return rows, keys, [0]
    size = rows.run * rows.count.prod(axis=1)
    group = (np.cumsum(size) - size) // CHUNK_NBYTES
    edges = 1 + np.flatnonzero((np.diff(group) != 0) | (keys[1:] != keys[:-1]))
    return rows, keys, [0, *edges.tolist(), len(rows)]
