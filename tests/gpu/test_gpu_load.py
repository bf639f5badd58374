"""Whole loads into GPU memory, out of seeds in another process: discover, plan, transfer, verify, commit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_seed import CONFIG, GpuRank, GpuSeeds
from gpu_support import needs_gpus

from peerload.config import Config
from peerload.coordinator.client import CoordinatorClient
from peerload.errors import PeerloadError, PlanError, VerifyError
from peerload.job.load import Job, load
from peerload.job.rank import Member, Rank
from peerload.memory.cuda import driver
from peerload.model.catalog import ModelKey, Parallel
from peerload.model.offer import Offer
from peerload.receipt import Receipt
from peerload.testing.instances import on_disk
from peerload.testing.layouts import layout, llama
from peerload.testing.layouts.presets import tiny_deepseek, tiny_qwen3_moe

pytestmark = needs_gpus()
MODEL = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)


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


def load_all(
    url: str, name: str, model, parallel: Parallel, config: Config = CONFIG, reserve: Sequence[Offer] = ()
) -> list[Receipt | PeerloadError]:
    """Every rank on a thread; receipts, the bytes having been compared, or errors."""
    gpus = driver.count()

    def one(number: int) -> Receipt | PeerloadError:
        with ExitStack() as stack:
            client = stack.enter_context(CoordinatorClient(url, timeout_s=5.0))
            mine = GpuRank(layout(model, parallel, number), f"cuda:{number % gpus}")
            stack.enter_context(closing(mine.arena))
            member = Member("target", number, parallel.tp * parallel.pp, name)
            regions, key = [mine.arena.region()], ModelKey(name, model.name)
            rank = Rank(key, mine.layout, mine.address, regions, member, config, client, mine.gpu)
            try:
                receipt = load(Job(rank, reserve))
            except PeerloadError as error:
                return error
            assert mine.differences(model, parallel) == []
            return receipt

    with ThreadPoolExecutor(parallel.tp * parallel.pp) as pool:
        return list(pool.map(one, range(parallel.tp * parallel.pp)))


def proven(results: list[Receipt | PeerloadError]) -> list[Receipt]:
    for result in results:
        assert isinstance(result, Receipt), result
        assert result.unverified_nbytes == 0
    return [r for r in results if isinstance(r, Receipt)]


@pytest.mark.parametrize(("there", "here"), [(2, 4), (4, 2), (1, 2), (2, 1), (2, 2), (3, 4)])
def test_any_tp_feeds_any_tp(url: str, there: int, here: int) -> None:
    name = f"tp-{there}-{here}"
    with GpuSeeds(url, name, MODEL, Parallel(tp=there), driver.count()):
        receipts = proven(load_all(url, name, MODEL, Parallel(tp=here)))
    assert all(r.overhead == 1.0 and r.verified_nbytes == r.needed_nbytes for r in receipts)


@pytest.mark.parametrize("model", [tiny_deepseek(), tiny_qwen3_moe()], ids=lambda m: m.name)
def test_experts_and_scale_blocks(url: str, model) -> None:
    with GpuSeeds(url, model.name, model, Parallel(tp=2, ep=2), driver.count()):
        proven(load_all(url, model.name, model, Parallel(tp=4)))


def test_what_no_seed_has_is_read_from_disk_onto_the_gpu(url: str, tmp_path: Path) -> None:
    config = CONFIG.replace(fallback="disk")
    receipts = proven_or_unverified(load_all(url, "disk", MODEL, Parallel(tp=2), config, [on_disk(MODEL, tmp_path)]))
    assert all(list(r.sources) == [f"{tmp_path}/rank 0"] for r in receipts)


def proven_or_unverified(results: list[Receipt | PeerloadError]) -> list[Receipt]:
    """A checkpoint on disk announces no digests."""
    assert all(isinstance(r, Receipt) for r in results), results
    return [r for r in results if isinstance(r, Receipt)]


def test_bytes_that_changed_silently_are_noticed(url: str) -> None:
    with GpuSeeds(url, "flip", MODEL, Parallel(tp=2), driver.count()) as seeds:
        seeds.ask("flip")
        results = load_all(url, "flip", MODEL, Parallel(tp=4))
    assert all(isinstance(r, VerifyError) for r in results), results


def test_a_seed_that_is_gone_leaves_the_disk(url: str, tmp_path: Path) -> None:
    with GpuSeeds(url, "killed", MODEL, Parallel(tp=2), driver.count()) as seeds:
        seeds.kill()
        config = replace(CONFIG, fallback="disk")
        receipts = proven_or_unverified(load_all(url, "killed", MODEL, Parallel(tp=2), config, [on_disk(MODEL, tmp_path)]))
    assert all(list(r.sources) == [f"{tmp_path}/rank 0"] for r in receipts)


def test_nobody_there_is_said(url: str) -> None:
    assert all(isinstance(r, PlanError) for r in load_all(url, "nobody", MODEL, Parallel(tp=2)))
