"""Instances of different engines load from each other: a vLLM out of a SGLang's memory, a SGLang out of that vLLM's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed here: ./dev engines makes an environment for it")

from engine import Sglang

from peerload.coordinator.server import serve
from peerload.testing.families import FAMILIES, write_family

ROOT = Path(__file__).parents[3]
#: Of the environment that has vLLM.
VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))


def vllm_instances() -> ModuleType:
    """tests/engines/vllm/engine.py, whose name is taken here."""
    spec = importlib.util.spec_from_file_location("vllm_engine", ROOT / "tests" / "engines" / "vllm" / "engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(log: str) -> set[str]:
    """Which instances, or the disk, bytes came from."""
    return {line.rpartition(" from ")[2] for line in log.splitlines() if "peerload: " in line and "B from " in line}


@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no environment with vLLM: ./dev engines makes .venv-vllm")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["llama-kv2"])
def test_sglang_feeds_vllm_and_back(tmp_path: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    instance = partial(vllm_instances().Vllm, python=str(VLLM_PYTHON))
    model = write_family(tmp_path / name, FAMILIES[name])
    with serve("127.0.0.1:0") as coordinator:
        # vLLM frees linear weights on a CPU once it has packed them: a seed there has to keep copies of all.
        config = {"url": coordinator.address, "retain_bytes": 1 << 30}
        with Sglang(model, 2, config) as first:
            assert {s.partition(":")[0] for s in sources(first.wait().log)} == {"disk"}
            expected = first.sha256(), first.tokens()
            with instance(model, 1, {**config, "fallback": "fail"}) as second:
                (fed,) = sources(second.wait().log)
                assert f"peerload: seed {fed} of" in first.log
                received = second.sha256(), second.tokens()
                first.kill()
                with Sglang(model, 2, {**config, "fallback": "fail", "source": False}) as third:
                    (fed,) = sources(third.wait().log)
                    assert f"peerload: seed {fed} of" in second.log
                    assert (third.sha256(), third.tokens()) == expected
    with instance(model, 1) as stock:
        stock.wait()
        assert received == (stock.sha256(), stock.tokens())
    record_property("cell", {"engine": "sglang to vllm", "family": name, "seed_tp": 2, "tp": 1})
    record_property("cell", {"engine": "vllm to sglang", "family": name, "seed_tp": 1, "tp": 2})
