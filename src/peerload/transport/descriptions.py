"""What transports tell their peers of themselves: JSON of a fixed shape, and the one decoder that reads it.

A description is a frozen dataclass. Each field's type carries a check of what it may hold, as in
`pid: Annotated[int, whole(1)]`; `__post_init__` checks what holds between fields and raises ValueError. A description comes from
a stranger: whatever is wrong with it, the decoder raises SourceUnreachable of that source and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Final, TypeVar, get_type_hints

import numpy as np

from ..errors import SourceUnreachable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION: Final = 1
#: Larger ones are refused unread. A region takes about 40 bytes of it.
MAX_NBYTES: Final = 16 << 20
MAX_ROWS: Final = 1 << 20
#: The highest address, and the largest size.
TOP: Final = int(np.iinfo(np.int64).max)
#: A path as Linux takes it.
MAX_PATH: Final = 4096

D = TypeVar("D", bound="DataclassInstance")
Check = Callable[[object], bool]


def whole(low: int = 0, high: int = TOP) -> Check:
    """An integer within these bounds, both included."""
    return lambda value: type(value) is int and low <= value <= high


def text(pattern: str) -> Check:
    """A string that the pattern matches as a whole."""
    matches = re.compile(pattern, re.ASCII).fullmatch
    return lambda value: type(value) is str and matches(value) is not None


def path(value: object) -> bool:
    """An absolute path; names that are no UTF-8 are carried as Python does, by surrogates."""
    if type(value) is not str or not value.startswith("/") or "\0" in value or len(value) > MAX_PATH:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def column(check: Check) -> Check:
    """A sequence of values that each pass `check`."""
    return lambda value: isinstance(value, list | tuple) and len(value) <= MAX_ROWS and all(map(check, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Which process of which host described itself, and where its `Handover` listens."""

    host: Annotated[str, text(r"[!-~]{1,64}")]
    pid_namespace: Annotated[int, whole()]
    pid: Annotated[int, whole(1)]
    start_time: Annotated[int, whole()]
    socket: Annotated[str, text(r"[!-~]{1,100}")]
    token: Annotated[str, text(r"[0-9a-f]{32}")]


def check_rows(**columns: Sequence[object]) -> None:
    """Raise ValueError unless all columns have as many rows."""
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"{', '.join(columns)} differ in length")


def check_ranges(name: str, start: Sequence[int], nbytes: Sequence[int]) -> None:
    """Raise ValueError for a range that ends beyond any address."""
    if (np.array(start, np.int64) > TOP - np.array(nbytes, np.int64)).any():
        raise ValueError(f"{name} has impossible regions")


def encode(description: DataclassInstance) -> bytes:
    return json.dumps({"version": VERSION, **dataclasses.asdict(description)}, separators=(",", ":")).encode()


def decode(kind: type[D], data: bytes, source: str) -> D:
    """The description of a `source`, with columns as tuples. Raises SourceUnreachable for what is none of this kind."""
    problem = f"it has {len(data)} bytes"
    try:
        told = json.loads(data.decode()) if len(data) <= MAX_NBYTES else None
        if type(told) is dict and type(told.get("version")) is int and told["version"] != VERSION:
            raise SourceUnreachable(source, "speaks another version of the transport", next_step="run the same release")
        if told is not None:
            return _decoded(kind, told)
    except RecursionError:
        problem = "it is nested too deep"
    except ValueError as error:
        problem = str(error)
    raise SourceUnreachable(source, f"gave a description that makes no sense: {problem}")


def _decoded(kind: type[D], told: object) -> D:
    """Raises ValueError."""
    checks = _checks(kind)
    if type(told) is not dict or told.keys() != {"version", *checks} or type(told.pop("version")) is not int:
        raise ValueError(f"it has other fields than version, {', '.join(checks)}")
    for name, check in checks.items():
        if not check(told[name]):
            raise ValueError(f"field {name} has a value of the wrong kind")
    return kind(**{name: tuple(value) if type(value) is list else value for name, value in told.items()})


@cache
def _checks(kind: type[DataclassInstance]) -> Mapping[str, Check]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(kind)}
