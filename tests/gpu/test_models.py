"""`peerload.load` and `peerload.seed` of transformers models in GPU memory, compared with the engine's own load byte by byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_support import needs_gpus

pytest.importorskip("transformers.distributed")

from peerload.testing.families import FAMILIES, write_family
from peerload.testing.models import RankProcesses, Spec, check, halved, load, offer, results

pytestmark = needs_gpus()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    code = (
        "from peerload.coordinator.server import serve; "
        "c = serve('127.0.0.1:0', 'memory'); print(c.address, flush=True); c.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield running.stdout.readline().strip()
        running.kill()


def spec_of(family: str, directory: Path, url: str, **changes: object) -> Spec:
    config = {"url": url, "fallback": "fail", "revision": f"{directory.name}-1"}
    return Spec(
        directory=write_family(directory, FAMILIES[family]), config=config, device="cuda", keep="fp8" in family, **changes
    )


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "llama-fp8-block"])
def test_one_gpu(url: str, tmp_path: Path, family: str) -> None:
    """Two processes of one GPU, by torch's own allocations."""
    spec = spec_of(family, tmp_path, url)
    with RankProcesses(offer, spec) as seed:
        seed.hear()
        check(results(load, spec))
        if not spec.keep:
            seed.ask("halve")
            check(results(halved, spec))


def test_from_disk(url: str, tmp_path: Path) -> None:
    spec = spec_of("llama", tmp_path, url)
    check(results(load, replace(spec, config={"url": url})), disk=True)


@needs_gpus(2)
@pytest.mark.parametrize("how", ["tp", "fsdp"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_two_gpus(url: str, tmp_path: Path, family: str, how: str) -> None:
    """Split by transformers and by a trainer, to one GPU and back."""
    spec = spec_of(family, tmp_path, url)
    with RankProcesses(offer, replace(spec, how=how, size=2)) as seed:
        seed.hear()
        check(results(load, spec))
    with RankProcesses(offer, spec) as seed:
        seed.hear()
        check(results(load, replace(spec, how=how, size=2)))
