"""`peerload layout` under transformers: what it prints is where the weights are, checked by a probe, and remembered."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from peerload.cli import main  # noqa: E402
from peerload.engines.checkpoint import Checkpoint  # noqa: E402
from peerload.engines.transformers import open as adapter  # noqa: E402
from peerload.testing.checkpoints import Family, make_checkpoint, model_config  # noqa: E402

FAMILIES: tuple[Family, ...] = get_args(Family)
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEERLOAD_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(model: Path, *words: str, status: int = 0, engine: str = "transformers") -> dict[str, Any]:
        assert main(["layout", "--engine", engine, "--model", str(model), *words, "--json"]) == status
        document = json.loads(capsys.readouterr().out)
        assert isinstance(document, dict)
        return document

    return run


def write(tmp_path: Path, family: Family = "llama", **changes: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model_config(family, **changes)))
    return path


def boxed(text: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in text.strip("[]").split(", ") if part)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_is_what_a_real_load_does(ask: Ask, tmp_path: Path, family: Family) -> None:
    document = ask(write(tmp_path, family), "--tp", "2", "--probe")
    assert [r["rank"] for r in document["ranks"]] == [0, 1]
    for rank in document["ranks"]:
        assert rank["probe"]["agreed"] == rank["parameters"] > 0
        assert rank["probe"]["differences"] == []


def test_regions_are_where_the_weights_are(ask: Ask, tmp_path: Path) -> None:
    """A rank's parameters put together from the printed regions and the checkpoint are those of a real load."""
    directory = make_checkpoint(tmp_path / "model", "mixtral")
    checkpoint = Checkpoint.open(directory)
    document = ask(directory)
    model = adapter.parameters_of(adapter.stock_model(directory))
    words = {s.spec.name: stored(checkpoint, s.spec.name) for s in checkpoint.tensors}
    built = {name: np.zeros(t.nbytes, np.uint8) for name, t in model.items() if isinstance(t, torch.nn.Parameter)}
    (rank,) = document["ranks"]
    for region in rank["regions"]:
        part = words[region["tensor"]][boxed(region["box"])]
        into = np.ndarray(part.shape, np.uint16, built[region["parameter"]].data, region["offset"], region["strides"])
        assert region["nbytes"] == part.nbytes
        into[...] = part
    for name, content in built.items():
        assert content.tobytes() == model[name].detach().contiguous().view(torch.uint8).numpy().tobytes(), name


def stored(checkpoint: Checkpoint, name: str) -> np.ndarray:
    found = next(t for t in checkpoint.tensors if t.spec.name == name)
    offset = int(checkpoint.data_offset[found.file]) + found.offset
    return np.memmap(checkpoint.files.path[found.file], np.uint16, "r", offset, found.spec.shape)


def test_an_answer_is_remembered(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path)
    first = ask(config, "--tp", "2")
    again = ask(config, "--tp", "2")
    folder = tmp_path / "cache" / "peerload" / "layouts"
    assert len(list(folder.iterdir())) == 2
    assert [[r["cached"] for r in d["ranks"]] for d in (first, again)] == [[False] * 2, [True] * 2]
    for before, after in zip(first["ranks"], again["ranks"], strict=True):
        assert {**before, "cached": 0, "seconds": 0} == {**after, "cached": 0, "seconds": 0}
    victim = sorted(folder.iterdir())[0]
    victim.write_text(victim.read_text().replace("self_attn", "other_attn"))
    assert ask(config, "--tp", "2", "--rank", "0")["ranks"][0]["cached"] is False
    assert ask(config, "--tp", "2", "--rank", "0")["ranks"][0]["cached"] is True
    assert ask(config, "--tp", "2", "--cache", "off")["ranks"][0]["cached"] is False
    assert ask(config, "--tp", "2", "--cache", str(tmp_path / "mine"))["ranks"][0]["cached"] is False
    assert len(list((tmp_path / "mine").iterdir())) == 2
    # Another model is another answer.
    assert ask(write(tmp_path, "llama", vocab_size=508), "--tp", "2")["ranks"][0]["cached"] is False


