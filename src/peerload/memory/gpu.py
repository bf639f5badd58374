"""The memory of one GPU: what `space.Space` asks for, carried out by the kernels of `peerload.memory.cuda`."""

from __future__ import annotations

import math
import threading
from typing import Final

import numpy as np

from ..integrity.digest import DigestArray, cut_boxes, fold, tensor_keys
from ..model.boxes import IntArray
from ..model.catalog import Catalog
from ..model.layout import Constant
from ..model.offer import FENCE_NBYTES
from ..native.tables import LARGEST_NBYTES, DigestRows, largest_box
from ..planning.batch import LEVELS, Batch
from .cuda.driver import Device
from .cuda.mover import Mover, Pinned, gather, kinds, packed, portions
from .cuda.tables import Lane
from .region import Region

#: Pinned memory through which pageable memory goes to the GPU.
PINNED_NBYTES: Final = 32 << 20
#: A fence has this much to itself: handles share memory in blocks of this size, and nothing else in the block is exported.
FENCE_ROOM_NBYTES: Final = 2 << 20
#: Long constants are written from a pattern of about this many bytes.
PATTERN_NBYTES: Final = 4096


class CudaSpace:
    """GPU `device` ("cuda:N"). Keeps its primary context for as long as it lives; scratch memory stays below 90 MiB. Every call
    waits first for what this process has asked of the GPU, on whatever stream. Raises HostError for a GPU it can't use."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._device = Device(device)
        self._mover = Mover(self._device)
        self._lock = threading.Lock()
        self._pinned: Pinned | None = None

    def fill(self, constant: Constant, address: IntArray) -> None:
        if 0 in constant.shape:
            return
        self._device.synchronize()
        at = int(address[constant.buffer]) + constant.offset
        pattern, shape, strides = _repeated(constant)
        with self._mover.lane() as lane:
            scratch = self._device.allocate(len(pattern))
            try:
                lane.stream.upload(scratch, np.frombuffer(pattern, np.uint8))
                self._mover.copy(lane, _from_one(scratch, at, len(pattern), shape, strides))
            finally:
                lane.stream.wait()
                self._device.free(scratch)

    def copy(self, batch: Batch) -> None:
        self._device.synchronize()
        near, pageable = kinds(self._device, batch)
        with self._mover.lane() as lane:
            self._mover.copy(lane, batch.take(near))
            if len(pageable):
                self._upload(lane, batch.take(pageable))

    def _upload(self, lane: Lane, batch: Batch) -> None:
        with self._lock:
            if self._pinned is None:
                self._pinned = Pinned(self._device, PINNED_NBYTES)
            for part in portions(batch, self._pinned.nbytes):
                arriving, leaving, _ = packed(part, self._pinned.address)
                gather(arriving)
                self._mover.copy(lane, leaving)

    def digest(
        self,
        catalog: Catalog,
        tensor: IntArray,
        start: IntArray,
        stop: IntArray,
        address: IntArray,
        stride: IntArray,
        threads: int,  # noqa: ARG002 - the GPU has its own
    ) -> DigestArray:
        n = len(tensor)
        if not start.shape == stop.shape == stride.shape == (n, catalog.width) or len(address) != n:
            raise ValueError(f"columns do not fit {n} boxes of {catalog.width} dimensions")
        if n == 0:
            return np.zeros(0, np.uint64)
        columns = (np.arange(n), tensor, start, stop, address, stride)
        if largest_box(catalog.shape, catalog.itemsize, tensor, start, stop) > LARGEST_NBYTES:
            columns = cut_boxes(columns, catalog.itemsize[tensor], LARGEST_NBYTES)
        boxes = DigestRows(tensor_keys(catalog), catalog.shape, catalog.itemsize, *columns)
        self._device.synchronize()
        with self._mover.lane() as lane:
            sums = self._mover.digest(lane, boxes, n).view(np.uint64)
        return fold(sums[:, 0], sums[:, 1])

    def fence(self) -> CudaFence:
        return CudaFence(self._device)


class CudaFence:
    """A `space.Fence` on a GPU, in an allocation of its own."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = device.allocate(FENCE_ROOM_NBYTES)
        self._open = True
        self.write(bytes(FENCE_NBYTES))

    def region(self) -> Region:
        return Region(self.address, FENCE_NBYTES, self._device.name)

    def write(self, data: bytes) -> None:
        if len(data) != FENCE_NBYTES:
            raise ValueError(f"a fence takes {FENCE_NBYTES} bytes, not {len(data)}")
        self._device.write(self.address, data)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._device.free(self.address)


def _repeated(constant: Constant) -> tuple[bytes, list[int], list[int]]:
    """The same bytes with a longer pattern: (pattern, shape, strides), dimensions of one index left out."""
    pattern, dims = constant.fill, [(n, s) for n, s in zip(constant.shape, constant.strides, strict=True) if n != 1]
    while dims and dims[-1][1] == len(pattern) < PATTERN_NBYTES:
        count, _ = dims.pop()
        times = count if count * len(pattern) <= PATTERN_NBYTES else math.gcd(count, PATTERN_NBYTES // len(pattern))
        pattern *= times
        if times < count:
            dims.append((count // times, len(pattern)))
            break
    return pattern, [n for n, _ in dims], [s for _, s in dims]


def _from_one(src: int, dst: int, nbytes: int, shape: list[int], strides: list[int]) -> Batch:
    """`nbytes` from `src`, over and over, to every index of an array at `dst`."""
    outer, inner = len(shape) - min(len(shape), LEVELS), min(len(shape), LEVELS)
    where = np.array([dst], np.int64)
    for count, stride in zip(shape[:outer], strides[:outer], strict=True):
        where = (where[:, None] + np.arange(count) * stride).reshape(-1)
    n = len(where)
    counts, steps = np.ones((n, LEVELS), np.int64), np.zeros((n, LEVELS), np.int64)
    if inner:
        counts[:, LEVELS - inner :], steps[:, LEVELS - inner :] = shape[outer:], strides[outer:]
    return Batch(np.full(n, src), where, np.full(n, nbytes), counts, np.zeros_like(steps), steps)
