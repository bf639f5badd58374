"""Tables of rows for the GPU's kernels, made piece by piece by the C helper into memory of the caller's."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ._lib import ffi, lib
from .columns import Columns, CopyColumns

IntArray = npt.NDArray[np.int64]

#: Bytes that a row may take.
COPY_ROW_NBYTES: Final = ffi.sizeof("struct copy_row") + ffi.sizeof("struct copy_levels")
DIGEST_ROW_NBYTES: Final = ffi.sizeof("struct digest_row")
#: No copy and no box may be larger, so that its units are counted in 32 bits.
LARGEST_NBYTES: Final = 1 << 30


class CopyRows:
    """The table of a batch, whose copies are at most LARGEST_NBYTES each."""

    row_nbytes = COPY_ROW_NBYTES

    def __init__(self, batch: CopyColumns) -> None:
        self._columns = Columns(batch)
        self._end = ffi.new("struct table_end *")

    def fill(self, address: int, room: int, most: int) -> tuple[int, int, int]:
        """Write a table of the next rows, `room` of them at most (3 or more), to `address`: (bytes, rows, their tiles, about
        `most` of them at most). No rows: there are no more."""
        self._columns.copy_rows(room, most, ffi.cast("void *", address), self._end)
        return self._end.nbytes, self._end.rows, self._end.tiles


class DigestRows:
    """The table of boxes of at most LARGEST_NBYTES each.

    key, itemsize: [tensors]; shape: [tensors, width]; slot: [n] where a box's digest is added; tensor: [n]; start, stop, stride:
    [n, width]; address: [n] of its first element. As `peerload.integrity.digest.digest_boxes` has them."""

    row_nbytes = DIGEST_ROW_NBYTES

    def __init__(
        self,
        key: npt.NDArray[np.uint64],
        shape: IntArray,
        itemsize: IntArray,
        slot: IntArray,
        tensor: IntArray,
        start: IntArray,
        stop: IntArray,
        address: IntArray,
        stride: IntArray,
    ) -> None:
        columns = (shape, itemsize, slot, tensor, start, stop, address, stride)
        self._arrays = (np.ascontiguousarray(key, np.uint64), *(np.ascontiguousarray(a, np.int64) for a in columns))
        self._pointers = tuple(ffi.from_buffer(f"{'u' * (i == 0)}int64_t[]", a) for i, a in enumerate(self._arrays))
        self._size = start.shape
        self._end = ffi.new("struct table_end *")

    def fill(self, address: int, room: int, most: int) -> tuple[int, int, int]:
        """As of `CopyRows`."""
        lib.peerload_digest_rows(*self._size, *self._pointers, room, most, ffi.cast("void *", address), self._end)
        return self._end.nbytes, self._end.rows, self._end.tiles


def largest_box(shape: IntArray, itemsize: IntArray, tensor: IntArray, start: IntArray, stop: IntArray) -> int:
    """Bytes of the largest of n boxes. Raises ValueError for one that is empty or lies outside its tensor."""
    found = ffi.new("int64_t *")
    arrays = [np.ascontiguousarray(a, np.int64) for a in (shape, itemsize, tensor, start, stop)]
    if lib.peerload_check_boxes(*start.shape, *(ffi.from_buffer("int64_t[]", a) for a in arrays), found) >= 0:
        raise ValueError("a box is empty or lies outside its tensor")
    return found[0]


def locate(at: IntArray, run: IntArray, count: IntArray, step: IntArray, start: IntArray, end: IntArray) -> tuple[IntArray, int]:
    """The region, of ascending `start` and `end` [regions], that the bytes of each copy of one side of a batch lie in as a
    whole, and the first copy that lies in none, or -1."""
    row = np.empty(len(at), np.int64)
    arrays = [np.ascontiguousarray(a, np.int64) for a in (at, run, count, step, start, end, row)]
    at_, run_, count_, step_, start_, end_, row_ = (ffi.from_buffer("int64_t[]", a) for a in arrays)
    return row, lib.peerload_locate(len(at), at_, run_, count_, step_, len(start), start_, end_, row_)
