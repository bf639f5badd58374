"""Layouts in files: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerload.config import cache_folder
from peerload.engines.cache import FORMAT, CachedTrace, LayoutCache, LayoutKey, model_digest, tracer_digest, tracers
from peerload.errors import ConfigError
from peerload.model.boxes import Box
from peerload.model.catalog import Catalog, Parallel, TensorSpec
from peerload.model.layout import Constant, Layout, Piece, Pieces
from peerload.testing.strategies import catalogs, instances

KEY = LayoutKey("vllm", "1.2", "abc", "0123456789abcdef", "fp8", Parallel(4, 2, 4), 3, "cuda 9.0")
CATALOG = Catalog.of([TensorSpec("a", "BF16", (4, 6)), TensorSpec("b", "F32", ()), TensorSpec("a as F32", "F32", (4, 6))])


def kept() -> CachedTrace:
    """One of everything a layout may have."""
    pieces = [
        Piece(0, Box((1, 0), (3, 6)), 0, 0, (2, 4)),
        Piece(1, Box((), ()), 1, 8, ()),
        Piece(2, Box((0, 0), (1, 2)), 1, 0, (8, 4)),
    ]
    layout = Layout(
        CATALOG,
        ("p", "q", "r"),
        np.array([30, 12, 7], np.int64),
        Pieces.of(pieces, CATALOG.width),
        (Constant(0, 24, (3,), (2,), b"\x80\xbf"),),
        {"a as F32": "a"},
        {"b": "not for us"},
        Parallel(4, 2, 4),
        3,
    )
    return CachedTrace(layout, {"a as F32": "cast"}, ("cos_sin",), {"w_uk": "aten::mm"}, {"a as F32": ("a",)})


def assert_same(found: CachedTrace | None, wanted: CachedTrace) -> None:
    assert found is not None
    for name in ("derived", "made", "hidden", "covers"):
        assert getattr(found, name) == getattr(wanted, name), name
    a, b = found.layout, wanted.layout
    assert a.catalog == b.catalog
    for name in ("buffer_names", "constants", "aliases", "ignored", "parallel", "rank"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.buffer_nbytes.tolist() == b.buffer_nbytes.tolist()
    for name in ("tensor", "start", "stop", "buffer", "offset", "stride"):
        mine, theirs = getattr(a.pieces, name), getattr(b.pieces, name)
        assert (mine.shape, mine.tolist()) == (theirs.shape, theirs.tolist()), name


def test_everything_comes_back(tmp_path: Path) -> None:
    cache = LayoutCache(tmp_path / "new" / "folder")
    assert cache.get(KEY) is None
    path = cache.put(KEY, kept())
    assert_same(cache.get(KEY), kept())
    assert [p.name for p in path.parent.iterdir()] == [KEY.filename], "no scratch file is left"


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_layout_comes_back(tmp_path: Path, data: st.DataObject) -> None:
    catalog = data.draw(catalogs())
    cache = LayoutCache(tmp_path)
    for layout in data.draw(instances(catalog)):
        key = replace(KEY, rank=layout.rank, parallel=layout.parallel)
        cache.put(key, CachedTrace(layout))
        assert_same(cache.get(key), CachedTrace(layout))


def test_a_layout_without_pieces_comes_back(tmp_path: Path) -> None:
    """As of a pipeline stage that has no layers."""
    layout = Layout(CATALOG, (), np.zeros(0, np.int64), Pieces.of([], CATALOG.width))
    LayoutCache(tmp_path).put(KEY, CachedTrace(layout))
    assert_same(LayoutCache(tmp_path).get(KEY), CachedTrace(layout))


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "sglang"},
        {"version": "1.3"},
        {"tracer": "abd"},
        {"model": "0123456789abcdee"},
        {"quantization": ""},
        {"parallel": Parallel(4, 2, 2)},
        {"rank": 2},
        {"device": "cuda 10.0"},
        {"platform": "cuda"},
        {"arguments": '{"quantization": "fp8"}'},
    ],
)
def test_another_key_is_another_file(tmp_path: Path, change: dict[str, object]) -> None:
    cache = LayoutCache(tmp_path)
    cache.put(KEY, kept())
    assert cache.get(replace(KEY, **change)) is None


def test_a_person_can_read_it(tmp_path: Path) -> None:
    path = LayoutCache(tmp_path).put(KEY, kept())
    assert path.name.startswith("vllm-01234567-tp4-pp2-ep4-rank3-")
    head, body = (json.loads(line) for line in path.read_text().splitlines())
    assert head["format"] == FORMAT
    assert head["key"] == {
        "engine": "vllm",
        "version": "1.2",
        "tracer": "abc",
        "model": "0123456789abcdef",
        "quantization": "fp8",
        "parallel": {"tp": 4, "pp": 2, "ep": 4},
        "rank": 3,
        "device": "cuda 9.0",
        "platform": "auto",
        "arguments": "{}",
    }
    assert body["buffers"] == [["p", "q", "r"], [30, 12, 7]]


def damaged(path: Path, how: str) -> None:
    text = path.read_text()
    head, body = text.splitlines()
    if how == "older":
        path.write_text(text.replace(f'"format": {FORMAT}', '"format": 0', 1))
    elif how == "another key's":
        path.write_text(text.replace('"rank": 3', '"rank": 2', 1))
    elif how == "one digit":
        path.write_text(f"{head}\n{body.replace('[30, 12, 7]', '[30, 12, 9]')}\n")
    elif how == "no text":
        path.write_bytes(b"\xff\xfe\x00")
    elif how == "a list":
        path.write_text("[]\n[]\n")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(text[: int(how)])


@pytest.mark.parametrize("how", ["older", "another key's", "one digit", "no text", "a list", "0", "1", "200", "700"])
def test_what_is_damaged_is_ignored_with_a_warning_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    cache = LayoutCache(tmp_path)
    path = cache.put(KEY, kept())
    damaged(path, how)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert [str(path) in r.getMessage() and "made anew" in r.getMessage() for r in caplog.records] == [True]
    cache.put(KEY, kept())
    assert_same(cache.get(KEY), kept())


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    cache = LayoutCache(tmp_path)
    path = cache.put(KEY, kept())
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert cache.get(KEY) is None, end


def test_a_file_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = LayoutCache(tmp_path)
    damaged(cache.put(KEY, kept()), "a folder")
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert "can't be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written") as caught:
        LayoutCache(tmp_path / "file" / "layouts").put(KEY, kept())
    assert "--cache off" in caught.value.next_step
    cache = LayoutCache(tmp_path)
    (tmp_path / KEY.filename).mkdir()
    with pytest.raises(ConfigError, match="can't be written"):
        cache.put(KEY, kept())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["file", KEY.filename]), "no scratch file is left"


def test_a_model_is_its_config_and_its_tensors() -> None:
    base = model_digest(b"{}", CATALOG)
    other = Catalog.of([TensorSpec("a", "F16", (4, 6)), *list(CATALOG)[1:]])
    assert len({base, model_digest(b"{ }", CATALOG), model_digest(b"{}", other)}) == 3
    assert base == model_digest(b"{}", Catalog.of(list(CATALOG)))


def test_the_tracer_is_its_sources() -> None:
    assert len(tracer_digest()) == 16
    assert tracer_digest() == tracer_digest()
    folders = {path.parent.name for path in tracers()}
    assert folders >= {"tracing", "probe", "engines", "vllm", "sglang", "transformers"}, "a change of these makes layouts anew"


def test_where_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "peerload" / "layouts"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):  # the specification: a path that isn't absolute is as none
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "peerload" / "layouts"
