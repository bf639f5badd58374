"""Files as memory: byte ranges of files on disk are read like a peer's buffers.

The files of a description lie one after the other in an address space of their own; file i begins at `base[i]`. Reads use
preadv, never a mapping: a file that shrinks under its reader is an error then, not a dead process.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np

from ..deadline import Deadline
from ..errors import DeadlineExceeded, HostError, PlanError, SourceError, SourceLost, SourceStale, SourceUnreachable
from ..memory.region import Region
from ..model.boxes import IntArray
from ..native.columns import Columns
from ..planning.batch import Batch
from .base import Limits
from .descriptions import TOP, check_ranges, check_rows, column, decode, encode, path, whole
from .process import cores
from .regions import RegionTable
from .threads import Crew, chunked

#: Files begin at multiples of this in their address space, so no copy can reach from one into the next.
GAP_NBYTES: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class FileSet:
    """Columns of files: absolute path, bytes, time of last change (ns), first address."""

    path: Annotated[tuple[str, ...], column(path)]
    nbytes: Annotated[tuple[int, ...], column(whole())]
    mtime_ns: Annotated[tuple[int, ...], column(whole(-TOP))]
    base: Annotated[tuple[int, ...], column(whole(1))]

    def __post_init__(self) -> None:
        check_rows(path=self.path, nbytes=self.nbytes, mtime_ns=self.mtime_ns, base=self.base)
        check_ranges("base", self.base, self.nbytes)

    @classmethod
    def of(cls, paths: Sequence[Path]) -> FileSet:
        """The files as they are now. Raises OSError."""
        found = [each.stat() for each in paths]
        base, at = [], GAP_NBYTES
        for file in found:
            base.append(at)
            at += -(-(file.st_size + 1) // GAP_NBYTES) * GAP_NBYTES
        return cls(
            tuple(str(each.resolve()) for each in paths),
            tuple(file.st_size for file in found),
            tuple(file.st_mtime_ns for file in found),
            tuple(base),
        )

    def encode(self) -> bytes:
        return encode(self)


class FilesTransport:
    """Reads the files that a description names, whoever wrote it: `Reader` connects it to this process's own reserve only.
    Nothing ends a read of a network file system that hangs.

    files: what this process offers to others (that see the same file system), nothing by default.
    threads: how many read (0: one for each core this process may use)."""

    name = "files"
    #: A read system call costs about 1 us, in which 8 KiB move out of the page cache.
    limits = Limits(strided=True, operation_nbytes=8192, max_batch_nbytes=256 << 20, same_host=True)

    def __init__(self, files: FileSet = FileSet((), (), (), ()), threads: int = 0) -> None:
        self._files = files
        self._crew = Crew(threads or cores(), self.name)
        self._lock = threading.Lock()
        self._regions: dict[tuple[int, int], Region] = {}
        self._here = RegionTable([], [])
        self._peers: dict[str, _OpenFiles] = {}
        self._connected = 0

    def register(self, regions: Sequence[Region]) -> None:
        if any(region.device != "cpu" for region in regions):
            raise HostError("transport files reads into CPU memory only")
        with self._lock:
            self._regions.update({(r.address, r.nbytes): r for r in regions})
            self._here = RegionTable([a for a, _ in self._regions], [n for _, n in self._regions])

    def describe(self) -> bytes:
        return self._files.encode()

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        opened = _OpenFiles(decode(FileSet, description, source), source, deadline)
        with self._lock:
            self._connected += 1
            handle = f"{source}#{self._connected}"
            self._peers[handle] = opened
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Raises, before anything moves, PlanError for destinations outside our regions and SourceLost for bytes outside the
        files; SourceStale or SourceLost,
        naming the file, when it isn't what it was described as."""
        with self._crew.job():
            with self._lock:
                there, here = self._peers.get(peer), self._here
            if there is None:
                raise PlanError(f"there is no peer {peer!r}")
            here.locate(batch)
            file = there.table.locate_sources(batch, there.source)
            rows, which, edges = chunked(replace(batch, src=batch.src - there.base[file]), file)
            columns = Columns(rows)

            def work(begin: int, end: int) -> None:
                error, _ = columns.read_file(there.fd[which[begin]], begin, end)
                if error:
                    raise there.failed(int(which[begin]), error)

            self._crew.run(edges, work, deadline, f"reading {batch.nbytes} bytes from {there.source}")
            there.check(np.unique(which))

    def close(self) -> None:
        self._crew.close()
        with self._lock:
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()


class _OpenFiles:
    """Described files, open. Raises SourceUnreachable for files that are not there or not those described."""

    def __init__(self, files: FileSet, source: str, deadline: Deadline) -> None:
        self.source: Final = source
        self.fd: list[int] = []
        self._files = files
        self.table: Final = RegionTable(files.base, files.nbytes)
        self.base: Final[IntArray] = np.array(files.base, np.int64)
        try:
            for name in files.path:
                deadline.check(f"opening {name}")
                self.fd.append(_regular(name))
            self.check(np.arange(len(self.fd)))
        except (OSError, SourceError, DeadlineExceeded) as error:
            self.close()
            if isinstance(error, OSError):
                problem = f"{error.filename}: {error.strerror}"
            else:
                problem = error.problem if isinstance(error, SourceError) else error.message
            raise SourceUnreachable(source, problem) from error

    def check(self, files: IntArray) -> None:
        """Raise SourceStale or SourceLost if one of the files has changed since it was described."""
        for i in files.tolist():
            now = os.fstat(self.fd[i])
            if now.st_size < self._files.nbytes[i]:
                raise SourceLost(self.source, f"{self._files.path[i]} has {now.st_size} of {self._files.nbytes[i]} bytes left")
            if (now.st_size, now.st_mtime_ns) != (self._files.nbytes[i], self._files.mtime_ns[i]):
                raise SourceStale(self.source, f"{self._files.path[i]} has changed since it was described")

    def failed(self, file: int, error: int) -> SourceLost:
        return SourceLost(self.source, f"{self._files.path[file]} can't be read: {os.strerror(error)}")

    def close(self) -> None:
        for fd in self.fd:
            os.close(fd)
        self.fd = []


def _regular(name: str) -> int:
    """A descriptor of a file that is no pipe or device, which could hang or act when it is opened. Raises OSError."""
    if not stat.S_ISREG(Path(name).stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", name)
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # it was replaced meanwhile
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", name)
    return fd
