"""`peerload plan` from configs alone, for every family: exact cover, told by the copies it lists; and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
distributed = pytest.importorskip("transformers.distributed")

from peerload.cli import main  # noqa: E402
from peerload.testing.checkpoints import Family, make_checkpoint, model_config  # noqa: E402

FAMILIES: tuple[Family, ...] = get_args(Family)
EXPERTS = ("mixtral", "qwen3_moe")
#: What transformers' plans replicate on every rank: norms and the routers of experts.
REPLICATED = ("norm", "mlp.gate.weight", "block_sparse_moe.gate.weight")
newer = pytest.mark.skipif(not hasattr(distributed.DistributedConfig, "ep_size"), reason="this transformers has no ep_size")
Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(model: Path, source: str, target: str, *words: str, status: int = 0) -> dict[str, Any]:
        arguments = ["plan", "--model", str(model), "--from", source, "--to", target, *words, "--json"]
        assert main(arguments) == status
        document = json.loads(capsys.readouterr().out)
        assert isinstance(document, dict)
        return document

    return run


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEERLOAD_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(tmp_path: Path, family: Family, **changes: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model_config(family, **changes)))
    return path


def parameter_nbytes(config: Path) -> int:
    values = json.loads(config.read_text())
    parsed = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    return sum(p.numel() for p in model.parameters()) * 2  # BF16


def replicated(name: str) -> bool:
    return any(word in name for word in REPLICATED)


def painted(copies: list[dict[str, Any]]) -> dict[str, dict[int, np.ndarray]]:
    """For each tensor and rank, how often each of its elements is read. A tensor ends where the last box does."""
    boxes: dict[str, list[tuple[int, list[tuple[int, int]]]]] = {}
    for copy in copies:
        ranges = [tuple(map(int, part.split(":"))) for part in copy["box"].strip("[]").split(", ")]
        boxes.setdefault(copy["tensor"], []).append((copy["rank"], ranges))  # type: ignore[arg-type]
    counts: dict[str, dict[int, np.ndarray]] = {}
    for name, rows in boxes.items():
        shape = np.max([[stop for _, stop in ranges] for _, ranges in rows], axis=0)
        for rank, ranges in rows:
            count = counts.setdefault(name, {}).setdefault(rank, np.zeros(shape, np.int64))
            count[tuple(slice(a, b) for a, b in ranges)] += 1
    return counts


def assert_exact(document: dict[str, Any], nbytes: int, ranks: int) -> dict[str, dict[int, np.ndarray]]:
    """Every element of the model is read by somebody, and by no rank twice; every number agrees with the list of copies."""
    counts = painted(document["copies"])
    assert document["nbytes"] == nbytes
    assert 2 * sum(next(iter(ranks.values())).size for ranks in counts.values()) == nbytes
    for name, by_rank in counts.items():
        assert max(count.max() for count in by_rank.values()) == 1, name
        assert np.all(sum(by_rank.values()) >= 1), name
    assert [r["rank"] for r in document["ranks"]] == list(range(ranks))
    for rank in document["ranks"]:
        mine = [c for c in document["copies"] if c["rank"] == rank["rank"]]
        from_whom: dict[str, int] = {}
        for copy in mine:
            from_whom[copy["from"]] = from_whom.get(copy["from"], 0) + copy["nbytes"]
        assert rank["from"] == from_whom
        assert rank["needed_nbytes"] == sum(from_whom.values())
        assert rank["copies"] == len(mine)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("source", "target"), [(2, 4), (4, 2), (1, 2)])
def test_every_family_is_planned_from_its_config(plan: Plan, tmp_path: Path, family: Family, source: int, target: int) -> None:
    config = write(tmp_path, family)
    document = plan(config, f"tp={source}", f"tp={target}", "--tensors", "*")
    counts = assert_exact(document, parameter_nbytes(config), target)
    assert {s["source"] for s in document["sources"]} == {f"seed-0/rank {r}" for r in range(source)}
    assert all(r["wire_nbytes"] == r["needed_nbytes"] for r in document["ranks"])
    for name, by_rank in counts.items():
        assert sorted(by_rank) == list(range(target)), name
        assert np.all(sum(by_rank.values()) == (target if replicated(name) else 1)), name


@newer
@pytest.mark.parametrize("family", EXPERTS)
def test_expert_parallel_ranks_hold_whole_experts(plan: Plan, tmp_path: Path, family: Family) -> None:
    config = write(tmp_path, family)
    document = plan(config, "tp=2", "tp=4,ep=4", "--tensors", "*")
    counts = assert_exact(document, parameter_nbytes(config), 4)
    experts = {name: by_rank for name, by_rank in counts.items() if ".experts." in name}
    assert experts
    assert all(len(by_rank) == 1 for by_rank in experts.values())
    assert {rank for by_rank in experts.values() for rank in by_rank} == {0, 1, 2, 3}


@newer
def test_pipeline_stages_hold_layers_of_their_own(plan: Plan, tmp_path: Path) -> None:
    config = write(tmp_path, "llama")
    counts = assert_exact(plan(config, "tp=2", "pp=2", "--tensors", "*"), parameter_nbytes(config), 2)
    assert all(len(by_rank) == 1 for by_rank in counts.values())
    assert {rank for name, by_rank in counts.items() if ".layers.0." in name for rank in by_rank} == {0}
    assert {rank for name, by_rank in counts.items() if ".layers.1." in name for rank in by_rank} == {1}


def test_a_checkpoint_is_a_source_too(plan: Plan, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    document = plan(directory, "disk", "tp=3", "--tensors", "*")
    assert_exact(document, parameter_nbytes(directory / "config.json"), 3)
    assert [s["source"] for s in document["sources"]] == ["disk:model/rank 0"]


def test_one_rank_of_several_seeds(plan: Plan, tmp_path: Path) -> None:
    config = write(tmp_path, "llama")
    document = plan(config, "tp=2", "tp=4", "--rank", "3", "--seeds", "3")
    (rank,) = document["ranks"]
    assert rank["rank"] == 3
    assert len({source.partition("/")[0] for source in rank["from"]}) == 3, "replicas share the work"


def test_staging_is_told(plan: Plan, tmp_path: Path) -> None:
    config = write(tmp_path, "llama")
    document = plan(config, "tp=2", "tp=4", "--transport", "nixl")
    assert all(r["wire_nbytes"] > r["needed_nbytes"] and r["staging_nbytes"] > 0 for r in document["ranks"])
    direct = plan(config, "tp=2", "tp=4", "--transport", "nixl", "--staging-bytes", "0")
    assert all(r["wire_nbytes"] == r["needed_nbytes"] and r["staging_nbytes"] == 0 for r in direct["ranks"])
    assert direct["ranks"][0]["operations"] > document["ranks"][0]["operations"]


def test_holes_are_named(plan: Plan, tmp_path: Path) -> None:
    config = write(tmp_path, "llama")
    document = plan(config, "tp=2", "tp=3", "--lost", "1", status=3)
    assert (document["error"], document["exit_code"]) == ("PlanError", 3)
    rows = json.loads(config.read_text())["vocab_size"]
    half, two_thirds = len(torch.chunk(torch.empty(rows), 2)[0]), 2 * len(torch.chunk(torch.empty(rows), 3)[0])
    wanted = {"tensor": "model.embed_tokens.weight", "rank": 1, "box": f"[{half}:{two_thirds}, 0:96]"}
    assert {k: document["holes"][0][k] for k in wanted} == wanted


def test_refusals_are_named(plan: Plan, tmp_path: Path) -> None:
    config = write(tmp_path, "llama")
    document = plan(config, "tp=2", "tp=4", "--match", "same-parallelism", status=3)
    assert [r["source"] for r in document["refusals"]] == ["seed-0/rank 0", "seed-0/rank 1"]
    assert "match=same-parallelism" in document["refusals"][0]["reason"]
    twins = plan(config, "tp=2", "tp=2", "--match", "same-parallelism", "--tensors", "*_proj.weight")
    assert twins["copies"]
    assert all(c["from"] == f"seed-0/rank {c['rank']}" for c in twins["copies"])


@pytest.mark.parametrize(
    ("source", "target", "status", "problem"),
    [
        pytest.param("tp=2", "tp=2,ep=2", 3, "LlamaForCausalLM at tp=2,ep=2: transformers fails: .* no `ep_plan`", marks=newer),
        pytest.param("tp=2", "tp=2,pp=2", 3, "can't split the layers of a pipeline stage by tensor parallelism", marks=newer),
        ("tp=2", "tp=4,dp=2", 2, "is no parallel layout"),
        ("disk", "tp=2", 2, "no directory with safetensors"),
    ],
)
def test_what_the_engine_cannot_do_is_said(
    plan: Plan, tmp_path: Path, source: str, target: str, status: int, problem: str
) -> None:
    document = plan(write(tmp_path, "llama"), source, target, status=status)
    assert document["exit_code"] == status
    assert re.search(problem, document["message"]), document["message"]


def test_people_see_who_reads_what_from_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, "llama")
    assert main(["plan", "--model", str(config), "--from", "tp=2", "--to", "tp=4", "--tensors", "*.0.mlp.down_proj.*"]) == 0
    told = capsys.readouterr().out
    assert "no holes: every byte is written exactly once" in told
    assert "seed-0/rank 1" in told
    assert told.count("model.layers.0.mlp.down_proj.weight") == 4
