"""Whatever the safetensors library refuses, our reader of headers refuses; what the library accepts, it accepts, but for the
differences that `engines/header.py` names."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

from peerload.engines.checkpoint import Checkpoint  # noqa: E402
from peerload.errors import ConfigError, ManifestError  # noqa: E402
from peerload.manifest import ITEMSIZE, MAX_DIMENSIONS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NAMES = st.text(alphabet="abw.01\u00e9\U0001f600", min_size=1, max_size=6)
#: What a number of a header may be replaced by.
ODDITIES = [0, 1, 2, 3, 8, 16, -1, True, False, None, 1.0, 2.5, "1", "", [], {}, [1], 2**31, 2**63, 2**64, 10**30]
ODD = st.sampled_from(ODDITIES).map(deepcopy)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "x"])


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A right header, and the bytes of data that belong to it."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        nbytes = ITEMSIZE[dtype]
        for extent in shape:
            nbytes *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    return header, at


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, int]:
    """Bytes of a header with up to three faults, and of how many bytes of data the file is."""
    header, nbytes = draw(headers())
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        match draw(st.integers(0, 8)):
            case 0:
                header[name] = draw(ODD)
            case 1 if isinstance(entry, dict):
                entry[draw(FIELDS)] = draw(ODD)
            case 2 if isinstance(entry, dict):
                entry.pop(draw(FIELDS), None)
            case 3 | 4 if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
                offsets, by = entry["data_offsets"], draw(st.integers(-8, 8))
                entry["data_offsets"] = [o + by if type(o) is int else o for o in offsets]
            case 5 if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                where = draw(st.integers(0, len(entry["shape"])))
                entry["shape"] = [*entry["shape"][:where], draw(ODD), *entry["shape"][where + draw(st.integers(0, 1)) :]]
            case 6:
                header[draw(NAMES)] = deepcopy(entry)
            case 7:
                del header[name]
            case 8:
                nbytes = max(0, nbytes + draw(st.integers(-4, 4)))
        if not header:
            break
    raw = json.dumps(header, ensure_ascii=draw(st.booleans())).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(raw)))
        inserted = draw(
            st.sampled_from([b"", b" ", b"\0", b"-", b"0", b'"', b"{", b"}", b"[", b",", b"NaN", b"\xff", b"\\ud800", b"1e999"])
        )
        raw = raw[:at] + inserted + raw[at + draw(st.integers(0, 1)) :]
    return raw, nbytes


def known_difference(raw: bytes, found: list[tuple[str, str, list[int]]]) -> bool:
    """Is it among the files that the library accepts and we don't?"""
    names: list[list[str]] = []

    def pairs(entries: list[tuple[str, object]]) -> dict[str, object]:
        names.append([name for name, _ in entries])
        return dict(entries)

    parsed = json.loads(raw, object_pairs_hook=pairs)
    if any(len(set(n)) != len(n) for n in names):
        return True
    if any(not isinstance(v, dict) for k, v in parsed.items() if k != "__metadata__"):
        return True
    return not found or any(
        dtype not in ITEMSIZE or len(shape) > MAX_DIMENSIONS or 0 in shape or not name for name, dtype, shape in found
    )


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutated())
def test_the_library_and_we_judge_alike(tmp_path: Path, case: tuple[bytes, int]) -> None:
    raw, nbytes = case
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))
    theirs: list[tuple[str, str, list[int]]] | None
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            theirs = sorted((name, s.get_dtype(), s.get_shape()) for name, s in slices.items())
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours = [(spec.name, spec.dtype, list(spec.shape)) for spec in Checkpoint.open(tmp_path).layout.catalog]
    except (ManifestError, ConfigError):
        assert theirs is None or known_difference(raw, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("depth", [1, 124, 125, 126, 127, 2000])
def test_nesting_is_refused_where_the_library_refuses_it(tmp_path: Path, depth: int) -> None:
    raw = b'{"w": {"x": ' + b"[" * depth + b"]" * depth + b', "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    verdicts = []
    for read in (lambda: safetensors.safe_open(tmp_path / "model.safetensors", "np"), lambda: Checkpoint.open(tmp_path)):
        try:
            read()
            verdicts.append(True)
        except (safetensors.SafetensorError, ManifestError):
            verdicts.append(False)
    assert verdicts == [depth < 126] * 2


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers())
def test_right_headers_are_accepted(tmp_path: Path, case: tuple[dict[str, Any], int]) -> None:
    header, nbytes = case
    assume(header.keys() != {"__metadata__"})
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.layout.prove_cover()
    assert set(checkpoint.catalog.names) == header.keys() - {"__metadata__"}
