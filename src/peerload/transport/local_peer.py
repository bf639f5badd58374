"""A peer of this host as its reader sees it: how it described itself, what of its memory is mapped here, whether it lives."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np

from ..deadline import Deadline
from ..errors import SourceLost, SourceUnreachable
from ..model.boxes import IntArray, byte_extents
from ..native._lib import lib
from ..native.columns import Columns
from ..planning.batch import Batch
from .alive import Liveness
from .descriptions import Process, check_ranges, check_rows, column, whole
from .process import ptrace_scope
from .regions import RegionTable

#: Mappings begin where huge pages could, if the peer's memory has them.
ALIGN_NBYTES: Final = 2 << 20
DENSE_NBYTES: Final = 1 << 16
#: More address space than a process has.
SPACE_NBYTES: Final = 1 << 47
#: Ways to read a row that aren't a descriptor.
CMA: Final = -1
MAPPED: Final = -2


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDescription(Process):
    """What `LocalTransport.describe` says. address, nbytes, file, offset are columns of regions: `file` is the number of
    the memfd that holds the region from byte `offset`, or -1 for memory that only CMA reaches."""

    address: Annotated[Sequence[int], column(whole(1))]
    nbytes: Annotated[Sequence[int], column(whole(1))]
    file: Annotated[Sequence[int], column(whole(-1))]
    offset: Annotated[Sequence[int], column(whole())]

    def __post_init__(self) -> None:
        check_rows(address=self.address, nbytes=self.nbytes, file=self.file, offset=self.offset)
        check_ranges("address", self.address, self.nbytes)
        check_ranges("offset", self.offset, self.nbytes)


class Attached:
    """Connected and mapped on construction, by `deadline`; raises SourceUnreachable with the reason. Use as a context around each
    read: mappings go when the peer is lost or closed and the last read has left."""

    def __init__(self, told: LocalDescription, source: str, deadline: Deadline) -> None:
        self.source: Final = source
        self.table: Final = RegionTable(told.address, told.nbytes)
        # By region: its address in our mapping and its offset in its file, less its own address; the file, or CMA.
        self._to_window = np.zeros(len(told.address), np.int64)
        self._to_file = np.zeros(len(told.address), np.int64)
        self._file = np.full(len(told.address), CMA, np.int64)
        self._cma = False
        self._lock = threading.Lock()
        self._readers = 0
        self._over = ""  # why nothing can be read any more
        self._window = (0, 0)
        self._live = Liveness(told, source, deadline, frozenset(told.file))
        self._open = list(self._live.files.values())
        self.pid: Final = self._live.pid  # 0 if it has none here
        try:
            self._map(told, self._live.files)
            self._probe(told)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Attached:
        with self._lock:
            if self._over:
                raise SourceLost(self.source, self._over)
            self._readers += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            self._release()

    def ways(self, batch: Batch, region: IntArray) -> tuple[IntArray, IntArray]:
        """How to read each row, which lies in `region` [n]: MAPPED with src an address of ours, CMA with src an address of
        the peer, or otherwise from that descriptor with src an offset in it. Rows that use little of what they span aren't
        read through the mapping: 100,000 scattered pages take 7.9 GB/s with CMA, 5.9 with pread, and 2.6 through it."""
        file = self._file[region]
        thin = np.full_like(file, CMA) if self._cma else file
        low, high = byte_extents(batch.src, batch.count, batch.src_step, batch.run)
        bytes_used = batch.run * batch.count.prod(axis=1)
        dense = (bytes_used >= DENSE_NBYTES) & (bytes_used * 4 >= high - low)
        way = np.where((file != CMA) & dense, MAPPED, thin)
        shift = np.where(way == MAPPED, self._to_window[region], np.where(way == CMA, 0, self._to_file[region]))
        return batch.src + shift, way

    def frozen(self, src: IntArray, region: IntArray) -> tuple[IntArray, IntArray]:
        """Of each address, which lies in `region` [n]: the descriptor of the memfd that holds its byte and that nobody can
        change any more, or -1; and the byte's offset in it."""
        file = self._file[region]
        for fd in np.unique(file[file >= 0]).tolist():
            if not sealed(fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE):
                file[file == fd] = -1
        return file, src + self._to_file[region]

    @property
    def readable(self) -> bool:
        """Whether CMA works between the two of us."""
        return self._cma

    def check(self) -> None:
        """Raise SourceLost unless the peer still vouches for its memory."""
        try:
            self._live.check()
        except SourceLost as error:
            raise self.lost(error.problem) from error

    def lost(self, problem: str) -> SourceLost:
        """Marks the peer as lost; returns the error to raise."""
        with self._lock:
            self._over = self._over or problem
        return SourceLost(self.source, problem, next_step="plan the rest from other sources")

    def close(self) -> None:
        with self._lock:
            self._over = self._over or "it was disconnected"
            self._release()

    def _release(self) -> None:
        if self._over and self._readers == 0:
            self._live.close()
            for fd in self._open:
                os.close(fd)
            self._open = []
            (address, nbytes), self._window = self._window, (0, 0)
            if nbytes:
                lib.peerload_unmap(address, nbytes)

    def _map(self, told: LocalDescription, files: Mapping[int, int]) -> None:
        """Map every memfd we were given, once, into one reservation, so that nothing else ever lies between."""
        file, address, begin = (np.array(column, np.int64) for column in (told.file, told.address, told.offset))
        end = begin + np.array(told.nbytes, np.int64)
        spans: list[tuple[int, int, int]] = []  # number, first byte, one past the last
        for number, fd in files.items():
            mine = file == number
            if mine.any() and sealed(fd) and int(end[mine].max()) <= os.fstat(fd).st_size:
                spans.append((number, int(begin[mine].min()) & -ALIGN_NBYTES, -(-int(end[mine].max()) & -ALIGN_NBYTES)))
        total = sum(b - a for _, a, b in spans)
        if total == 0:
            return
        base = lib.peerload_reserve(total + ALIGN_NBYTES) if total < SPACE_NBYTES else 0
        if base == 0:
            raise SourceUnreachable(self.source, f"there is no address space for its {total} bytes", next_step="raise ulimit -v")
        self._window = (base, total + ALIGN_NBYTES)
        at = -(-base & -ALIGN_NBYTES)
        for number, a, b in spans:
            problem = lib.peerload_map(at, b - a, files[number], a, 0)
            if problem:
                raise SourceUnreachable(self.source, f"its memory can't be mapped: {os.strerror(problem)}")
            mine = file == number
            self._to_file[mine] = (begin - address)[mine]
            self._to_window[mine] = at - a + self._to_file[mine]
            self._file[mine] = files[number]
            at += b - a

    def _probe(self, told: LocalDescription) -> None:
        """Read a byte with CMA. If the host forbids that and a region can't be had otherwise, say so before the load begins."""
        if len(self._file) == 0:
            return
        hidden = int(np.argmax(self._file == CMA))
        landing = ctypes.create_string_buffer(1)
        one = np.ones(1, np.int64)
        byte = Batch.of_runs(one * told.address[hidden], one * ctypes.addressof(landing), one)
        error, _ = Columns(byte).read_process(self.pid, 0, 1)
        self._cma = error in (0, errno.EFAULT)  # EFAULT: we may read, but this region is gone (a seed there has ended)
        if not self._cma and self._file[hidden] == CMA:
            problem, fix = why_not(error)
            raise SourceUnreachable(self.source, f"its memory can't be read with process_vm_readv: {problem}", next_step=fix)


def sealed(fd: int, seals: int = fcntl.F_SEAL_SHRINK) -> bool:
    """Whether a file is a memfd with all of these seals; by default one that can't shrink under its readers."""
    with suppress(OSError):
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
    return False


def why_not(error: int) -> tuple[str, str]:
    """What an errno of process_vm_readv means on this host, and what to do about it."""
    arena = "or keep the weights in a peerload.memory.arena.Arena, which needs no such right"
    if error == errno.ENOSYS:
        return "this kernel has no such call (CONFIG_CROSS_MEMORY_ATTACH)", f"use another kernel, {arena}"
    if error == errno.ESRCH:
        return "the process is not visible from here", f"share the process namespace (hostPID), {arena}"
    if error == errno.EPERM:
        scope = ptrace_scope()
        if scope >= 2:
            return f"Yama forbids it (kernel.yama.ptrace_scope={scope})", f"sysctl kernel.yama.ptrace_scope=1, {arena}"
        return (
            "permission denied: another user or group, a container without CAP_SYS_PTRACE, or a seccomp filter",
            f"run both as the same user, add CAP_SYS_PTRACE, {arena}",
        )
    return os.strerror(error), arena.removeprefix("or ")
