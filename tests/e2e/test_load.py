"""Loads between real processes, and everything that can go wrong with them: killed, changed, lying and silent peers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from peerload.config import Config
from peerload.errors import (
    CommitError,
    CoordinatorError,
    DeadlineExceeded,
    PlanError,
    SourcesExhausted,
    VerifyError,
)
from peerload.manifest import Parallel
from peerload.rpc.client import CoordinatorClient
from peerload.testing.instances import Life, Result, SeedProcess, TargetProcess, load_ranks, on_disk
from peerload.testing.layouts import llama
from peerload.transport.base import Limits, Transport
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.registry import probe

pytestmark = pytest.mark.e2e

#: 6.5 MB.
MODEL = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)
CONFIG = Config(transport="local", fallback="fail", deadline_s=30.0, threads=1)
BATCH = 64 << 10

HAVE_NIXL = probe("nixl").available
needs_nixl = pytest.mark.skipif(not HAVE_NIXL, reason="nixl is not installed")


@contextmanager
def coordinator_process(store: str = "memory", listen: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = "import sys; from peerload.rpc.server import serve; c = serve(*sys.argv[1:]); print(c.address, flush=True); c.wait()"
    with subprocess.Popen([sys.executable, "-c", code, listen, store], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture(scope="module")
def shared_url() -> Iterator[str]:
    with coordinator_process() as (_, url):
        yield url


@pytest.fixture
def url(shared_url: str) -> Iterator[str]:
    """The coordinator of all tests; each must leave it without holdings."""
    with CoordinatorClient(shared_url) as client:
        until = time.monotonic() + 5
        while client.status().holdings and time.monotonic() < until:  # killed seeds of the test before: short leases
            time.sleep(0.05)
        assert not client.status().holdings
        yield shared_url


def seed(url: str, instance: str = "seed", **changes: object) -> Life:
    values = {"url": url, "model": MODEL, "instance": instance, "config": CONFIG, "ttl_s": 2.0, **changes}
    return Life(**values)  # type: ignore[arg-type]


def target(url: str, tp: int = 1, **changes: object) -> Life:
    return seed(url, "target", **{"parallel": Parallel(tp=tp), **changes})


class Slow:
    """Small batches, and something that happens before the n-th read of a source."""

    def __init__(self, source: str, at: int, then: Callable[[], object]) -> None:
        self._source, self._at, self._then = source, at, then
        self._lock, self._reads = threading.Lock(), 0
        self.happened = threading.Event()

    def __call__(self, _rank: int, transport: Transport) -> Transport:
        if transport.name == "files":
            return transport
        slow = Faulty(transport, Faults(source=self._source, delay_s=1e-6), sleep=self._before)
        slow.limits = replace(transport.limits, max_batch_nbytes=BATCH)
        return slow

    def _before(self, _s: float) -> None:
        with self._lock:
            self._reads += 1
            now = self._reads == self._at
        if now:
            self._then()
            self.happened.set()


def faulty(faults: Faults) -> Callable[[int, Transport], Transport]:
    return lambda _, transport: transport if transport.name == "files" else Faulty(transport, faults)


def good(results: Sequence[Result]) -> None:
    for result in results:
        if result.error is not None:
            raise result.error
        assert result.receipt is not None
        assert result.wrong == []


def only(results: Sequence[Result], kind: type[BaseException]) -> BaseException:
    (result,) = results
    assert result.receipt is None
    assert isinstance(result.error, kind), result.error
    return result.error


MEMORIES = ["arena", "plain", pytest.param("nixl", marks=needs_nixl)]


def of_memory(memory: str) -> dict[str, object]:
    if memory == "nixl":
        return {"config": CONFIG.replace(transport="nixl")}
    return {"memory": memory, "config": CONFIG}


class TestLostSource:
    @pytest.mark.parametrize("memory", MEMORIES)
    def test_killed_in_mid_transfer_the_rest_comes_from_the_other_seed(self, url: str, memory: str) -> None:
        how = of_memory(memory)
        with SeedProcess(seed(url, "a", **how)) as a, SeedProcess(seed(url, "b", **how)):
            kill = Slow("a/", 80, a.kill)
            results = load_ranks(target(url, config=how["config"]), wrap=kill)
        assert kill.happened.is_set()
        good(results)
        receipt = results[0].receipt
        assert receipt is not None
        from_a, from_b = receipt.sources["a/rank 0"].nbytes, receipt.sources["b/rank 0"].nbytes
        assert from_a + from_b == receipt.needed_nbytes
        # b gave its half and the remainder of a's; only the boxes that a had begun were read twice.
        assert from_a > 0.2 * receipt.needed_nbytes
        assert from_b < 0.8 * receipt.needed_nbytes
        assert receipt.wire_nbytes < 1.1 * receipt.needed_nbytes
        assert receipt.verified_nbytes == receipt.needed_nbytes

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_with_no_second_seed_the_rest_comes_from_disk(self, url: str, memory: str, tmp_path: Path) -> None:
        how = of_memory(memory)
        config = how["config"]
        assert isinstance(config, Config)
        with SeedProcess(seed(url, "a", **how)) as a:
            kill = Slow("a/", 120, a.kill)
            life = target(url, config=config.replace(fallback="disk"))
            results = load_ranks(life, wrap=kill, reserve=[on_disk(MODEL, tmp_path)])
        assert kill.happened.is_set()
        good(results)
        receipt = results[0].receipt
        assert receipt is not None
        assert receipt.sources["a/rank 0"].nbytes > 0.2 * receipt.needed_nbytes
        assert sum(read.nbytes for read in receipt.sources.values()) == receipt.needed_nbytes
        assert len(receipt.sources) == 2
        assert receipt.verified_nbytes == receipt.needed_nbytes

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_with_no_fallback_every_rank_fails_and_says_why(self, url: str, memory: str) -> None:
        how = of_memory(memory)
        with SeedProcess(seed(url, "a", **how)) as a:
            kill = Slow("a/", 30, a.kill)
            results = load_ranks(target(url, 2, config=how["config"]), wrap=lambda r, t: kill(r, t) if r == 0 else t)
        assert kill.happened.is_set()
        first, second = results
        assert isinstance(first.error, SourcesExhausted)
        assert first.error.exit_code == 4
        assert "a/rank 0" in str(first.error)
        assert "rank 0" in first.error.message
        assert "start another seed" in first.error.next_step
        assert isinstance(second.error, CommitError | SourcesExhausted)  # it may have been reading too
        if isinstance(second.error, CommitError):
            assert "rank 0 aborted" in second.error.message
            assert "a/rank 0" in second.error.message

    def test_a_seed_that_ends_politely_while_it_is_read(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a, SeedProcess(seed(url, "b")):
            leave = Slow("a/", 20, lambda: a.ask("leave"))
            results = load_ranks(target(url), wrap=leave)
        assert leave.happened.is_set()
        good(results)

    def test_all_of_many_seeds_but_one_die(self, url: str) -> None:
        with ExitStack() as stack:
            seeds = [stack.enter_context(SeedProcess(seed(url, f"s{i}"))) for i in range(4)]
            kill = Slow("s1/", 3, lambda: [s.kill() for s in seeds[1:]])
            results = load_ranks(target(url), wrap=kill)
            good(results)
        assert kill.happened.is_set()


class TestWrongBytes:
    def test_a_bit_flipped_on_the_wire_is_named_and_read_again_from_the_other_seed(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        two = {"parallel": Parallel(tp=2)}
        with SeedProcess(seed(url, "a", **two)), SeedProcess(seed(url, "b", **two)):
            flip = Faults(source="a/", flip_one_in_nbytes=200_000, flips=1)
            good(results := load_ranks(target(url, 2), wrap=lambda r, t: faulty(flip)(r, t) if r == 1 else t))
        assert results[1].receipt is not None
        assert 0 < results[1].receipt.reread_nbytes < 1_000_000
        assert results[0].receipt is not None
        assert results[0].receipt.reread_nbytes == 0
        (line,) = {r.getMessage() for r in caplog.records if "reading it again" in r.getMessage() and "rank 1:" in r.getMessage()}
        assert "weight[" in line
        assert "held by rank 1 and read from a/rank 1" in line
        assert "announced" in line

    def test_a_source_that_is_always_wrong_is_replaced(self, url: str) -> None:
        with SeedProcess(seed(url, "a")), SeedProcess(seed(url, "b")):
            good(results := load_ranks(target(url, 2), wrap=faulty(Faults(source="a/", flip_one_in_nbytes=50_000))))
        for result in results:
            assert result.receipt is not None
            assert 0 < result.receipt.reread_nbytes < 2 * result.receipt.needed_nbytes
            assert result.receipt.verified_nbytes == result.receipt.needed_nbytes

    def test_a_single_source_that_is_always_wrong_fails_every_rank_after_a_few_reads(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            wrong = faulty(Faults(source="a/", flip_one_in_nbytes=50_000))
            results = load_ranks(target(url, 2), wrap=lambda r, t: wrong(r, t) if r == 1 else t)
        for result in results:
            assert isinstance(result.error, VerifyError), result.error
            assert result.error.exit_code == 5
            assert "weight[" in result.error.message
            assert "read from a/rank 0" in result.error.message
            assert result.error.next_step
        assert results[1].wrong

    def test_a_bit_flipped_in_a_seeds_memory_is_not_passed_on(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a, SeedProcess(seed(url, "b")):
            a.ask("flip")
            good(results := load_ranks(target(url, 2)))
        assert sum(r.receipt.reread_nbytes for r in results if r.receipt is not None) > 0

    def test_a_bit_flipped_in_the_only_seeds_memory_is_read_from_disk(self, url: str, tmp_path: Path) -> None:
        with SeedProcess(seed(url, "a")) as a:
            a.ask("flip")
            life = target(url, config=CONFIG.replace(fallback="disk"))
            good(load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))

    def test_the_disk_is_wrong_and_a_seed_right(self, url: str, tmp_path: Path) -> None:
        """Nothing is taken from disk as long as a seed has it."""
        with SeedProcess(seed(url, "a")):
            life = target(url, config=CONFIG.replace(fallback="disk"))
            good(load_ranks(life, reserve=[on_disk(MODEL, tmp_path, version=1)]))

    def test_verify_off_lets_it_pass(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            life = target(url, config=CONFIG.replace(verify=False))
            (result,) = load_ranks(life, wrap=faulty(Faults(source="a/", flip_one_in_nbytes=200_000, flips=2)))
        assert result.error is None
        assert result.receipt is not None
        assert result.receipt.verified_nbytes == 0
        assert result.receipt.unverified_nbytes == result.receipt.needed_nbytes
        assert result.wrong

    def test_seeds_with_different_weights_under_one_name(self, url: str) -> None:
        with SeedProcess(seed(url, "a")), SeedProcess(seed(url, "b", version=1)):
            error = only(load_ranks(target(url)), VerifyError)
        assert "a/rank 0 and b/rank 0" in str(error)

    def test_seeds_without_digests_prove_nothing(self, url: str) -> None:
        with SeedProcess(seed(url, "a", digests=False)):
            good(results := load_ranks(target(url)))
        assert results[0].receipt is not None
        assert results[0].receipt.unverified_nbytes == results[0].receipt.needed_nbytes


class TestGenerations:
    def test_a_seed_that_is_changing_cannot_be_read(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a:
            a.ask("begin change")
            error = only(load_ranks(target(url)), SourcesExhausted)
        assert "a/rank 0 (its weights have changed since it announced them)" in str(error)

    def test_a_seed_that_changes_while_it_is_read(self, url: str) -> None:
        """Nothing it gave counts; the other seed gives everything."""
        with SeedProcess(seed(url, "a")) as a, SeedProcess(seed(url, "b")):
            change = Slow("a/", 30, lambda: a.ask("change"))
            good(results := load_ranks(target(url), wrap=change))
        assert change.happened.is_set()
        assert results[0].receipt is not None
        assert set(results[0].receipt.sources) == {"b/rank 0"}

    def test_what_changed_is_found_under_its_new_generation(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a:
            a.ask("change")
            good(load_ranks(target(url, version=1)))

    def test_changing_many_times_while_the_heart_beats(self, url: str) -> None:
        with SeedProcess(seed(url, "a", ttl_s=1.0)) as a:
            for _ in range(60):
                a.ask("change")
            time.sleep(1.5)
            good(load_ranks(target(url, version=60)))

    def test_a_seed_restarts_under_its_name_while_it_is_read(self, url: str) -> None:
        with SeedProcess(seed(url, "b")), SeedProcess(seed(url, "a")) as a, ExitStack() as stack:

            def restart() -> None:
                a.kill()
                stack.enter_context(SeedProcess(seed(url, "a", version=1)))

            again = Slow("a/", 30, restart)
            good(load_ranks(target(url), wrap=again))
            assert again.happened.is_set()

    def test_a_seed_restarted_under_its_name_is_found(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a:
            a.kill()
            with SeedProcess(seed(url, "a", version=1)):
                good(load_ranks(target(url, version=1)))

    def test_the_lease_of_a_seed_that_was_killed_runs_out(self, url: str) -> None:
        with SeedProcess(seed(url, "a", ttl_s=1.0)) as a:
            a.kill()
        error = only(load_ranks(target(url)), SourcesExhausted)
        assert "a/rank 0" in str(error)
        time.sleep(2.5)
        error = only(load_ranks(target(url)), PlanError)
        assert "nobody offers anything" in str(error)


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
        code = CTRL_C.format(url=url)
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
        load(Job(ModelKey("synthetic", "small"), bare.layout, bare.address, bare.regions("arena"), Member("target", 1, 2, "two"),
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
        assert "not enough seeds of synthetic@small" in str(error)

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
        config = CONFIG.replace(transport=transport, registration=registration)
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
        config = CONFIG.replace(transport="nixl", staging_bytes=1 << 20)
        with SeedProcess(seed(url, "a", config=config)):
            good(results := load_ranks(target(url, 4, config=config)))
        assert all(r.receipt is not None and r.receipt.staging_nbytes <= (1 << 20) // 4 for r in results)
