"""The wheel, as somebody gets it who has no checkout: built from the sources, installed with its declared dependencies into a
fresh environment, and run from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


def run(*words: object, cwd: Path, status: int = 0) -> str:
    """Standard output of a command that hears nothing of this checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PEERLOAD_CONFIG")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == status, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """A wheel, and an environment with it and what it declares. room: a folder outside the checkout."""

    wheel: Path
    room: Path

    def python(self, *words: object) -> str:
        return run(self.room / "venv" / "bin" / "python", *words, cwd=self.room)

    def peerload(self, *words: object, status: int = 0) -> str:
        return run(self.room / "venv" / "bin" / "peerload", *words, cwd=self.room, status=status)

    def install(self, extra: str = "") -> None:
        self.python("-m", "pip", "install", "-qq", "--constraint", ROOT / "constraints.txt", f"{self.wheel}{extra}")


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    with tempfile.TemporaryDirectory(prefix="peerload-wheel-") as folder:
        room = Path(folder)
        sources = room / "sources"
        compiled = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", sources / "src", ignore=compiled)
        for name in SOURCES:
            shutil.copy(ROOT / name, sources / name)
        run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", room, sources, cwd=room)
        (wheel,) = room.glob("*.whl")
        shutil.rmtree(sources)
        venv.create(room / "venv", with_pip=True)
        made = Installed(wheel, room)
        made.install()
        yield made


def test_it_is_for_every_python_from_3_11_on(installed: Installed) -> None:
    assert "-cp311-abi3-linux_" in installed.wheel.name
    with zipfile.ZipFile(installed.wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert "peerload/native/_lib.abi3.so" in names
    wanted = {"memory/cuda/kernels.cu", "bench/transport.py", "coordinator/_generated/peerload_pb2.py"}
    assert {f"peerload/{name}" for name in wanted} <= set(names)
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert {n.partition("/")[0] for n in names} == {"peerload", f"{installed.wheel.name.split('-cp')[0]}.dist-info"}
    assert "License-Expression: Apache-2.0" in metadata


def test_it_needs_no_engine_to_look_around(installed: Installed) -> None:
    home = installed.python("-c", "import peerload; print(peerload.__file__)").strip()
    assert home.startswith(str(installed.room))
    assert "peerload demo" in installed.peerload("--help")
    found: dict[str, Any] = json.loads(installed.peerload("doctor", "--fast", "--json"))
    assert "local" in found["transports"]
    planned = json.loads(installed.peerload("bench", "--json", "plan", "--", "--runs", 1, "--case", "llama-70b fp8 tp2 -> tp4"))
    assert planned["case"] == "llama-70b fp8 tp2 -> tp4"


def test_the_demo_runs_with_the_extra_that_it_names(installed: Installed) -> None:
    refused = json.loads(installed.peerload("demo", "--json", status=2))
    assert refused["next_step"] == "pip install 'peerload[transformers]'"
    installed.install("[transformers]")
    shown = json.loads(installed.peerload("demo", "--json"))
    assert shown["ok"]
    assert (shown["seed_tp"], shown["target_tp"], shown["differing"]) == (2, 4, [])