def test_plans_remember_too(ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    ask(config, "--tp", "2")
    words = ["plan", "--engine", "transformers", "--model", str(config), "--from", "tp=2", "--to", "tp=4", "--json"]
    documents = []
    for _ in range(2):
        assert main(words) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert len(list((tmp_path / "cache" / "peerload" / "layouts").iterdir())) == 6
    timeless = [[{k: v for k, v in r.items() if not k.endswith("_s")} for r in d["ranks"]] for d in documents]
    assert timeless[0] == timeless[1]


def test_a_model_is_cut_down(ask: Ask, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    one, both = (ask(directory, *words, "--probe")["ranks"][0] for words in (["--layers", "1"], []))
    assert one["probe"]["agreed"] == one["parameters"]
    assert {r["parameter"] for r in both["regions"]} - {r["parameter"] for r in one["regions"]} == {
        r["parameter"] for r in both["regions"] if ".layers.1." in r["parameter"]
    }
    assert "--layers is 3, the model has 2" in ask(directory, "--layers", "3", status=2)["message"]


def test_a_difference_ends_it(ask: Ask, tmp_path: Path) -> None:
    """A layout that was true of another load: q and k of one layer exchanged in the cached file, its digest made to fit."""
    config = write(tmp_path, num_key_value_heads=24)
    ask(config)
    (path,) = (tmp_path / "cache" / "peerload" / "layouts").iterdir()
    head, body = path.read_text().splitlines()
    found = json.loads(body)
    rows = {n: found["tensors"][0].index(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qk"}
    swapped = {rows["q"]: rows["k"], rows["k"]: rows["q"]}
    found["pieces"]["tensor"] = [swapped.get(row, row) for row in found["pieces"]["tensor"]]
    body = json.dumps(found)
    path.write_text(json.dumps({**json.loads(head), "sha256": hashlib.sha256(body.encode()).hexdigest()}) + f"\n{body}\n")
    document = ask(config, "--probe", status=3)
    assert (document["error"], document["exit_code"]) == ("LayoutError", 3)
    assert "trace and probe differ in 2 places" in document["message"]
    name = "model.layers.0.self_attn.{}_proj.weight"
    for mine, other in (("q", "k"), ("k", "q")):
        told = f"rank 0: {name.format(mine)}: 18432 of 18432 elements differ, first 0 (in memory order): "
        told += f"the layout says {name.format(other)}[0, 0], the probe {name.format(mine)}[0, 0]"
        assert told in document["message"]


def test_people_see_regions_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, tie_word_embeddings=True)
    words = ["layout", "--engine", "transformers", "--model", str(config), "--tp", "2", "--rank", "1", "--probe"]
    assert main([*words, "--tensors", "*.0.mlp.down_proj.*"]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "down_proj" in line)
    assert row.split() == [
        "model.layers.0.mlp.down_proj.weight",
        "0",
        "13,248",
        "model.layers.0.mlp.down_proj.weight",
        "[0:96,",
        "70:139]",
        "138,",
        "2",
    ]
    assert "tied: lm_head.weight is model.embed_tokens.weight" in told
    assert "pieces, 0 constants; derived in" in told
    assert "trace == probe on 20 of 20 parameters" in told


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        (["--rank", "2", "--tp", "2"], 2, "--rank is 2, tp=2 has ranks 0 to 1"),
        (["--tp", "0"], 2, "must be at least 1"),
        (["--tensors", "nothing"], 2, "no parameter or tensor is like 'nothing'"),
        (["--layers", "0"], 2, "--layers is 0, the model has 2"),
        (["--tp", "2", "--ep", "2"], 3, "ep"),
    ],
)
def test_what_cannot_be_asked_is_said(ask: Ask, tmp_path: Path, words: list[str], status: int, problem: str) -> None:
    document = ask(write(tmp_path), *words, status=status)
    assert document["exit_code"] == status
    assert problem in document["message"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_is_not_here_is_named(ask: Ask, tmp_path: Path, engine: str) -> None:
    if importlib.util.find_spec(engine) is not None:
        pytest.skip(f"{engine} is installed here")
    document = ask(write(tmp_path), engine=engine, status=2)
    assert document["error"] == "ConfigError"
    assert f"{engine} is not installed in this environment" in document["message"]
    assert f".venv-{engine}" in document["next_step"]


@pytest.mark.parametrize(
    ("files", "problem", "next_step"),
    [
        (["config.json", "pytorch_model-1-of-2.bin"], "no safetensors file, but pytorch_model-1", "save_pretrained"),
        (["config.json", "model-q4.gguf"], "holds no safetensors file, but model-q4.gguf", "GGUF is not supported"),
        (
            ["params.json", "consolidated.safetensors"],
            "no config.json, but consolidated.safetensors, and params.json: Mistral",
            "Hugging Face's format",
        ),
        (["config.json", "params.json", "consolidated.safetensors"], "neither model.safetensors nor", "Hugging Face's format"),
    ],
)
def test_weights_in_another_format_are_refused(ask: Ask, tmp_path: Path, files: list[str], problem: str, next_step: str) -> None:
    """Their layout would be one of files that aren't there."""
    (tmp_path / "model").mkdir()
    for name in files:
        (tmp_path / "model" / name).write_text(json.dumps(model_config("llama")) if name == "config.json" else "")
    document = ask(tmp_path / "model", status=2)
    assert document["error"] == "ConfigError"
    assert problem in document["message"]
    assert next_step in document["next_step"]


def test_files_that_are_no_weights_are_no_format(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_text("")
    write(tmp_path)
    assert len(ask(tmp_path)["ranks"]) == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--engine-arg", "trust_remote_code=true"], "transformers has no arguments that change a layout"),
        (["--engine-arg", "trust_remote_code"], "must be KEY=VALUE"),
        (["--platform", "cuda"], "transformers's layouts are those of this host's platform"),
    ],
)
def test_options_of_other_engines_are_refused(ask: Ask, tmp_path: Path, words: list[str], problem: str) -> None:
    assert problem in ask(write(tmp_path), *words, status=2)["message"]


def test_no_model_is_said(ask: Ask, tmp_path: Path) -> None:
    assert "no such model directory" in ask(tmp_path / "nowhere", status=2)["message"]
    assert "has no config.json" in ask(tmp_path, status=2)["message"]
