"""`peerload layout` and `peerload plan` under SGLang, without peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed here: ./dev engines makes an environment for it")

from peerload.cli import main
from peerload.testing.families import FAMILIES, write_family

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """What a command prints on standard output, of the whole process: one JSON document."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(command: str, *words: str, status: int = 0) -> dict[str, Any]:
        capfd.readouterr()
        assert main([command, "--engine", "sglang", *words, "--json"]) == status
        document = json.loads(capfd.readouterr().out)
        assert isinstance(document, dict)
        return document

    return run


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_fused_parameters_are_explained_and_remembered(ask: Ask, tmp_path: Path, family: str) -> None:
    directory = write_family(tmp_path / "model", FAMILIES[family])
    first, again = (ask("layout", "--model", str(directory), "--tp", "2", "--rank", "1", "--probe")["ranks"][0] for _ in range(2))
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["regions"] == again["regions"]
    fused = [r for r in first["regions"] if r["parameter"] == "model.layers.0.self_attn.qkv_proj.weight"]
    assert [r["tensor"] for r in fused] == [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    for rank in (first, again):
        assert rank["probe"]["agreed"] == rank["parameters"]
        assert rank["probe"]["post_processing"]["model.norm.weight"]["kind"] == "unchanged"


def test_plans_are_made_of_its_layouts(ask: Ask, tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"], weights=False)
    document = ask(
        "plan", "--model", str(directory), "--from", "tp=4", "--to", "tp=2", "--tensors", "*.0.self_attn.k_proj.weight"
    )
    assert document["engine"] == "sglang"
    assert {c["from"] for c in document["copies"]} == {f"seed-0/rank {r}" for r in range(4)}


def test_arguments_of_the_engine_are_passed_on(ask: Ask, tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"])
    words = ["--model", str(directory), "--rank", "0"]
    plain, wide = (ask("layout", *words, *more)["ranks"][0] for more in ([], ["--engine-arg", "dtype=float32"]))
    assert (plain["cached"], wide["cached"]) == (False, False)
    assert plain["derived"] == {}
    assert "model.norm.weight as F32" in wide["derived"]
    assert "has no argument dtyp" in ask("layout", *words, "--engine-arg", "dtyp=float32", status=2)["message"]
    assert "say it with --tp" in ask("layout", *words, "--engine-arg", "tp-size=2", status=2)["next_step"]
    assert "this host's platform" in ask("layout", *words, "--platform", "cuda", status=2)["message"]
