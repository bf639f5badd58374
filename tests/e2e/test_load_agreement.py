"""All ranks load or none does: ranks that die, a coordinator that goes away, waiting and deadlines."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MODEL, NAME, Slow, coordinator_process, faulty, good, only, seed, target

from peerload.errors import CommitError, CoordinatorError, DeadlineExceeded
from peerload.manifest import Parallel
from peerload.testing.instances import CONFIG, SeedProcess, TargetProcess, load_ranks, on_disk
from peerload.transport.faulty import Faults

pytestmark = pytest.mark.e2e


class TestAllOrNone:
    def test_a_rank_killed_before_it_commits_is_named_at_the_deadline(self, url: str) -> None:
        launch = {"launch": "one", "config": CONFIG.replace(deadline_s=4.0)}
        with SeedProcess(seed(url, "a")), TargetProcess(target(url, 2, ranks=(1,), **launch), stall=True) as lost:
            begun_s = time.monotonic()
            threading.Thread(target=lambda: (lost.hear(), lost.kill())).start()
            (result,) = load_ranks(target(url, 2, ranks=(0,), **launch))
        assert isinstance(result.error, DeadlineExceeded), result.error
        assert "rank 1 of 2 did not vote in time" in str(result.error)
        assert 3.5 < time.monotonic() - begun_s < 8

    def test_a_rank_that_fails_tells_the_others_at_once(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):

            def broken(_done: int) -> None:
                raise RuntimeError("out of luck")

            results = load_ranks(target(url, 4), on_bytes=lambda rank, done, _: broken(done) if rank == 2 else None)
        assert max(r.seconds for r in results) < 5
        assert isinstance(results[2].error, RuntimeError)
        for result in (results[0], results[1], results[3]):
            assert isinstance(result.error, CommitError), result.error
            assert "rank 2 aborted: RuntimeError: out of luck" in str(result.error)

    def test_ctrl_c_ends_a_load_at_once_and_the_others_hear_of_it(self, url: str) -> None:
        launch = {"launch": "two"}
        code = CTRL_C.format(url=url, name=NAME[-1])
        command = [sys.executable, "-c", code]
        with SeedProcess(seed(url, "a")), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
            assert one.stdout is not None
            assert one.stdout.readline() == "begun\n"
            threading.Timer(0.5, one.send_signal, [signal.SIGINT]).start()
            (result,) = load_ranks(target(url, 2, ranks=(0,), **launch))
            said = one.communicate(timeout=10)[0]
        assert said.startswith("KeyboardInterrupt")
        assert float(said.split()[1]) < 3
        assert isinstance(result.error, CommitError), result.error
        assert "rank 1 aborted: KeyboardInterrupt" in str(result.error)
        assert result.seconds < 8

    def test_a_rank_of_another_size_is_refused(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            results = load_ranks(target(url, 2, ranks=(0,)), size=1)
            good(results)


#: Rank 1 of a TP2 target on the main thread, over a source that takes a second for each read.
CTRL_C = """
import time
from contextlib import closing
from peerload.bare import BareRank
from peerload.config import Config
from peerload.load import Job, Member, load
from peerload.manifest import ModelKey, Parallel
from peerload.rpc.client import CoordinatorClient
from peerload.testing.layouts import layout, llama
from peerload.transport.base import Limits
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.local import LocalTransport
model = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)
bare = BareRank.of(layout(model, Parallel(tp=2), 1))
with closing(Faulty(LocalTransport(1), Faults(delay_s=0.5))) as local, CoordinatorClient("{url}") as client:
    local.limits = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=64 << 10)
    print("begun", flush=True)
    begun = time.monotonic()
    try:
        load(Job(ModelKey("{name}", "small"), bare.layout, bare.address, bare.regions("arena"), Member("target", 1, 2, "two"),
                 {{"local": local}}, Config(fallback="fail", deadline_s=30.0), coordinator=client))
    except KeyboardInterrupt as error:
        print("KeyboardInterrupt", time.monotonic() - begun, flush=True)
