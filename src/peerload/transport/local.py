"""The embedded transport between processes of one host: no daemon, no package, no network.

Memory backed by a sealed memfd (`peerload.memory.arena.Arena`) is mapped by its readers; any other memory is read with
process_vm_readv (CMA). Both in chunks on several threads, so that page faults of the destination, which cap what a fresh
process can receive, are taken in parallel. Mapped pages are dropped after each chunk: reading a model doesn't show up in
the reader's resident set.

A memfd that its owner has frozen needn't be copied at all: `attach` maps whole pages of it, copy-on-write, in place of ours.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ..deadline import Deadline
from ..errors import HostError, PlanError
from ..memory.region import Mappable, Region
from ..model.boxes import IntArray
from ..native._lib import lib
from ..native.columns import Columns
from ..planning.batch import Batch
from .base import Limits
from .descriptions import decode, encode
from .descriptors import Handover
from .local_peer import CMA, MAPPED, Attached, LocalDescription, sealed
from .process import boot_id, cores, pid_namespace, ptrace_scope, start_time
from .regions import RegionTable
from .threads import Crew, chunked

#: Shorter runs are copied: a mapping costs about as much as moving 64 KiB, and there are only so many.
ATTACH_NBYTES: Final = 256 << 10


class LocalTransport:
    """threads: how many move bytes (0: one for each core this process may use)."""

    name = "local"
    #: A row costs about 0.3 us, in which 4 KiB move; nothing is lost by large batches but grain when a source dies.
    limits = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=256 << 20, same_host=True)

    def __init__(self, threads: int = 0) -> None:
        self._crew = Crew(threads or cores(), self.name)
        self._lock = threading.Lock()
        self._registered: dict[tuple[int, int], _Registered] = {}
        self._memfds = 0  # how many were ever registered
        self._table = RegionTable([], [])
        self._handover: Handover | None = None
        self._peers: dict[str, Attached] = {}
        self._connected = 0
        self._closed = False

    def register(self, regions: Sequence[Region]) -> None:
        """Adds to what is registered already, forgetting regions whose memfd its owner has closed. Seals the size of memfds:
        from now on they can't shrink. A region without a memfd takes it from those inside: it no longer shows their bytes."""
        for region in regions:
            if region.device != "cpu":
                raise HostError(f"transport local moves CPU memory only, not {region.device}")
            if region.address < 1 or region.nbytes < 1:
                raise HostError(f"a region of {region.nbytes} bytes at {region.address:#x} can't be registered")
        with self._lock:
            self._check_open()
            rows = {key: row for key, row in self._registered.items() if row.file is None or row.file == _File.of(row.region.fd)}
            numbers = {row.file: row.number for row in rows.values() if row.file is not None}
            for region in regions:
                file = _shared_file(region)
                if file is None:
                    _unshare(rows, region)
                if file is not None and file not in numbers:
                    numbers[file] = self._memfds
                    self._memfds += 1
                rows[region.address, region.nbytes] = _Registered(region, file, -1 if file is None else numbers[file])
            self._registered = rows
            self._table = RegionTable([r.region.address for r in rows.values()], [r.region.nbytes for r in rows.values()])
            if any(r.file is None for r in rows.values()):
                _permit_readers()

    def describe(self) -> bytes:
        with self._lock:
            self._check_open()
            if self._handover is None:
                self._handover = Handover(self._descriptors)
            rows = list(self._registered.values())
            return encode(
                LocalDescription(
                    host=boot_id(),
                    pid_namespace=pid_namespace(),
                    pid=os.getpid(),
                    start_time=start_time(os.getpid()),
                    socket=self._handover.address,
                    token=self._handover.token,
                    address=[r.region.address for r in rows],
                    nbytes=[r.region.nbytes for r in rows],
                    file=[r.number for r in rows],
                    offset=[r.region.fd_offset for r in rows],
                )
            )

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        peer = Attached(decode(LocalDescription, description, source), source, deadline)
        with self._lock:
            if not self._closed:
                self._connected += 1
                handle = f"{source}#{self._connected}"
                self._peers[handle] = peer
                return handle
        peer.close()
        raise HostError("the transport is closed")

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Before anything moves, raises PlanError for destinations outside our regions and SourceLost for sources outside those
        of the peer."""
        with self._crew.job():
            with self._lock:
                there, here = self._peers.get(peer), self._table
            if there is None:
                raise PlanError(f"there is no peer {peer!r}")
            here.locate(batch)
            row = there.table.locate_sources(batch, there.source)
            with there:
                there.check()
                self._move(there, batch, row, deadline)
                there.check()

    def attach(self, peer: str, batch: Batch, arena: Mappable) -> Batch:
        """Map what can be of `batch`, whose destinations lie in `arena`, copy-on-write out of the peer's frozen memory, and
        return the rest for `read`. Our own readers get the arena by CMA from then on. Raises as `read` does.

        Mapped are whole pages of long runs at equal offsets in their pages on both sides."""
        with self._crew.job():
            with self._lock:
                there, here = self._peers.get(peer), self._table
            if there is None:
                raise PlanError(f"there is no peer {peer!r}")
            here.locate(batch)
            row = there.table.locate_sources(batch, there.source)
            if not there.readable:  # then our own readers couldn't do without our memfd
                return batch
            with there:
                there.check()
                left = self._attach(there, batch, row, arena)
                there.check()
            return left

    def _attach(self, there: Attached, batch: Batch, region: IntArray, arena: Mappable) -> Batch:
        page = mmap.PAGESIZE
        is_long = batch.run >= ATTACH_NBYTES
        long, short = np.flatnonzero(is_long), np.flatnonzero(~is_long)
        src, dst, run = batch.take(long).runs()
        fd, offset = there.frozen(src, np.repeat(region[long], batch.count[long].prod(axis=1)))
        begin, end = -(-dst // page) * page, (dst + run) // page * page
        fit = np.flatnonzero((fd >= 0) & ((offset - dst) % page == 0) & (end - begin >= ATTACH_NBYTES))
        if len(fit) == 0:
            return batch
        with self._lock:
            rows = dict(self._registered)
            _unshare(rows, arena.unshare())
            self._registered = rows
            _permit_readers()
        done = np.zeros(len(run), np.bool_)
        for i in fit[np.argsort(-run[fit], kind="stable")].tolist():
            done[i] = arena.attach(int(begin[i]), int(end[i] - begin[i]), int(fd[i]), int(offset[i] + begin[i] - dst[i]))
            if not done[i]:
                break
        head = Batch.of_runs(src[done], dst[done], (begin - dst)[done])
        tail = Batch.of_runs((src + end - dst)[done], end[done], (dst + run - end)[done])
        edges = Batch.joined(head, tail)
        undone = np.flatnonzero(~done)
        whole = Batch.of_runs(src[undone], dst[undone], run[undone])
        return Batch.joined(batch.take(short), whole, edges.take(np.flatnonzero(edges.run)))

    def _move(self, there: Attached, batch: Batch, region: IntArray, deadline: Deadline) -> None:
        src, way = there.ways(batch, region)
        rows, ways, edges = chunked(replace(batch, src=src), way)
        columns = Columns(rows)

        def work(begin: int, end: int) -> None:
            how, error = int(ways[begin]), 0
            if how == MAPPED:
                columns.copy_mapped(begin, end)
            elif how == CMA:
                error, _ = columns.read_process(there.pid, begin, end)
            else:
                error, _ = columns.read_file(how, begin, end)
            if error:
                raise there.lost(f"its memory can't be read any more ({os.strerror(error)})")

        self._crew.run(edges, work, deadline, f"reading {batch.nbytes} bytes from {there.source}")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            handover, self._handover = self._handover, None
        if handover is not None:
            handover.close()
        self._crew.close()
        with self._lock:
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise HostError("the transport is closed")

    def _descriptors(self) -> dict[int, int]:
        """Read-only descriptors of our own of all memfds by their number, without those closed by now. Raises OSError."""
        with self._lock:
            files = {row.number: row.file for row in self._registered.values() if row.file is not None}
        opened: dict[int, int] = {}
        try:
            for number, file in files.items():
                if _File.of(file.fd) == file:
                    opened[number] = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            for fd in opened.values():
                os.close(fd)
            raise
        return opened


@dataclass(frozen=True, slots=True)
class _File:
    """A descriptor and what it stood for, so that one that was closed and used again isn't mistaken for it."""

    fd: int
    device: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> _File | None:
        try:
            stat = os.fstat(fd)
        except OSError:
            return None
        return cls(fd, stat.st_dev, stat.st_ino)


@dataclass(frozen=True, slots=True)
class _Registered:
    """A region, the memfd that readers may map (None: they use CMA), and its number for ever (-1)."""

    region: Region
    file: _File | None
    number: int


def _unshare(rows: dict[tuple[int, int], _Registered], region: Region) -> None:
    """Take the memfd from all rows inside `region`."""
    for key, row in rows.items():
        if row.file is not None and region.address <= key[0] and sum(key) <= region.address + region.nbytes:
            rows[key] = _Registered(replace(row.region, fd=-1, fd_offset=0), None, -1)


def _permit_readers() -> None:
    """Let processes of the same user read this one with CMA, where that needs to be said."""
    if ptrace_scope() == 1:
        lib.peerload_permit_readers()


def _shared_file(region: Region) -> _File | None:
    """The region's memfd if readers can trust its size, having sealed it."""
    if region.fd < 0:
        return None
    try:
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        if not sealed(region.fd):  # not a memfd, or one whose seals were fixed without this one
            return None
    return _File.of(region.fd)
