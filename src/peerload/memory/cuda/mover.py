"""Carrying out batches on a GPU: lanes that are used by turns, and pinned memory for what lies in pageable memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from ...deadline import Deadline
from ...model.boxes import IntArray
from ...native.columns import Columns
from ...native.tables import LARGEST_NBYTES, CopyRows, DigestRows
from ...planning.batch import Batch
from .driver import Device
from .kernels import Kernels
from .tables import Lane

#: A launch moves about so much: what may still be written once a deadline has passed.
GRAIN_NBYTES: Final = 4 << 30
#: Contiguous runs of at least this are left to the copy engines: once started 10 % faster between GPUs, and four times as fast
#: where the two ends aren't equally aligned (82 and 374 GB/s).
ENGINE_NBYTES: Final = 16 << 20
#: Addresses that share all bits above these lie in memory of one kind: allocations of devices are cut from blocks of 2 MiB.
KIND_BITS: Final = 21
#: The kernel's widest unit, bytes.
WIDEST: Final = 16


class Mover:
    """Kernels, streams and bounded scratch memory on `device`, which stays the caller's. Thread-safe."""

    def __init__(self, device: Device) -> None:
        self.device: Final = device
        self._lock = threading.Lock()
        compiler = ThreadPoolExecutor(1, "peerload-kernels")
        self._compiled = compiler.submit(Kernels, device)  # ready by the time there is something to copy
        compiler.shutdown(wait=False)
        self._idle: list[Lane] = []
        self._closed = False

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """One for the length of a block, at the end of which all its work has been done."""
        with self._lock:
            lane = self._idle.pop() if self._idle else None
        lane = lane or Lane(self.device)
        try:
            yield lane
        finally:
            lane.stream.wait()
            with self._lock:
                if not self._closed:
                    self._idle.append(lane)
                    lane = None
            if lane is not None:
                lane.close()

    def _kernels(self) -> Kernels:
        """Raises HostError when there can't be any."""
        return self._compiled.result()

    def copy(self, lane: Lane, batch: Batch, deadline: Deadline | None = None, doing: str = "") -> None:
        """All of `batch`, whose addresses kernels can touch. Returns when it is done. Raises DeadlineExceeded, once nothing is
        written any more."""
        total, largest = Columns(batch).total()
        if total == 0:
            if deadline is not None:
                deadline.check(doing)
            return
        if largest > LARGEST_NBYTES:
            batch, _ = batch.cut(LARGEST_NBYTES)
        edges = [0, len(batch)]
        if total > GRAIN_NBYTES:
            size = batch.sizes
            group = (np.cumsum(size) - size) // GRAIN_NBYTES
            edges[1:1] = (1 + np.flatnonzero(np.diff(group))).tolist()
        for begin, end in pairwise(edges):
            if deadline is not None:
                deadline.check(doing)
            part = batch.take(slice(begin, end))
            if begin:  # one group is under way at any time
                lane.stream.wait(deadline, doing)
            long = np.flatnonzero(part.run >= ENGINE_NBYTES)
            long = long[(part.count[long] == 1).all(axis=1)]
            for i in long.tolist():
                lane.stream.move(int(part.dst[i]), int(part.src[i]), int(part.run[i]))
            if len(long):
                part = part.take(np.setdiff1d(np.arange(len(part)), long))
            if len(part):
                strided = bool((part.count[0] > 1).any())  # judged by the first: a wrong guess costs speed only
                lane.run(CopyRows(part), partial(self._kernels().copy, lane.stream, strided=strided))
        lane.stream.wait(deadline, doing)

    def digest(self, lane: Lane, boxes: DigestRows, slots: int) -> IntArray:
        """[slots, 2] low and high halves of digests, summed."""
        found = np.zeros((slots, 2), np.int64)
        sums = lane.results.of(found.nbytes)
        lane.stream.clear(sums, found.nbytes)
        lane.run(boxes, partial(self._kernels().digest, lane.stream, sums))
        lane.stream.download(found.ctypes.data, sums, found.nbytes)
        lane.stream.wait()
        return found

    def close(self) -> None:
        """The caller vouches that no lane is in use. Safe to call twice."""
        with self._lock:
            self._closed = True
            lanes, self._idle = self._idle, []
        wait([self._compiled])
        for lane in lanes:
            lane.close()


class Pinned:
    """`nbytes` of page-locked host memory, which GPUs read at its host address. Owned by whoever made it; `close` frees it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self.nbytes: Final = nbytes
        self.address = device.pin(nbytes)

    def close(self) -> None:
        if self.address:
            self._device.unpin(self.address)
            self.address = 0


def kinds(device: Device, batch: Batch) -> tuple[IntArray, IntArray]:
    """Rows whose source a kernel can read, and the others, which lie in pageable memory."""
    blocks, which = np.unique(batch.src >> KIND_BITS, return_inverse=True)
    first = np.zeros(len(blocks), np.int64)
    first[which[::-1]] = np.arange(len(batch))[::-1]  # some row of each
    readable, end = np.zeros(len(blocks), np.bool_), 0
    for i, address in enumerate(batch.src[first].tolist()):
        if address >= end and device.can_read(address) and device.holds(address):
            end = device.block(address).end  # one question for each allocation
        readable[i] = address < end or device.can_read(address)
    readable = readable[which]
    return np.flatnonzero(readable), np.flatnonzero(~readable)


def packed(batch: Batch, at: int) -> tuple[Batch, Batch, int]:
    """`batch` in two halves that meet in dense memory from `at`, in order of rows: into it, and out of it. Also its bytes."""
    inner = np.cumprod(batch.count[:, :0:-1], axis=1)[:, ::-1]
    step = np.column_stack([inner, np.ones(len(batch), np.int64)]) * batch.run[:, None]
    size = batch.sizes
    # From multiples of 16, so that wide units stay possible.
    room = -(-size // WIDEST) * WIDEST
    place = at + np.cumsum(room) - room
    gather = Batch(batch.src, place, batch.run, batch.count, batch.src_step, step)
    scatter = Batch(place, batch.dst, batch.run, batch.count, step, batch.dst_step)
    return gather, scatter, int(room.sum())


def portions(batch: Batch, nbytes: int) -> Iterator[Batch]:
    """The same copies in parts that `packed` fits into `nbytes`."""
    batch, _ = batch.cut(nbytes)
    size = batch.sizes
    room = np.cumsum(-(-size // WIDEST) * WIDEST)
    begin = 0
    while begin < len(batch):
        before = int(room[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(room, before + nbytes, "right")))
        yield batch.take(slice(begin, end))
        begin = end


def gather(batch: Batch) -> None:
    """Copies within host memory."""
    Columns(batch).copy(0, len(batch))