"""


class TestCoordinator:
    @pytest.mark.parametrize("store", ["memory", "sqlite"])
    def test_it_restarts_and_seeds_announce_themselves_again(self, store: str, tmp_path: Path) -> None:
        where = "memory" if store == "memory" else f"sqlite:{tmp_path}/db"
        with ExitStack() as stack:
            first, url = stack.enter_context(coordinator_process(where))
            running = stack.enter_context(SeedProcess(seed(url, "a", parallel=Parallel(tp=2), ttl_s=1.5)))
            first.kill()
            first.wait()
            time.sleep(1.0)  # at least one heartbeat fails
            stack.enter_context(coordinator_process(where, url))
            good(load_ranks(target(url, 4, config=CONFIG.replace(wait_s=10.0))))
            good(load_ranks(target(url, 1)))
            running.ask("leave")

    def test_it_restarts_while_bytes_move(self, tmp_path: Path) -> None:
        where = f"sqlite:{tmp_path}/db"
        with ExitStack() as stack:
            first, url = stack.enter_context(coordinator_process(where))
            stack.enter_context(SeedProcess(seed(url, "a")))

            def restart() -> None:
                first.kill()
                first.wait()
                stack.enter_context(coordinator_process(where, url))

            again = Slow("a/", 20, restart)
            good(load_ranks(target(url, 2), wrap=lambda r, t: again(r, t) if r == 0 else t))
            assert again.happened.is_set()

    def test_it_is_down(self) -> None:
        with coordinator_process() as (process, url):
            process.kill()
        error = only(load_ranks(target(url)), CoordinatorError)
        assert f"coordinator {url} can't be reached" in str(error)
        assert "is `peerload coordinator` running there" in str(error)

    def test_it_dies_before_the_commit(self) -> None:
        with coordinator_process() as (process, url), SeedProcess(seed(url, "a")):
            kill = Slow("a/", 20, process.kill)
            life = target(url, 2, config=CONFIG.replace(deadline_s=4.0))
            results = load_ranks(life, wrap=lambda r, t: kill(r, t) if r == 0 else t)
        for result in results:
            assert isinstance(result.error, CoordinatorError | DeadlineExceeded), result.error
            assert url in str(result.error)
            assert result.seconds < 15


class TestWaiting:
    def test_a_target_waits_for_a_seed_that_comes_later(self, url: str) -> None:
        with ExitStack() as stack:
            later = threading.Timer(1.0, lambda: stack.enter_context(SeedProcess(seed(url, "a"))))
            later.start()
            good(results := load_ranks(target(url, config=CONFIG.replace(wait_s=15.0))))
            later.join()
        assert 1.0 < results[0].seconds < 10

    def test_half_a_seed_is_not_enough(self, url: str) -> None:
        with ExitStack() as stack:
            half = {"parallel": Parallel(tp=2)}
            stack.enter_context(SeedProcess(seed(url, "a", ranks=(0,), **half)))
            later = threading.Timer(1.0, lambda: stack.enter_context(SeedProcess(seed(url, "a", ranks=(1,), **half))))
            later.start()
            good(load_ranks(target(url, config=CONFIG.replace(wait_s=15.0))))
            later.join()

    def test_nobody_comes(self, url: str) -> None:
        begun_s = time.monotonic()
        error = only(load_ranks(target(url, config=CONFIG.replace(wait_s=1.0))), DeadlineExceeded)
        assert time.monotonic() - begun_s < 4
        assert f"not enough seeds of {NAME[-1]}@small" in str(error)

    def test_nobody_comes_and_the_disk_serves(self, url: str, tmp_path: Path) -> None:
        life = target(url, config=CONFIG.replace(wait_s=1.0, fallback="disk"))
        good(load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))

    def test_half_of_it_comes_and_the_disk_gives_the_rest(self, url: str, tmp_path: Path) -> None:
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2), ranks=(0,))):
            life = target(url, config=CONFIG.replace(wait_s=1.0, fallback="disk"))
            good(results := load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))
        assert results[0].receipt is not None
        assert len(results[0].receipt.sources) == 2

    def test_the_deadline_ends_a_slow_transfer(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            life = target(url, 2, config=CONFIG.replace(deadline_s=2.0))
            results = load_ranks(life, wrap=faulty(Faults(source="a/", delay_s=60.0)))
        for result in results:
            assert isinstance(result.error, DeadlineExceeded | CommitError), result.error
            assert "a/rank 0" in str(result.error)
            assert result.seconds < 5
