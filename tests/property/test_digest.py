"""The digest against two oracles that share nothing with the kernel: big integers byte by byte, and torch int64 operations."""

from __future__ import annotations

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerload.integrity.digest import PRIME, add_up, digest_boxes, tensor_keys
from peerload.memory.space import HOST, digest_layout
from peerload.model.boxes import Box
from peerload.model.catalog import ITEMSIZE, Catalog, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces

SEGMENT = 1024
MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def residue(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) % (PRIME - 1) + 1


B = [residue((j + 1) * STEP & MASK) for j in range(SEGMENT)]


def dumb(spec: TensorSpec, whole: np.ndarray, box: Box) -> int:
    """Byte by byte with Python's integers. `whole`: the tensor as unsigned integers."""
    key = int(tensor_keys(Catalog.of([spec]))[0])
    size = whole.itemsize
    total = 0
    for index in itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))):
        flat = int(np.ravel_multi_index(index, whole.shape)) if index else 0
        for byte, value in enumerate(int(whole[index]).to_bytes(size, "little"), start=flat * size):
            word = byte // 4
            total += residue((key + word // SEGMENT * STEP) & MASK) * B[word % SEGMENT] * (value << 8 * (byte % 4))
    return total % PRIME


def in_torch(spec: TensorSpec, whole: torch.Tensor, box: Box) -> int:
    """What a GPU would run: int64 only, no 128-bit product over elements. `whole`: any dtype, the logical tensor."""
    key = int(tensor_keys(Catalog.of([spec]))[0])
    size = whole.element_size()
    part = whole[(*box.slices(), ...)].contiguous().reshape(-1)
    flat = torch.arange(whole.numel()).reshape(whole.shape)[(*box.slices(), ...)].reshape(-1) * size
    if size == 8:
        part, flat, size = part.view(torch.int32), torch.stack([flat, flat + 4], 1).reshape(-1), 4
    bits = part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).to(torch.int64) & ((1 << 8 * size) - 1)
    word = bits << (flat % 4 * 8)
    segment, column = flat // 4 // SEGMENT, flat // 4 % SEGMENT
    table = torch.tensor(B)
    total = 0
    for s in segment.unique().tolist():
        row = segment == s
        sums = [int((word[row] * (table[column[row]] >> 21 * i & (1 << 21) - 1)).sum()) for i in range(3)]
        assert min(sums) >= 0, "a limb's sum left the signed range"
        total += residue((key + s * STEP) & MASK) * sum(x << 21 * i for i, x in enumerate(sums))
    return total % PRIME


def digest(spec: TensorSpec, array: np.ndarray, box: Box, *, threads: int = 1) -> int:
    """The kernel on one box; `array` is the box's own data, with whatever strides it has."""
    catalog = Catalog.of([spec])
    width = catalog.width
    start, stop, stride = np.zeros((1, width), np.int64), np.ones((1, width), np.int64), np.zeros((1, width), np.int64)
    if spec.shape:
        start[0], stop[0], stride[0] = box.start, box.stop, array.strides
    address = np.array([array.__array_interface__["data"][0]])
    return int(digest_boxes(catalog, np.zeros(1, np.int64), start, stop, address, stride, threads=threads)[0])


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def random_tensor(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = UNSIGNED[ITEMSIZE[dtype]]
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def whole_digest(spec: TensorSpec, array: np.ndarray) -> int:
    return digest(spec, array, Box.whole(spec.shape))


shapes = st.lists(st.integers(1, 12), max_size=4).map(tuple) | st.sampled_from([(3, 2100), (5000,), (2, 3, 1030)])


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(start, tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)))


def cut(draw: st.DrawFn, box: Box, times: int) -> list[Box]:
    parts = [box]
    for _ in range(times):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axes = [a for a, n in enumerate(part.shape) if n > 1]
        if not axes:
            parts.append(part)
            continue
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(part.start[axis] + 1, part.stop[axis] - 1))
        parts.append(Box(part.start, (*part.stop[:axis], at, *part.stop[axis + 1 :])))
        parts.append(Box((*part.start[:axis], at, *part.start[axis + 1 :]), part.stop))
    return parts


def strided_like(draw: st.DrawFn, values: np.ndarray) -> np.ndarray:
    """Equal values elsewhere in memory: dimensions permuted, spread out, backwards, at an odd address."""
    ndim, size = values.ndim, values.itemsize
    order = draw(st.permutations(range(ndim)))
    spread = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    inner = tuple(values.shape[d] * spread[d] for d in order)
    raw = np.zeros(int(np.prod(inner, dtype=np.int64)) * size + 8, np.uint8)
    odd = draw(st.integers(0, 7))
    place = raw[odd : odd + int(np.prod(inner, dtype=np.int64)) * size].view(values.dtype).reshape(inner)
    place = place[tuple(slice(None, None, spread[d] * draw(st.sampled_from([1, -1]))) for d in order)]
    place = place.transpose(np.argsort(order)) if ndim else place
    place = place[(*(slice(0, n) for n in values.shape), ...)]
    place[...] = values
    return place


