"""Loads between real processes: which sources, however they register, over what transport, in how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, good, needs_nixl, only, seed, target

from peerload.coordinator.client import CoordinatorClient
from peerload.engines.bare import BareRank
from peerload.errors import PlanError
from peerload.job import exchange
from peerload.job.rank import Member, kept_open
from peerload.job.seed import Seed
from peerload.model.catalog import ModelKey, Parallel
from peerload.testing.instances import CONFIG, SeedProcess, load_ranks, on_disk
from peerload.testing.layouts import layout, llama
from peerload.transport.base import Limits, Transport
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.local import LocalTransport

pytestmark = pytest.mark.e2e


class TestChoosingSources:
    def test_same_parallelism_refuses_another_and_says_so(self, url: str) -> None:
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2))):
            life = target(url, 4, ranks=(0,), config=CONFIG.replace(match="same-parallelism"))
            error = only(load_ranks(life, size=1), PlanError)
        assert "a/rank 0: is tp=2, this instance tp=4, and match=same-parallelism" in str(error)

    def test_same_parallelism_goes_to_disk(self, url: str, tmp_path: Path) -> None:
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2))):
            life = target(url, 4, config=CONFIG.replace(match="same-parallelism", fallback="disk"))
            good(results := load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))
        for result in results:
            assert result.receipt is not None
            assert list(result.receipt.sources) == [f"{tmp_path}/rank 0"]

    def test_same_parallelism_takes_a_twin(self, url: str) -> None:
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2))), SeedProcess(seed(url, "b", parallel=Parallel(tp=4))):
            good(results := load_ranks(target(url, 4, config=CONFIG.replace(match="same-parallelism"))))
        for result in results:
            assert result.receipt is not None
            assert all(name.startswith("b/") for name in result.receipt.sources)

    def test_seeds_of_two_layouts_at_once(self, url: str) -> None:
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2))), SeedProcess(seed(url, "b", parallel=Parallel(tp=4))):
            good(results := load_ranks(target(url, 3)))
        names = {name.split("/")[0] for r in results if r.receipt is not None for name in r.receipt.sources}
        assert names == {"a", "b"}
        assert all(r.receipt is not None and r.receipt.overhead == 1.0 for r in results)

    def test_three_equal_seeds_share_evenly(self, url: str) -> None:
        with ExitStack() as stack:
            for name in "abc":
                stack.enter_context(SeedProcess(seed(url, name)))
            good(results := load_ranks(target(url)))
        receipt = results[0].receipt
        assert receipt is not None
        given = [read.nbytes for read in receipt.sources.values()]
        assert len(given) == 3
        assert max(given) - min(given) < 0.1 * receipt.needed_nbytes

    @pytest.mark.parametrize("transport", ["local", pytest.param("nixl", marks=needs_nixl)])
    @pytest.mark.parametrize(
        ("registration", "memory"),
        [("per-tensor", "arena"), ("per-tensor", "plain"), ("per-allocation", "blocks"), ("arena", "plain")],
    )
    def test_every_way_to_register(self, url: str, transport: str, registration: str, memory: str) -> None:
        config = CONFIG.replace(transport=transport, interface="lo", registration=registration)
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2), memory=memory, config=config)):
            good(load_ranks(target(url, 3, config=config)))
            good(load_ranks(target(url, 2, config=config)))


def only_runs(_rank: int, transport: Transport) -> Transport:
    """As a network that knows no strides."""
    runs = Faulty(transport, Faults())
    runs.limits = Limits(strided=False, operation_nbytes=16 << 10, max_batch_nbytes=1 << 20)
    return runs


class TestStaging:
    def test_rows_cut_in_two_are_pulled_whole_and_scattered_here(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            config = CONFIG.replace(staging_bytes=1 << 20)
            good(results := load_ranks(target(url, 4, config=config), wrap=only_runs))
        for result in results:
            assert result.receipt is not None
            assert 0 < result.receipt.staging_nbytes <= (1 << 20) // 4
            assert 1.0 < result.receipt.overhead < 4.0
            assert sum(r.nbytes for r in result.receipt.sources.values()) == result.receipt.needed_nbytes

    def test_without_staging_memory_every_run_is_read_by_itself(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            good(results := load_ranks(target(url, 4, config=CONFIG.replace(staging_bytes=0)), wrap=only_runs))
        assert all(r.receipt is not None and r.receipt.overhead == 1.0 and r.receipt.staging_nbytes == 0 for r in results)

    @needs_nixl
    def test_over_nixl(self, url: str) -> None:
        config = CONFIG.replace(transport="nixl", interface="lo", staging_bytes=1 << 20)
        with SeedProcess(seed(url, "a", config=config)):
            good(results := load_ranks(target(url, 4, config=config)))
        assert all(r.receipt is not None and r.receipt.staging_nbytes <= (1 << 20) // 4 for r in results)


class TestSize:
    def test_measurements_larger_than_a_message_go_in_parts(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "PART_NBYTES", 100)
        with SeedProcess(seed(url, "a")):
            good(results := load_ranks(target(url, 3)))
        assert len({r.receipt.digest for r in results if r.receipt is not None}) == 1
        assert all(r.receipt is not None and r.receipt.verified_nbytes == r.receipt.needed_nbytes for r in results)

    @pytest.mark.parametrize("staging_nbytes", [0, 32 << 20])
    def test_a_target_needs_memory_for_its_weights_and_its_staging(self, url: str, staging_nbytes: int) -> None:
        """270 MB; for a transport without strides a TP2 target, half of whose weights are cut rows."""
        made = layout(LARGE)
        bare = BareRank.of(made)
        with closing(bare.arena), closing(LocalTransport(2)) as local, CoordinatorClient(url) as client:
            view = np.frombuffer(bare.arena.view(bare.arena.address + 4096, bare.arena.used_nbytes - 4096), np.uint8)
            view[:] = np.random.default_rng(0).integers(0, 256, view.size, np.uint8)
            local.register([bare.arena.region()])
            key = ModelKey("synthetic", "large")
            with Seed(bare.rank(key, Member("seed"), CONFIG, client, kept_open({"local": local}))):
                command = [sys.executable, "-c", MEASURE, url, str(staging_nbytes)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        told = json.loads(done.stdout)
        assert told["needed"] > (120e6 if staging_nbytes else 240e6)
        assert (
            told["verified"] < 1e5 if staging_nbytes else told["verified"] == told["needed"]
        )  # half an instance proves norms only
        assert told["staging"] <= staging_nbytes // 4
        assert bool(told["staging"]) == bool(staging_nbytes)
        assert told["peak"] <= told["needed"] + staging_nbytes + 32e6


LARGE = llama(name="large", hidden=1024, inter=4096, heads=8, kv_heads=8, head=128, layers=7, vocabulary=8000)
#: Loads it in a fresh process and says how much memory that took, bytes: peak resident set, less what it was before.
MEASURE = """
import json, sys
from contextlib import closing
from pathlib import Path
from peerload.job import exchange
from peerload.engines.bare import BareRank
from peerload.config import Config
from peerload.job.load import Job, load
from peerload.job.rank import Member, kept_open
from peerload.model.catalog import ModelKey, Parallel
from peerload.coordinator.client import CoordinatorClient
from peerload.testing.layouts import layout, llama
from peerload.transport.base import Limits
from peerload.transport.local import LocalTransport
def status(field):
    return next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
staging = int(sys.argv[2])
model = llama(name="large", hidden=1024, inter=4096, heads=8, kv_heads=8, head=128, layers=7, vocabulary=8000)
bare = BareRank.of(layout(model, Parallel(tp=2 if staging else 1), 0))
with closing(LocalTransport(2)) as local, CoordinatorClient(sys.argv[1]) as client:
    if staging:
        local.limits = Limits(strided=False, operation_nbytes=16 << 10, max_batch_nbytes=256 << 20)
    client.status()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    config = Config(fallback="fail", staging_bytes=staging)
    rank = bare.rank(ModelKey("synthetic", "large"), Member("target"), config, client, kept_open({"local": local}))
    receipt = load(Job(rank))
    print(json.dumps({"peak": status("VmHWM") - before, "needed": receipt.needed_nbytes, "verified": receipt.verified_nbytes,
                      "staging": receipt.staging_nbytes}))
"""
