"""The header of a safetensors file: which tensor lies where (https://github.com/huggingface/safetensors: 8 bytes of little-endian
length, that many bytes of JSON, data).

What the safetensors library refuses is refused here. Some of what it accepts is refused too: a name that is listed twice,
a dtype that `ITEMSIZE` lacks (F4, C64), an extent of 0, more than `MAX_DIMENSIONS` dimensions, and an entry that is an array.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from ..errors import ConfigError, ManifestError
from ..model.catalog import ITEMSIZE, MAX_DIMENSIONS, TensorSpec

_LENGTH_NBYTES: Final = 8
_METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset(("dtype", "shape", "data_offsets"))
# The limits of the safetensors library and of its JSON parser.
_MOST_HEADER_NBYTES: Final = 100_000_000
_MOST_NESTED: Final = 127
_LONGEST_INTEGER: Final = 20


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: `offset` is the byte of the file's data part at which it begins."""

    spec: TensorSpec
    file: int
    offset: int


def read_header(path: Path, nbytes: int) -> bytes:
    """The JSON of a file of `nbytes` bytes. Raises ManifestError for what is no safetensors file, ConfigError for what can't be
    read."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_NBYTES), "little")
            if nbytes < _LENGTH_NBYTES or length > min(nbytes - _LENGTH_NBYTES, _MOST_HEADER_NBYTES):
                raise ManifestError(path.name, f"is no safetensors file: a header of {length} bytes in {nbytes}")
            return stream.read(length)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def tensors_in(header: bytes, where: str, file: int, nbytes: int) -> list[Stored]:
    """The tensors that `header` lists, as they follow each other in the file, which has `nbytes` bytes. They are shown to cover
    its data without gap or overlap. Raises ManifestError, naming file (`where`) and tensor."""
    rows = _parsed(header, where)
    metadata = rows.pop(_METADATA, None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ManifestError(f"{where}.{_METADATA}", "does not map strings to strings")
    entries = sorted((_entry(row, f"{where}[{name}]", name) for name, row in rows.items()), key=lambda entry: entry[1:])
    data, at = nbytes - _LENGTH_NBYTES - len(header), 0
    for spec, begin, end in entries:
        field = f"{where}[{spec.name}].data_offsets"
        if not begin <= end <= data:
            raise ManifestError(field, f"[{begin}, {end}) lies outside the file's {data} bytes of data")
        if end - begin != math.prod(spec.shape) * ITEMSIZE[spec.dtype]:
            raise ManifestError(field, f"spans {end - begin} bytes, {spec.dtype}{list(spec.shape)} needs others")
        if begin != at:
            problem = "overlaps the tensor before it" if begin < at else "leaves a gap"
            raise ManifestError(field, f"[{begin}, {end}) {problem}: it must begin at byte {at}")
        at = end
    if at != data:
        raise ManifestError(where, f"its tensors cover {at} of {data} bytes of data", next_step="download it again")
    return [Stored(spec, file, begin) for spec, begin, _ in entries]


def _parsed(header: bytes, where: str) -> dict[str, object]:
    """Strict JSON: an object without NaN, duplicates, lone surrogates or deep nesting."""
    try:
        rows = json.loads(
            header.decode(), object_pairs_hook=_object, parse_constant=_refuse, parse_int=_integer, parse_float=_float
        )
        if b"\\u" in header:
            json.dumps(rows, ensure_ascii=False).encode()  # a lone surrogate can be written in JSON, but is no text
    except (ValueError, RecursionError) as error:
        raise ManifestError(where, f"has a header that can't be read: {error}") from error
    if not isinstance(rows, dict):
        raise ManifestError(where, "has a header that can't be read: it is no JSON object")
    return rows


def _entry(row: object, where: str, name: str) -> tuple[TensorSpec, int, int]:
    """A tensor, and the first and last byte of its data; types and ranges checked."""
    if not isinstance(row, dict) or not row.keys() >= _FIELDS:
        raise ManifestError(where, f"does not have {', '.join(sorted(_FIELDS))}")
    if len(row) > len(_FIELDS):
        _shallow(row, where, _MOST_NESTED - 1)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ManifestError(f"{where}.dtype", f"{dtype!r} is none of {', '.join(ITEMSIZE)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 1 for n in shape) or len(shape) > MAX_DIMENSIONS:
        raise ManifestError(f"{where}.shape", f"is no list of at most {MAX_DIMENSIONS} extents of at least 1: {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ManifestError(f"{where}.data_offsets", f"is no pair of bytes: {offsets!r:.100}")
    return TensorSpec(name, dtype, tuple(shape)), offsets[0], offsets[1]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        count = Counter(name for name, _ in pairs)
        raise ValueError(f"{count.most_common(1)[0][0]!r} is listed twice")
    return found


def _integer(text: str) -> object:
    """Longer ones, and -0, are floating-point numbers to the library."""
    return _float(text) if len(text) > _LONGEST_INTEGER or text == "-0" else int(text)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        _refuse(text[:20])
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _shallow(value: object, where: str, room: int) -> None:
    """Raises ManifestError where lists and objects are nested deeper than `room`."""
    level = [value]
    for _ in range(room + 1):
        nested = [v for v in level if isinstance(v, dict | list)]
        if not nested:
            return
        level = [inner for v in nested for inner in (v.values() if isinstance(v, dict) else v)]
    raise ManifestError(where, f"is nested deeper than {_MOST_NESTED} levels")