@given(st.data(), shapes, st.sampled_from(sorted(ITEMSIZE)), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_equals_the_oracles_for_any_box_and_any_strides(data: st.DataObject, shape, dtype, seed) -> None:
    spec = TensorSpec("t", dtype, shape)
    whole = random_tensor(seed, shape, dtype)
    box = data.draw(boxes(shape))
    expected = dumb(spec, whole, box)
    assert digest(spec, whole[(*box.slices(), ...)], box) == expected
    assert digest(spec, strided_like(data.draw, whole[(*box.slices(), ...)]), box) == expected
    signed = whole.view(whole.dtype.name.removeprefix("u")) if whole.itemsize > 1 else whole
    assert in_torch(spec, torch.from_numpy(signed.copy()), box) == expected


@given(st.data(), shapes, st.sampled_from(["U8", "BF16", "F32", "F64"]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_adds_up_over_any_partition(data: st.DataObject, shape, dtype, seed) -> None:
    spec = TensorSpec("t", dtype, shape)
    whole = random_tensor(seed, shape, dtype)
    parts = cut(data.draw, Box.whole(shape), data.draw(st.integers(0, 9)))
    digests = np.array([digest(spec, whole[(*p.slices(), ...)], p) for p in parts], np.uint64)
    assert int(add_up(digests, np.zeros(1, np.int64))[0]) == whole_digest(spec, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32, torch.float64, torch.int8])
def test_torch_reference_on_real_dtypes(dtype: torch.dtype) -> None:
    name = {"bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "float32": "F32", "float64": "F64", "int8": "I8"}
    spec = TensorSpec("w", name[str(dtype).removeprefix("torch.")], (33, 257))
    tensor = (torch.randn(33, 257, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    bits = tensor.view(torch.uint8).numpy().view(UNSIGNED[tensor.element_size()])
    for box in (Box.whole(spec.shape), Box((1, 3), (30, 100)), Box((0, 256), (33, 257))):
        assert digest(spec, bits[box.slices()], box) == in_torch(spec, tensor, box)


def test_extreme_words_do_not_overflow() -> None:
    spec = TensorSpec("ones", "U32", (4 * SEGMENT,))
    ones = np.full(spec.shape, 0xFFFFFFFF, np.uint32)
    assert whole_digest(spec, ones) == dumb(spec, ones, Box.whole(spec.shape))
    assert add_up(np.full(1 << 16, PRIME - 1, np.uint64), np.zeros(1, np.int64)) == (PRIME - 1) * (1 << 16) % PRIME


def test_keys_are_distinct_and_not_zero() -> None:
    """What the certain part of the promise stands on."""
    assert len(set(B)) == SEGMENT
    assert all(0 < b < PRIME for b in B)
    segments = [residue(k * STEP & MASK) for k in range(1 << 12)]
    assert len(set(segments)) == len(segments)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((9, 7), "F8_E4M3"), ((5, 9), "BF16"), ((4, 11), "F32"), ((3, 5), "F64"), ((), "F32")]
)
def test_every_single_flipped_bit_changes_it(shape: tuple[int, ...], dtype: str) -> None:
    spec = TensorSpec("t", dtype, shape)
    whole = random_tensor(3, shape, dtype)
    seen = {whole_digest(spec, whole)}
    raw = whole.reshape(-1).view(np.uint8)
    for byte, bit in itertools.product(range(raw.size), range(8)):
        raw[byte] ^= 1 << bit
        seen.add(whole_digest(spec, whole))
        raw[byte] ^= 1 << bit
    assert len(seen) == raw.size * 8 + 1


@given(st.integers(0, (8 << 20) - 1), st.integers(0, 7), st.sampled_from([0, 0x80, 0xFF]))
@settings(max_examples=40, deadline=None)
def test_a_flipped_bit_in_eight_megabytes_changes_it(byte: int, bit: int, fill: int) -> None:
    spec = TensorSpec("big", "BF16", (2048, 2048))
    whole = np.full(spec.shape, fill * 257, np.uint16)
    before = digest(spec, whole, Box.whole(spec.shape), threads=2)
    whole.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
    assert digest(spec, whole, Box.whole(spec.shape), threads=2) != before


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_structured_damage_to_low_entropy_data_changes_it(dtype: str) -> None:
    """Few distinct values, all exchanges of two rows, columns or elements, the transpose, and sign bits flipped in pairs."""
    spec = TensorSpec("t", dtype, (24, 24))
    rng = np.random.default_rng(7)
    whole = rng.choice(np.array([0, 1, 1 << 8 * ITEMSIZE[dtype] - 1], UNSIGNED[ITEMSIZE[dtype]]), spec.shape)
    same = whole_digest(spec, whole)
    assert whole_digest(spec, whole.T.copy()) != same
    for a, b in itertools.combinations(range(24), 2):
        for axis in (0, 1):
            order = np.arange(24)
            order[[a, b]] = b, a
            other = whole.take(order, axis)
            assert (whole_digest(spec, other) == same) == np.array_equal(other, whole)
    sign = np.array(1 << 8 * ITEMSIZE[dtype] - 1, whole.dtype)
    for pair in rng.integers(0, 24 * 24, (500, 2)):
        exchanged, flipped = whole.copy().reshape(-1), whole.copy().reshape(-1)
        exchanged[pair] = exchanged[pair[::-1]]
        assert (whole_digest(spec, exchanged.reshape(24, 24)) == same) == np.array_equal(exchanged, whole.reshape(-1))
        flipped[pair] ^= sign
        assert pair[0] == pair[1] or whole_digest(spec, flipped.reshape(24, 24)) != same


def test_equal_bytes_under_another_name_dtype_or_shape_differ() -> None:
    data = random_tensor(1, (8, 8), "BF16")
    specs = [("a", "BF16", (8, 8)), ("b", "BF16", (8, 8)), ("a", "F16", (8, 8)), ("a", "BF16", (4, 16))]
    assert len({whole_digest(s, data.reshape(s.shape)) for s in (TensorSpec(*x) for x in specs)}) == 4


def test_pieces_of_a_layout_and_threads() -> None:
    """Fused, transposed and narrow pieces of one buffer; one thread and three agree, and both with the oracle."""
    specs = [TensorSpec("q", "BF16", (64, 96)), TensorSpec("down", "F32", (1100, 1300)), TensorSpec("scale", "F32", ())]
    catalog = Catalog.of(specs)
    wholes = [random_tensor(i, s.shape, s.dtype) for i, s in enumerate(specs)]
    parts = [
        (0, Box((32, 0), (64, 96)), False),
        (0, Box((0, 5), (32, 9)), True),
        (1, Box((0, 650), (1100, 1300)), False),
        (1, Box((7, 0), (1100, 650)), True),
        (2, Box((), ()), False),
    ]
    buffer, rows, offset = np.zeros(8 << 20, np.uint8), [], 2
    for tensor, box, transposed in parts:
        data = wholes[tensor][box.slices()]
        stored = data.T if transposed else data
        raw = stored.tobytes()
        buffer[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
        strides = np.empty(stored.shape, stored.dtype).strides
        rows.append(Piece(tensor, box, 0, offset, strides[::-1] if transposed else strides))
        offset += len(raw)
    layout = Layout(catalog, ("arena",), np.array([buffer.size]), Pieces.of(rows, catalog.width))
    address = np.array([buffer.ctypes.data])
    found = [digest_layout(HOST, layout, address, threads=t) for t in (1, 3)]
    assert found[0].tolist() == found[1].tolist()
    for i in (0, 1, 4):
        assert int(found[0][i]) == dumb(specs[parts[i][0]], wholes[parts[i][0]], parts[i][1])
    top = digest(specs[1], wholes[1][:7, :650], Box((0, 0), (7, 650)))
    assert (int(found[0][2]) + int(found[0][3]) + top) % PRIME == whole_digest(specs[1], wholes[1])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "F64"])
@pytest.mark.parametrize(("rows", "columns"), [(600, 300), (64, 32), (63, 2100), (257, 33)])
def test_transposed_in_memory(dtype: str, rows: int, columns: int) -> None:
    """Tiles of it are turned by vectors; what remains at their edges isn't."""
    whole = random_tensor(5, (rows, columns), dtype)
    spec, inside = TensorSpec("t", dtype, whole.shape), Box((3, 1), (rows, columns - 1))
    stored = np.asfortranarray(whole)
    assert whole_digest(spec, stored) == whole_digest(spec, whole)
    assert digest(spec, stored[inside.slices()], inside) == digest(spec, whole[inside.slices()], inside)
    assert digest(spec, stored[::-1][::-1], Box.whole(whole.shape)) == whole_digest(spec, whole)


def test_reads_nothing_past_its_last_byte() -> None:
    """Boxes that end where an unreadable page begins; a byte too far would end this process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    raw = np.frombuffer(memory, np.uint8)
    raw[:page] = random_tensor(4, (page,), "U8")
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(raw.ctypes.data + page), page, 0) == 0
    for nbytes in (1, 3, 4, 31, 33, 63, 65, page):
        spec = TensorSpec("t", "U8", (nbytes,))
        last = raw[page - nbytes : page]
        assert digest(spec, last, Box((0,), (nbytes,))) == dumb(spec, last.copy(), Box((0,), (nbytes,)))
    rows, spec = raw[:page].reshape(8, -1), TensorSpec("t", "U8", (8, page // 8))
    half = Box((0, page // 16), (8, page // 8))  # what lies ahead of the last row is fetched, which reads nothing
    assert digest(spec, rows[half.slices()], half) == dumb(spec, rows.copy(), half)
    assert libc.mprotect(ctypes.c_void_p(raw.ctypes.data + page), page, 3) == 0


def test_a_box_outside_its_tensor_is_refused() -> None:
    catalog = Catalog.of([TensorSpec("t", "U8", (4,))])
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="outside"):
        digest_boxes(catalog, one, one[:, None], one[:, None] + 5, one, one[:, None])
    with pytest.raises(ValueError, match="columns"):
        digest_boxes(catalog, one, one[:, None], one[:, None] + 1, np.zeros(2, np.int64), one[:, None])
