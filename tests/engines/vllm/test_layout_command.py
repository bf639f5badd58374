"""`peerload layout` and `peerload plan` under vLLM, from configs and checkpoints, without peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: ./dev engines makes an environment for it")

from formats import compressed

from peerload.cli import main
from peerload.testing.families import FAMILIES, write_family

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """What a command prints on standard output, of the whole process: one JSON document."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(command: str, *words: str, status: int = 0) -> dict[str, Any]:
        capfd.readouterr()
        assert main([command, "--engine", "vllm", *words, "--json"]) == status
        document = json.loads(capfd.readouterr().out)
        assert isinstance(document, dict)
        return document

    return run


def test_fused_parameters_are_explained_and_remembered(ask: Ask, tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"])
    first, again = (ask("layout", "--model", str(directory), "--tp", "2", "--rank", "1", "--probe")["ranks"][0] for _ in range(2))
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["regions"] == again["regions"]
    fused = [r for r in first["regions"] if r["parameter"] == "model.layers.0.self_attn.qkv_proj.weight"]
    assert [r["tensor"] for r in fused] == [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    assert [r["offset"] for r in fused] == [0, fused[0]["nbytes"], fused[0]["nbytes"] + fused[1]["nbytes"]]
    for rank in (first, again):
        assert rank["probe"]["agreed"] == rank["parameters"]
        assert rank["probe"]["post_processing"]["model.norm.weight"]["kind"] == "unchanged"


def test_post_processing_that_permutes_is_decoded(ask: Ask, tmp_path: Path) -> None:
    """vLLM's CPU backend tiles the experts' matrices; or leaves them as they are, on a host whose kernels want no tiles."""
    directory = write_family(tmp_path / "model", FAMILIES["qwen3-moe"], weights=False)
    words = ["--model", str(directory), "--tp", "2", "--ep", "2", "--rank", "0", "--layers", "1"]
    (rank,) = ask("layout", *words, "--probe")["ranks"]
    changed = {n: c for n, c in rank["probe"]["post_processing"].items() if n.endswith(("w13_weight", "w2_weight"))}
    assert len(changed) == 2
    for change in changed.values():
        assert change["kind"] in ("permuted", "unchanged")
        assert change["kind"] == "unchanged" or "boxes: model.layers.0.mlp.experts.0." in change["reason"]


def test_packed_weights_are_followed_number_by_number(ask: Ask, tmp_path: Path) -> None:
    """vLLM repacks AWQ for the kernel it has here: no 32-bit word survives, each 4-bit number does."""
    directory = write_family(tmp_path / "model", FAMILIES["llama-awq"])
    words = ["--model", str(directory), "--tp", "2", "--rank", "1", "--layers", "1", "--probe"]
    name = "model.layers.0.mlp.down_proj.qweight"
    (words_seen,), (numbers_seen,) = ask("layout", *words)["ranks"], ask("layout", *words, "--bits", "4")["ranks"]
    for rank in (words_seen, numbers_seen):
        assert rank["probe"]["agreed"] == rank["parameters"]
    if words_seen["probe"]["post_processing"][name]["kind"] == "unchanged":
        pytest.skip("this host's kernel takes AWQ as it is stored")
    assert words_seen["probe"]["post_processing"][name]["kind"] == "opaque"
    change = numbers_seen["probe"]["post_processing"][name]
    assert change["kind"] == "permuted"
    assert f"boxes of 4-bit units: {name}[256:512, 0:4]" in change["reason"]


def test_post_processing_that_this_host_lacks_is_said(ask: Ask, tmp_path: Path) -> None:
    """Per-tensor FP8 is requantized to one scale for what is fused: lossy where it can be done, which takes a GPU's kernels."""
    directory = write_family(tmp_path / "model", FAMILIES["llama-fp8-tensor"])
    (rank,) = ask("layout", "--model", str(directory), "--layers", "1", "--probe")["ranks"]
    assert rank["probe"]["agreed"] == rank["parameters"]
    if rank["probe"]["not_post_processed"]:
        assert "the engine's post-processing fails" in rank["probe"]["not_post_processed"]
        assert rank["probe"]["post_processing"] == {}
    else:
        assert rank["probe"]["post_processing"]["model.layers.0.self_attn.qkv_proj.weight"]["kind"] == "opaque"


def test_arguments_of_the_engine_are_passed_on(ask: Ask, tmp_path: Path) -> None:
    """A model that brings its configuration's code; each set of arguments is another answer."""
    directory = write_family(tmp_path / "model", FAMILIES["llama"])
    config = json.loads((directory / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (directory / "config.json").write_text(json.dumps({**config, **own}))
    code = "from transformers import LlamaConfig\n\n\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n"
    (directory / "configuration_mine.py").write_text(code)
    words, trust = ["--model", str(directory), "--tp", "2", "--rank", "1"], ["--engine-arg", "trust_remote_code=true"]
    refused = ask("layout", *words, status=3)
    assert "trust_remote_code=True" in refused["message"]
    assert "--engine-arg trust_remote_code=true" in refused["next_step"]
    assert [ask("layout", *words, *trust)["ranks"][0]["cached"] for _ in range(2)] == [False, True]
    other = ["--engine-arg", 'hf-overrides={"rope_theta": 20000.0}']
    assert ask("layout", *words, *trust, *other)["ranks"][0]["cached"] is False
    assert ask("plan", "--model", str(directory), "--from", "tp=2", "--to", "tp=1", *trust)["engine"] == "vllm"


@pytest.mark.parametrize(
    ("argument", "status", "problem", "next_step"),
    [
        ("trust_remote_cod=true", 2, "has no argument trust_remote_cod", "did you mean trust_remote_code?"),
        ("tensor_parallel_size=2", 2, "tensor_parallel_size is set by peerload itself", "say it with --tp"),
        ("quantization=fp8", 3, "it is quantized while it is loaded", "stored quantized"),
    ],
)
def test_arguments_that_do_not_work_are_said(
    ask: Ask, tmp_path: Path, argument: str, status: int, problem: str, next_step: str
) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"])
    document = ask("layout", "--model", str(directory), "--rank", "0", "--engine-arg", argument, status=status)
    assert problem in document["message"]
    assert next_step in document["next_step"]


def test_a_model_is_built_as_on_a_cuda_host(ask: Ask, tmp_path: Path) -> None:
    """The values of W4A16's `weight_shape` are computed: which tensors they are computed from is probed too."""
    family = compressed("llama", "w4a16")
    directory = write_family(tmp_path / "model", family)
    words = ["--model", str(directory), "--tp", "2", "--rank", "1", "--probe"]
    here, there = (ask("layout", *words, *more)["ranks"][0] for more in ([], ["--platform", "cuda"]))
    assert (here["cached"], there["cached"]) == (False, False)
    for rank in (here, there):
        assert rank["probe"]["agreed"] == rank["parameters"]
    assert here["regions"] == there["regions"]
    assert any(name.startswith("model.layers.0.self_attn.qkv_proj.weight_shape by vllm") for name in here["derived"])


def test_plans_are_made_of_its_layouts(ask: Ask, tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"], weights=False)
    document = ask(
        "plan", "--model", str(directory), "--from", "tp=4", "--to", "tp=2", "--tensors", "*.0.self_attn.k_proj.weight"
    )
    assert document["engine"] == "vllm"
    assert {c["from"] for c in document["copies"]} == {f"seed-0/rank {r}" for r in range(4)}


def test_what_vllm_cannot_split_is_said(ask: Ask, tmp_path: Path) -> None:
    directory = write_family(tmp_path / "model", FAMILIES["llama"], weights=False)
    document = ask("layout", "--model", str(directory), "--tp", "3", "--rank", "0", status=3)
    assert document["error"] == "LayoutError"
    assert "tp=3" in document["message"]
