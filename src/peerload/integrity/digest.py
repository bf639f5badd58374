"""A digest that doesn't depend on sharding: one number per box, and boxes add up.

A logical tensor is the row-major, little-endian byte string that a safetensors file holds. Cut it into 32-bit words and
the words into segments of 1024 (4 KiB). With w[s, j] the word j of segment s,

    digest(box) = sum over s of A(tensor, s) * sum over j of B(j) * w[s, j]     modulo p = 2^61 - 1,

where bytes outside the box count as zero. A and B are non-zero residues out of splitmix64; A depends on the tensor's name,
dtype and shape too. Whatever the boxes of a partition are, wherever they lie and however they are strided in memory, their
digests add up modulo p to the digest of the whole.

What it catches. Arithmetic is in a field, so a product is zero only if a factor is:
- certainly: any change confined to one aligned 32-bit word (a flipped bit; any one element of up to 4 bytes), and any two
  different words exchanged within one segment;
- except with a probability of about 2^-60 over the choice of A and B, any other fixed change: bytes from another place,
  rows or columns exchanged, transposed, stale or torn data, zeros for data. The difference of two digests is a polynomial
  of degree two in the keys, which has at most a share of 2 / (p - 1) of roots whatever its coefficients (Schwartz and
  Zippel). So low-entropy weights, equal rows, or changes in sign bits alone are no weaker than others;
- tensors exchanged: likewise, since each has its own A.
What it doesn't. A and B are fixed and public: a guard against accidents, not against somebody who computes a collision.
All-zero data has digest 0, and so have no bytes at all: whether bytes are missing is for the comparison to count.

Announcements and measurements name this algorithm (`model.offer.ALGORITHM`): numbers of two algorithms are never compared.

On a GPU: with the limbs of B (21 bits each) a segment's three sums fit a signed 64-bit integer, so that plain int64 tensor
operations do; tests/property/test_digest.py has it in torch.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from ..model.boxes import IntArray, volumes
from ..model.catalog import Catalog
from ..native._lib import ffi, lib

PRIME: Final = (1 << 61) - 1

DigestArray = npt.NDArray[np.uint64]

#: A box larger than this is cut before threads share the work, bytes.
_GRAIN_NBYTES: Final = 4 << 20
#: Less than this isn't worth a second thread, bytes.
_ALONE_NBYTES: Final = 1 << 20


def digest_boxes(
    catalog: Catalog, tensor: IntArray, start: IntArray, stop: IntArray, address: IntArray, stride: IntArray, *, threads: int = 0
) -> DigestArray:
    """[n] digests, each in [0, PRIME), of any boxes.

    tensor: [n] catalog rows; start, stop: [n, width], not empty and inside the tensor; address: [n] of each box's first
    element in this process; stride: [n, width] bytes, any sign. The memory is the caller's: CPU memory, all of it readable,
    and not written meanwhile. The boxes may overlap. threads: 0 means one for each core this process may use.
    """
    n = len(tensor)
    if not start.shape == stop.shape == stride.shape == (n, catalog.width) or len(address) != n:
        raise ValueError(f"columns do not fit {n} boxes of {catalog.width} dimensions")
    if n == 0:
        return np.zeros(0, np.uint64)
    if (start < 0).any() or (stop <= start).any() or (stop > catalog.shape[tensor]).any():
        raise ValueError("a box is empty or lies outside its tensor")
    owner = np.arange(n)
    columns = (owner, tensor, start, stop, address, stride)
    nbytes = volumes(start, stop) * catalog.itemsize[tensor]
    threads = threads or len(os.sched_getaffinity(0))
    if threads == 1 or nbytes.sum() < _ALONE_NBYTES:
        return _digest(catalog, columns, 0, n)

    columns = cut_boxes(columns, catalog.itemsize[tensor], _GRAIN_NBYTES)
    owner, tensor, start, stop = columns[:4]
    done = np.cumsum(volumes(start, stop) * catalog.itemsize[tensor])
    edges = np.unique(np.searchsorted(done, np.arange(1, 8 * threads) * (int(done[-1]) // (8 * threads))))
    tasks = list(zip([0, *edges.tolist()], [*edges.tolist(), len(owner)], strict=True))
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda task: _digest(catalog, columns, *task), tasks))
    return add_up(np.concatenate(parts), np.flatnonzero(np.diff(owner, prepend=-1)))


def add_up(digests: DigestArray, first: IntArray) -> DigestArray:
    """Sums of digests over consecutive groups, each in [0, PRIME). Group i starts at row `first[i]`; none is empty.
    At most 2^31 rows."""
    if len(first) == 0:
        return np.zeros(0, np.uint64)
    low, high = digests & np.uint64(0xFFFFFFFF), digests >> np.uint64(32)
    return fold(np.add.reduceat(low, first), np.add.reduceat(high, first))


def fold(low: DigestArray, high: DigestArray) -> DigestArray:
    """Low + 2^32 * high modulo PRIME, for low < 2^63 and high < 2^60: digests summed in halves, so that nothing overflows."""
    # 2^61 = 1, so the bits of high from 29 up come round to the low end.
    total: DigestArray = low + ((high & np.uint64((1 << 29) - 1)) << np.uint64(32)) + (high >> np.uint64(29))
    total %= np.uint64(PRIME)
    return total


@lru_cache(maxsize=4)
def tensor_keys(catalog: Catalog) -> DigestArray:
    """[tensors], what A depends on besides the segment."""
    keys = np.empty(len(catalog), np.uint64)
    for i, (name, dtype, shape) in enumerate(catalog):
        text = f"{name}\0{dtype}\0{shape}".encode()
        keys[i] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    keys.flags.writeable = False
    return keys


Columns = tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]


def cut_boxes(columns: Columns, itemsize: IntArray, grain_nbytes: int) -> Columns:
    """The same boxes in parts of at most `grain_nbytes` (or one element), in order. columns: owner (a row of `itemsize`), tensor,
    start, stop, address, stride."""
    for axis in range(columns[2].shape[1]):
        owner, tensor, start, stop, address, stride = columns
        extent = (stop - start)[:, axis]
        inner = (stop - start)[:, axis + 1 :].prod(axis=1) * itemsize[owner]
        step = np.minimum(np.maximum(1, grain_nbytes // inner), extent)
        parts = -(-extent // step)
        if (parts == 1).all():
            continue
        rows = np.repeat(np.arange(len(owner)), parts)
        first = (np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)) * step[rows]
        start, stop, old = start[rows], stop[rows], start[rows, axis]
        start[:, axis] = old + first
        stop[:, axis] = np.minimum(stop[:, axis], old + first + step[rows])
        columns = (owner[rows], tensor[rows], start, stop, address[rows] + first * stride[rows, axis], stride[rows])
    return columns


def _digest(catalog: Catalog, columns: Columns, first: int, last: int) -> DigestArray:
    out = np.empty(last - first, np.uint64)
    rows = [np.ascontiguousarray(c[first:last], np.int64) for c in columns[1:]]  # held until the call returns
    shape, itemsize = (ffi.from_buffer("int64_t[]", c) for c in (catalog.shape, catalog.itemsize))
    tensor, start, stop, address, stride = (ffi.from_buffer("int64_t[]", c) for c in rows)
    key, result = (ffi.from_buffer("uint64_t[]", c) for c in (tensor_keys(catalog), out))
    lib.peerload_digest(last - first, catalog.width, key, shape, itemsize, tensor, start, stop, address, stride, result)
    return out
