"""A batch's arrays as the C helper takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ._lib import ffi, lib

if TYPE_CHECKING:
    from ._lib import Pointer

IntArray = npt.NDArray[np.int64]


class CopyColumns(Protocol):
    """What `peerload.planning.batch.Batch` is, said again because this package imports nothing of its own."""

    @property
    def src(self) -> IntArray: ...
    @property
    def dst(self) -> IntArray: ...
    @property
    def run(self) -> IntArray: ...
    @property
    def count(self) -> IntArray: ...
    @property
    def src_step(self) -> IntArray: ...
    @property
    def dst_step(self) -> IntArray: ...


class Columns:
    """The six columns of a batch, kept alive while C may look at them.

    The methods move rows begin..end without the interpreter lock. None checks an address: callers have."""

    __slots__ = ("_arrays", "_pointers")

    def __init__(self, batch: CopyColumns) -> None:
        columns = (batch.src, batch.dst, batch.run, batch.count, batch.src_step, batch.dst_step)
        self._arrays = tuple(np.ascontiguousarray(a, np.int64) for a in columns)
        if [a.size for a in self._arrays] != [len(batch.src)] * 3 + [3 * len(batch.src)] * 3:
            raise ValueError("columns differ in length")
        self._pointers = tuple(ffi.from_buffer("int64_t[]", a) for a in self._arrays)

    def _from(self, row: int) -> tuple[Pointer, Pointer, Pointer, Pointer, Pointer, Pointer]:
        src, dst, run, count, src_step, dst_step = self._pointers
        return src + row, dst + row, run + row, count + 3 * row, src_step + 3 * row, dst_step + 3 * row

    def copy(self, begin: int, end: int) -> None:
        """Within this process."""
        lib.peerload_copy(end - begin, *self._from(begin))

    def copy_mapped(self, begin: int, end: int) -> None:
        """Within this process, out of file mappings of one reservation; their pages leave the resident set again."""
        lib.peerload_copy_mapped(end - begin, *self._from(begin))

    def total(self) -> tuple[int, int]:
        """Bytes of all copies, and of the largest: without the temporary arrays that NumPy needs for it."""
        largest = ffi.new("int64_t *")
        return lib.peerload_total(len(self._arrays[0]), self._pointers[2], self._pointers[3], largest), largest[0]

    def copy_rows(self, room: int, most: int, rows: Pointer, end: Pointer) -> None:
        """Write rows for the GPU's kernel, as `peerload.native.tables` says."""
        lib.peerload_copy_rows(len(self._arrays[0]), *self._pointers, room, most, rows, end)

    def read_process(self, pid: int, begin: int, end: int) -> tuple[int, int]:
        """Out of process `pid`, where src are addresses: (0 or errno, bytes that landed)."""
        done = ffi.new("int64_t *")
        return lib.peerload_read_process(pid, end - begin, *self._from(begin), done), done[0]

    def read_file(self, fd: int, begin: int, end: int) -> tuple[int, int]:
        """Out of an open file, where src are byte offsets: (0 or errno, bytes that landed)."""
        done = ffi.new("int64_t *")
        return lib.peerload_read_file(fd, end - begin, *self._from(begin), done), done[0]
