"""The main job as a user runs it: `peerload demo`, real processes and a real engine, for every pair that was promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peerload.testing.checkpoints import make_checkpoint

pytestmark = pytest.mark.e2e

#: Beyond a rank's own weights, the peak of a load may grow by the staging bound.
STAGING_NBYTES = 256 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("demo") / "llama", "llama", "demo")


def demo(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "peerload", "demo", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(done.stdout)  # exactly one document
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(("seed_tp", "target_tp"), [(2, 4), (4, 2), (1, 2), (2, 1), (2, 3), (1, 4)])
def test_target_equals_the_disk_baseline(model: Path, seed_tp: int, target_tp: int) -> None:
    story = demo("--model", str(model), "--seed-tp", str(seed_tp), "--target-tp", str(target_tp))
    assert story["ok"] is True
    assert story["tokens_equal"] is True
    assert story["differing"] == []
    ranks = story["ranks"]
    assert len(ranks) == target_tp
    for rank in ranks:
        receipt = rank["receipt"]
        assert all(name.startswith("seed/") for name in receipt["sources"]), "no byte may come from disk"
        assert receipt["wire_nbytes"] == receipt["needed_nbytes"] == rank["held_nbytes"]
        assert receipt["verified_nbytes"] == receipt["needed_nbytes"]
        assert rank["rss_peak"] - rank["rss_before"] <= rank["held_nbytes"] + STAGING_NBYTES
    assert len({rank["receipt"]["digest"] for rank in ranks}) == 1


def test_demo_over_nixl(model: Path) -> None:
    pytest.importorskip("nixl_cu12", reason="the extra 'nixl' is not installed")
    story = demo("--model", str(model), "--transport", "nixl", "--interface", "lo")
    assert story["ok"] is True
    assert all(rank["receipt"]["verified_nbytes"] == rank["receipt"]["needed_nbytes"] for rank in story["ranks"])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Experts that the engine stacks, per-head norms: the same planner, no rule of its own."""
    directory = make_checkpoint(tmp_path / family, family, "tiny")
    story = demo("--model", str(directory), "--seed-tp", "2", "--target-tp", "4")
    assert story["ok"] is True
