"""Where a rank's buffers lie, and what can be done to them there: a host's memory or an accelerator's.

Everything above works with addresses; only a `Space` knows how to touch them.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from . import digest, memory
from .batch import Batch
from .digest import DigestArray
from .errors import HostError
from .geometry import IntArray
from .manifest import FENCE_NBYTES, Catalog, Constant, Layout
from .transport.base import Region


class Fence(Protocol):
    """A few bytes, zero at first, that peers read to know whether a seed still vouches for its weights."""

    address: int

    def region(self) -> Region:
        """For transports to register."""

    def write(self, data: bytes) -> None:
        """FENCE_NBYTES of it, visible to every later read of a peer when this returns."""

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""


class Space(Protocol):
    """The memory of one device. Thread-safe; owns none of the memory it is pointed at. When a call returns, it has happened."""

    device: str

    def fill(self, constant: Constant, address: IntArray) -> None:
        """Write a constant of a layout whose buffers begin at `address` [buffers]. The caller vouches for the addresses."""

    def copy(self, batch: Batch) -> None:
        """Carry out a batch within this process; sources may lie in host memory too. The caller vouches for both sides."""

    def digest(
        self,
        catalog: Catalog,
        tensor: IntArray,
        start: IntArray,
        stop: IntArray,
        address: IntArray,
        stride: IntArray,
        threads: int,
    ) -> DigestArray:
        """As `peerload.digest.digest_boxes` says, of memory here."""

    def fence(self) -> Fence:
        """New fence memory, owned by the caller."""


class Host:
    """The CPU's memory."""

    device = "cpu"

    def fill(self, constant: Constant, address: IntArray) -> None:
        memory.fill(constant, address)

    def copy(self, batch: Batch) -> None:
        memory.copy(batch)

    def digest(
        self,
        catalog: Catalog,
        tensor: IntArray,
        start: IntArray,
        stop: IntArray,
        address: IntArray,
        stride: IntArray,
        threads: int,
    ) -> DigestArray:
        return digest.digest_boxes(catalog, tensor, start, stop, address, stride, threads=threads)

    def fence(self) -> Fence:
        return _HostFence()


class _HostFence:
    def __init__(self) -> None:
        self._arena = memory.Arena(FENCE_NBYTES, "peerload-fence")
        self._arena.seal()
        self.address = self._arena.fence_address

    def region(self) -> Region:
        return self._arena.region()

    def write(self, data: bytes) -> None:
        self._arena.write(self.address, data)

    def close(self) -> None:
        self._arena.close()


HOST = Host()


@cache
def space_on(device: str) -> Space:
    """The memory of a device ("cpu", "cuda:N"). Raises HostError for one that nothing here can touch."""
    if device == HOST.device:
        return HOST
    if device.startswith("cuda:"):
        from .cuda_space import CudaSpace

        return CudaSpace(device)
    raise HostError(f"weights on {device}: only CPU and CUDA memory can be loaded or offered")


def digest_layout(
    space: Space, layout: Layout, address: IntArray, *, rows: IntArray | None = None, threads: int = 0
) -> DigestArray:
    """[pieces] digests of everything a rank holds in `space`, its buffers at `address` [buffers]; of these `rows` only, if
    they are given."""
    pieces = layout.pieces if rows is None else layout.pieces.take(rows)
    where = address[pieces.buffer] + pieces.offset
    return space.digest(layout.catalog, pieces.tensor, pieces.start, pieces.stop, where, pieces.stride, threads)
