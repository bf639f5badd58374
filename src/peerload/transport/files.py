"""Files as memory: byte ranges of files on disk are read like a peer's buffers.

The files of a description lie one after the other in an address space of their own; file i begins at `base[i]`. Reads use
preadv, never a mapping: a file that shrinks under its reader is an error then, not a dead process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ..batch import Batch
from ..deadline import Deadline
from ..errors import HostError, PlanError, SourceError, SourceLost, SourceStale, SourceUnreachable
from ..geometry import IntArray
from ..native.columns import Columns
from .base import Limits, Region
from .crew import Crew, chunked
from .host import cores
from .table import RegionTable, destination_extents, source_extents

#: Files begin at multiples of this in their address space, so no copy can reach from one into the next.
GAP_NBYTES: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class FileSet:
    """Columns of files: absolute path, bytes, time of last change (ns), first address."""

    path: tuple[str, ...]
    nbytes: tuple[int, ...]
    mtime_ns: tuple[int, ...]
    base: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.path) == len(self.nbytes) == len(self.mtime_ns) == len(self.base):
            raise ValueError("columns differ in length")

    @classmethod
    def of(cls, paths: Sequence[Path]) -> FileSet:
        """The files as they are now. Raises OSError."""
        stats = [path.stat() for path in paths]
        base, at = [], GAP_NBYTES
        for stat in stats:
            base.append(at)
            at += -(-(stat.st_size + 1) // GAP_NBYTES) * GAP_NBYTES
        return cls(
            tuple(str(path.resolve()) for path in paths),
            tuple(stat.st_size for stat in stats), tuple(stat.st_mtime_ns for stat in stats), tuple(base),
        )  # fmt: skip

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> FileSet:
        """Raises ValueError, KeyError or TypeError for what is no description."""
        told = json.loads(data)
        return cls(*(tuple(told[f.name]) for f in dataclasses.fields(cls)))


class FilesTransport:
    """files: what this process offers to others (that see the same file system), nothing by default.
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
        self._peers: dict[str, _Opened] = {}
        self._connected = 0

    def register(self, regions: Sequence[Region]) -> None:
        if any(region.device != "cpu" for region in regions):
            raise HostError("transport files reads into CPU memory only")
        with self._lock:
            self._regions.update({(r.address, r.nbytes): r for r in regions})
            self._here = RegionTable([a for a, _ in self._regions], [n for _, n in self._regions])

    def describe(self) -> bytes:
        return self._files.encode()

    def connect(self, description: bytes, source: str) -> str:
        opened = _Opened(description, source)
        with self._lock:
            self._connected += 1
            handle = f"{source}#{self._connected}"
            self._peers[handle] = opened
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Raises PlanError, before anything moves, for bytes outside the files or our regions; SourceStale or SourceLost,
        naming the file, when it isn't what it was described as."""
        with self._crew.job():
            with self._lock:
                there, here = self._peers.get(peer), self._here
            if there is None:
                raise PlanError(f"there is no peer {peer!r}")
            here.locate(*destination_extents(batch), "dst", "this process")
            file = there.table.locate(*source_extents(batch), "src", f"source {there.source}")
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


class _Opened:
    """Described files, open. Raises SourceUnreachable for files that are not there or not those described."""

    def __init__(self, description: bytes, source: str) -> None:
        self.source: Final = source
        self.fd: list[int] = []
        try:
            self._files = FileSet.decode(description)
            self.table: Final = RegionTable(self._files.base, self._files.nbytes)
            self.base: Final[IntArray] = np.array(self._files.base, np.int64)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise SourceUnreachable(source, f"gave a description that makes no sense: {error}") from error
        try:
            for path in self._files.path:
                self.fd.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self.check(np.arange(len(self.fd)))
        except (OSError, SourceError) as error:
            self.close()
            problem = error.problem if isinstance(error, SourceError) else f"{error.filename}: {error.strerror}"
            raise SourceUnreachable(source, problem) from error

    def check(self, files: IntArray) -> None:
        """Raise SourceStale or SourceLost if one of the files has changed since it was described."""
        for i in files.tolist():
            stat = os.fstat(self.fd[i])
            if stat.st_size < self._files.nbytes[i]:
                raise SourceLost(self.source, f"{self._files.path[i]} has {stat.st_size} of {self._files.nbytes[i]} bytes left")
            if (stat.st_size, stat.st_mtime_ns) != (self._files.nbytes[i], self._files.mtime_ns[i]):
                raise SourceStale(self.source, f"{self._files.path[i]} has changed since it was described")

    def failed(self, file: int, error: int) -> SourceLost:
        return SourceLost(self.source, f"{self._files.path[file]} can't be read: {os.strerror(error)}")

    def close(self) -> None:
        for fd in self.fd:
            os.close(fd)
        self.fd = []
