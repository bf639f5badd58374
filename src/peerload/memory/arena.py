"""Memory of ours: arenas that peers can map, what to register of it, copies and fills within it.

torch is imported only by the functions that take or give tensors.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..errors import HostError
from ..model.boxes import IntArray
from ..model.layout import Constant
from ..native._lib import ffi, lib
from ..native.columns import Columns
from ..planning.batch import Batch
from .region import Region

if TYPE_CHECKING:
    import torch


#: Allocations of an arena begin after one page, which holds the fence.
HEADER_NBYTES: Final = mmap.PAGESIZE


#: Address space added to every arena for the gaps that alignment leaves.
SLACK_NBYTES: Final = 1 << 16


HUGE_NBYTES: Final = 2 << 20


COLLAPSE_NBYTES: Final = 64 << 20


#: Buffers of at least this many bytes begin at page boundaries, so that a peer's pages can be mapped in their place.
PAGED_NBYTES: Final = 1 << 16


#: Attachments of one arena: each may split a mapping in three, and the kernel allows a process 65,530 (vm.max_map_count).
MAX_ATTACHED: Final = 8192


class Arena:
    """At least `nbytes` of anonymous shared memory (a memfd), handed out front to back and never taken back.

    Pages cost memory only once touched, so an arena may be made too large. Peers on this host read it by mapping the
    descriptor of `region()`. It isn't safe to allocate from several threads at once.

    Ownership: the memory lives until `close()` *and* until the last tensor, array or memoryview over it is gone. Plain
    addresses don't keep it alive. After `close()` nothing can be allocated, and the descriptor is gone.
    Raises HostError when the kernel has no address space or descriptor left."""

    def __init__(self, nbytes: int, name: str = "peerload") -> None:
        if nbytes < 1:
            raise ValueError(f"an arena of {nbytes} bytes")
        self._capacity = _up(HEADER_NBYTES + nbytes + SLACK_NBYTES, mmap.PAGESIZE)
        self._used = HEADER_NBYTES
        self._closed = self._frozen = False
        self._shared = True  # the memfd holds what the memory does
        self._attached = 0
        self._lock = threading.Lock()
        try:
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self._fd, self._capacity)
                self._map = _mapping(self._fd, self._capacity)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise HostError(f"no shared memory of {nbytes} bytes: {error.strerror}") from error
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address: Final = int(self._bytes.ctypes.data)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def used_nbytes(self) -> int:
        """From the start to the end of the last allocation."""
        return self._used

    @property
    def fence_address(self) -> int:
        """16 bytes at the start, zero at first."""
        return self.address

    @classmethod
    def room(cls, sizes: Sequence[int]) -> int:
        """Bytes enough to `place` buffers of `sizes`; at least 1."""
        return sum(_up(n, 64) + (mmap.PAGESIZE if n >= PAGED_NBYTES else 0) for n in sizes) or 1

    def place(self, nbytes: int) -> int:
        """`allocate` for a buffer: aligned as torch's own CPU allocator does (`c10::gAlignment`), large ones to pages."""
        return self.allocate(nbytes, mmap.PAGESIZE if nbytes >= PAGED_NBYTES else 64)

    def allocate(self, nbytes: int, align: int = 64) -> int:
        """Address of `nbytes` of zeroed memory, aligned to `align` (a power of two up to the page size)."""
        if nbytes < 0 or align < 1 or align & (align - 1) or align > mmap.PAGESIZE:
            raise ValueError(f"{nbytes} bytes aligned to {align}")
        begin = _up(self._used, align)
        if self._frozen:
            raise HostError("the arena is frozen", next_step="allocate before it is offered")
        if self._closed or begin + nbytes > self._capacity:
            left = 0 if self._closed else self._capacity - begin
            raise HostError(f"the arena has {left} bytes left, {nbytes} are wanted", next_step="make the arena larger")
        self._used = begin + nbytes
        return self.address + begin

    def seal(self) -> None:
        """Fix the size for ever, which peers insist on: a mapping that shrinks under its reader would kill the reader."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def freeze(self) -> bool:
        """Make what the memfd holds immutable, on the kernel's word (F_SEAL_WRITE): readers may then map it for good. The
        memory stays writable, but writes are this process's own from now on (copy-on-write). Nobody may write meanwhile.

        False where that can't be had, nothing changed: the kernel refuses (a forked child still shares the memory, or a
        device has pinned it), or pages of others are attached. Also False when it has been frozen before: it may have been
        written to since, so the memfd no longer stands for it (`unshare`)."""
        with self._lock:
            if self._frozen:
                self._shared = False
            if self._closed or self._frozen or not self._shared:
                return False
            nbytes = self._bytes.nbytes
            if lib.peerload_map_private(self.address, nbytes, self._fd, 0):
                self._mend(0, nbytes)
                return False
            try:
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
            except OSError:
                self._restore(0, nbytes)
                return False
            self._frozen = True
            return True

    def unshare(self) -> Region:
        """From now on the memfd doesn't stand for the memory: `region()`, which is returned, comes without it."""
        with self._lock:
            self._shared = False
        return self.region()

    def attach(self, address: int, nbytes: int, fd: int, offset: int) -> bool:
        """Replace whole pages of ours by those of a file that nobody can change, from byte `offset`: no byte moves, and what is
        written here afterwards stays here. The file's memory lives as long as ours. False, pages untouched, where that
        can't be had: a frozen arena, too many attachments, no room for mappings. The caller vouches for the file.

        `unshare` first."""
        begin = self._offset(address, nbytes)
        if (begin | nbytes | offset) % mmap.PAGESIZE:
            raise ValueError(f"{nbytes} bytes at {address:#x} and from {offset} of the file are no whole pages")
        with self._lock:
            if self._shared or self._frozen or self._attached == MAX_ATTACHED:
                return False
            if lib.peerload_map_private(address, nbytes, fd, offset):
                self._mend(begin, nbytes)
                return False
            self._attached += 1
            return True

    def _mend(self, begin: int, nbytes: int) -> None:
        """After a mapping that failed: nothing to do where the kernel has kept the old one (it does when it's out of mappings,
        and then would refuse ours, too); older kernels may leave a hole."""
        if ctypes.CDLL(None).msync(ctypes.c_void_p(self.address + begin), ctypes.c_size_t(nbytes), 1):  # MS_ASYNC does no more
            self._restore(begin, nbytes)

    def _restore(self, begin: int, nbytes: int) -> None:
        """The memfd's pages again."""
        error = lib.peerload_map(self.address + begin, nbytes, self._fd, begin, 1)
        if error:
            raise HostError(f"{nbytes} bytes of an arena can't be mapped any more: {os.strerror(error)}")

    def collapse(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Move what is allocated into huge pages, so that readers map it at full speed (28 GB/s instead of 24), fault in what
        they attach 512 pages at a time, and spare page tables. Takes half a second for a GiB, during which the memory stays
        usable. False where the kernel can't (before 6.1, or no 2 MiB left in one piece), where pages of others are attached,
        and when `stop()`, asked every 64 MiB, says so."""
        nbytes = self._used // HUGE_NBYTES * HUGE_NBYTES
        if self._attached:
            return False
        for begin in range(0, nbytes, COLLAPSE_NBYTES):
            if stop() or lib.peerload_collapse(self.address + begin, min(COLLAPSE_NBYTES, nbytes - begin)):
                return False
        return True

    def region(self) -> Region:
        """All that is allocated so far, fence included, as one region; backed by our descriptor unless `unshare`d."""
        return Region(self.address, self._used, fd=self._fd if self._shared else -1)

    def contains(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self._used

    def view(self, address: int, nbytes: int) -> memoryview:
        """Writable bytes of an allocation; keeps the arena's memory alive."""
        begin = self._offset(address, nbytes)
        return self._bytes[begin : begin + nbytes].data

    def read(self, address: int, nbytes: int) -> bytes:
        return self.view(address, nbytes).tobytes()

    def write(self, address: int, data: bytes) -> None:
        self.view(address, len(data))[:] = data

    def tensor(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense CPU tensor over allocated memory; keeps the arena's memory alive."""
        import torch

        count = math.prod(shape)
        begin = self._offset(address, count * dtype.itemsize)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(tuple(shape))

    def close(self) -> None:
        """Let go of the memory (see above) and close the descriptor. Safe to call twice."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
            self._fd = -1
            del self._map, self._bytes

    def _offset(self, address: int, nbytes: int) -> int:
        if self._closed or not self.contains(address, nbytes):
            raise ValueError(f"{nbytes} bytes at {address:#x} are not allocated in this arena")
        return address - self.address


def copy(batch: Batch) -> None:
    """Carry out a batch whose sources are addresses of our own. The caller vouches for both sides."""
    Columns(batch).copy(0, len(batch))


def fill(constant: Constant, address: IntArray) -> None:
    """Write a constant of a layout whose buffers begin at `address` [buffers]. The caller vouches for the addresses."""
    shape, strides = np.array(constant.shape, np.int64), np.array(constant.strides, np.int64)
    lib.peerload_fill(
        int(address[constant.buffer]) + constant.offset,
        len(shape),
        ffi.from_buffer("int64_t[]", shape),
        ffi.from_buffer("int64_t[]", strides),
        constant.fill,
        len(constant.fill),
    )


def _mapping(fd: int, nbytes: int) -> memoryview:
    """A file mapped where huge pages can be, unmapped when the last user of the buffer is gone. Raises OSError."""
    room = nbytes + HUGE_NBYTES
    base = lib.peerload_reserve(room)
    if base == 0:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    address = _up(base, HUGE_NBYTES)
    error = lib.peerload_map(address, nbytes, fd, 0, 1)
    if error:
        lib.peerload_unmap(base, room)
        raise OSError(error, os.strerror(error))
    unmapped = ffi.gc(ffi.cast("char *", address), lambda _: lib.peerload_unmap(base, room), nbytes)
    return memoryview(ffi.buffer(unmapped, nbytes))


def _up(value: int, align: int) -> int:
    return -(-value // align) * align
