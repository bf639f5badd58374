"""Loads whose sources are killed, give wrong bytes or change while they are read."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MODEL, Slow, faulty, good, needs_nixl, only, seed, target

from peerload.config import Config
from peerload.errors import CommitError, PlanError, SourcesExhausted, SourceStalled, VerifyError
from peerload.model.catalog import Parallel
from peerload.testing.instances import CONFIG, SeedProcess, load_ranks, on_disk
from peerload.transport.faulty import Faults

pytestmark = pytest.mark.e2e

MEMORIES = ["arena", "plain", pytest.param("nixl", marks=needs_nixl)]


def of_memory(memory: str) -> dict[str, object]:
    if memory == "nixl":
        return {"config": CONFIG.replace(transport="nixl", interface="lo")}
    return {"memory": memory, "config": CONFIG}


def stand_still() -> None:
    raise SourceStalled("a/rank 0", "it stands still on purpose")


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

    @pytest.mark.parametrize("other", ["seed", "disk"])
    @pytest.mark.parametrize("verify", ["on", "off"])
    def test_killed_in_the_middle_of_a_change(self, url: str, verify: str, other: str, tmp_path: Path) -> None:
        """What it gave after its fence fell is another version's, and it was killed before its fence could be read again."""
        config = CONFIG.replace(verify=verify, fallback="disk", attach=False)
        with ExitStack() as stack:
            a = stack.enter_context(SeedProcess(seed(url, "a", memory="plain", config=config)))
            if other == "seed":
                stack.enter_context(SeedProcess(seed(url, "b", memory="plain", config=config)))
            change, kill = Slow("a/", 20, lambda: a.ask("begin change")), Slow("a/", 40, a.kill)
            results = load_ranks(
                target(url, config=config), wrap=lambda r, t: kill(r, change(r, t)), reserve=[on_disk(MODEL, tmp_path)]
            )
        assert change.happened.is_set()
        assert kill.happened.is_set()
        good(results)
        if verify == "off":
            assert results[0].receipt is not None
            assert "a/rank 0" not in results[0].receipt.sources

    @pytest.mark.parametrize("other", ["seed", "disk"])
    def test_killed_in_the_middle_of_a_change_while_a_rank_pulls_alone(self, url: str, other: str, tmp_path: Path) -> None:
        """Half of what it gave is half of what a digest covers: neither a digest nor a fence vouches for that."""
        config = CONFIG.replace(fallback="disk", attach=False)
        with ExitStack() as stack:
            a = stack.enter_context(SeedProcess(seed(url, "a", memory="plain", config=config)))
            if other == "seed":
                stack.enter_context(SeedProcess(seed(url, "b", memory="plain", config=config)))
            change, kill = Slow("a/", 15, lambda: a.ask("begin change")), Slow("a/", 30, a.kill)
            results = load_ranks(
                target(url, 2, ranks=(1,), config=config),
                size=1,
                wrap=lambda r, t: kill(r, change(r, t)),
                reserve=[on_disk(MODEL, tmp_path)],
            )
        assert change.happened.is_set()
        assert kill.happened.is_set()
        good(results)

    def test_ranks_that_are_stopped_cost_the_time_of_one(self, url: str) -> None:
        """Each rank of a wedged instance is given up after `stall_s`, all of them at once, and well before the deadline."""
        four, config = Parallel(tp=4), CONFIG.replace(deadline_s=40.0, stall_s=4.0)
        with SeedProcess(seed(url, "a", parallel=four)) as a, SeedProcess(seed(url, "b", parallel=four)):
            os.kill(a.pid, signal.SIGSTOP)
            try:
                begun_s = time.monotonic()
                good(results := load_ranks(target(url, config=config)))
                assert time.monotonic() - begun_s < 12.0  # one after the other: 16 s
            finally:
                os.kill(a.pid, signal.SIGCONT)
        assert results[0].receipt is not None
        assert {name.partition("/")[0] for name in results[0].receipt.sources} == {"b"}

    @needs_nixl
    @pytest.mark.parametrize("other", ["seed", "disk"])
    def test_a_seed_that_stands_still_in_mid_transfer_is_given_up(
        self, url: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over TCP, as between hosts: what it would still send must not land in memory that others have filled meanwhile."""
        monkeypatch.setenv("UCX_TLS", "tcp")
        config = CONFIG.replace(transport="nixl", interface="lo", stall_s=1.0, fallback="disk")
        with ExitStack() as stack:
            a = stack.enter_context(SeedProcess(seed(url, "a", config=config)))
            if other == "seed":
                stack.enter_context(SeedProcess(seed(url, "b", config=config)))
            stop = Slow("a/", 30, lambda: os.kill(a.pid, signal.SIGSTOP))
            begun_s = time.monotonic()
            results = load_ranks(target(url, config=config), wrap=stop, reserve=[on_disk(MODEL, tmp_path)])
            seconds = time.monotonic() - begun_s
            a.kill()
        assert stop.happened.is_set()
        good(results)
        assert seconds < config.deadline_s / 2

    def test_a_seed_that_stood_still_is_tried_once_more_when_nobody_else_is_left(self, url: str) -> None:
        """As when its network is away for a while."""
        with SeedProcess(seed(url, "a")):
            good(load_ranks(target(url), wrap=Slow("a/", 30, stand_still)))

    def test_a_seed_that_stands_still_again_is_lost(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            results = load_ranks(target(url), wrap=Slow("a/", range(30, 1 << 60), stand_still))
        assert isinstance(results[0].error, SourcesExhausted)
        assert "it stands still on purpose" in results[0].error.message

    def test_a_seed_that_ends_politely_while_it_is_read(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a, SeedProcess(seed(url, "b")):
            leave = Slow("a/", 20, a.close)
            results = load_ranks(target(url), wrap=leave)
        assert leave.happened.is_set()
        good(results)
        receipt = results[0].receipt
        assert receipt is not None
        from_b = receipt.sources["b/rank 0"].nbytes
        assert from_b > 0.6 * receipt.needed_nbytes  # half of it had been planned from a
        assert sum(read.nbytes for read in receipt.sources.values()) == receipt.needed_nbytes

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
            life = target(url, config=CONFIG.replace(verify="off"))
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

    def test_a_seed_without_digests_is_refused(self, url: str) -> None:
        with SeedProcess(seed(url, "a", digests=False)) as a:
            a.ask("flip")  # nobody would know
            for error in (only(load_ranks(target(url)), PlanError), load_ranks(target(url, 2))[1].error):
                assert isinstance(error, PlanError)
                assert "a/rank 0: announces no digests" in str(error)

    def test_a_seed_without_digests_beside_one_that_has_them(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        with SeedProcess(seed(url, "a", digests=False)) as a, SeedProcess(seed(url, "b")):
            a.ask("flip")
            good(results := load_ranks(target(url, 2)))
        for result in results:
            assert result.receipt is not None
            assert list(result.receipt.sources) == ["b/rank 0"]
            assert result.receipt.verified_nbytes == result.receipt.needed_nbytes
            assert result.receipt.proof == "all verified by the seeds' digests"
        assert "a/rank 0: announces no digests" in caplog.text

    def test_verify_off_takes_a_seed_without_digests(self, url: str) -> None:
        with SeedProcess(seed(url, "a", digests=False)):
            good(results := load_ranks(target(url, config=CONFIG.replace(verify="off"))))
        receipt = results[0].receipt
        assert receipt is not None
        assert receipt.unverified_nbytes == receipt.needed_nbytes
        assert "not proven (verify is off)" in str(receipt)

    def test_what_comes_from_the_own_checkpoint_is_counted_apart(self, url: str, tmp_path: Path) -> None:
        """A seed without digests is no reason to fail where the disk may serve."""
        with SeedProcess(seed(url, "a", digests=False)):
            life = target(url, 2, config=CONFIG.replace(fallback="disk"))
            good(results := load_ranks(life, reserve=[on_disk(MODEL, tmp_path)]))
        for result in results:
            assert result.receipt is not None
            assert list(result.receipt.sources) == [f"{tmp_path}/rank 0"]
            assert result.receipt.checkpoint_nbytes == result.receipt.needed_nbytes
            assert (result.receipt.verified_nbytes, result.receipt.unverified_nbytes) == (0, 0)
            assert "read from this host's own checkpoint" in str(result.receipt)

    def test_a_rank_that_pulls_alone_says_what_it_can_not_prove(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            good(results := load_ranks(target(url, 2, ranks=(1,)), size=1))
        receipt = results[0].receipt
        assert receipt is not None
        assert 0 < receipt.verified_nbytes < receipt.needed_nbytes
        assert receipt.verified_nbytes + receipt.unverified_nbytes == receipt.needed_nbytes
        assert "a rank alone holds only parts" in str(receipt)


class TestGenerations:
    def test_a_seed_that_is_changing_cannot_be_read(self, url: str) -> None:
        with SeedProcess(seed(url, "a")) as a:
            a.ask("begin change")
            error = only(load_ranks(target(url, config=CONFIG.replace(deadline_s=3.0))), SourcesExhausted)
        assert "a/rank 0 (its weights have changed since it announced them)" in str(error)

    def test_a_seed_that_changes_while_it_is_read(self, url: str) -> None:
        """Nothing it gave counts; the other seed gives everything."""
        with SeedProcess(seed(url, "a")) as a, SeedProcess(seed(url, "b")):
            change = Slow("a/", 30, lambda: a.ask("change"))
            good(results := load_ranks(target(url), wrap=change))
        assert change.happened.is_set()
        assert results[0].receipt is not None
        assert set(results[0].receipt.sources) == {"b/rank 0"}

    @pytest.mark.parametrize("verify", ["on", "off"])
    def test_the_only_seed_changes_while_it_is_read(self, url: str, verify: str) -> None:
        """Its new weights are found, and read from the beginning."""
        config = CONFIG.replace(verify=verify, attach=False)
        with SeedProcess(seed(url, "a", parallel=Parallel(tp=2), memory="plain")) as a:
            change = Slow("a/", 30, lambda: a.ask("change"))
            life = target(url, 2, version=1, config=config)
            results = load_ranks(life, wrap=lambda r, t: change(r, t) if r == 0 else t)
        assert change.happened.is_set()
        good(results)

    @pytest.mark.parametrize("verify", ["on", "off"])
    def test_a_seed_changes_between_the_discoveries_of_two_ranks(
        self, url: str, verify: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Rank 0 has read all it needs when the weights change; rank 1 reads the new ones. They end up with the same."""
        how = {"launch": f"skew, verify {verify}", "version": 1, "config": CONFIG.replace(verify=verify, attach=False)}
        full = threading.Event()
        with SeedProcess(seed(url, "a", memory="plain")) as a, ThreadPoolExecutor(1) as pool:
            early = pool.submit(
                load_ranks,
                target(url, 2, ranks=(0,), **how),
                on_bytes=lambda _, done, wanted: full.set() if done == wanted else None,
            )
            assert full.wait(20)
            time.sleep(0.5)  # its closing fence
            a.ask("change")
            late = load_ranks(target(url, 2, ranks=(1,), **how))
            good([*early.result(), *late])
        assert "different generations of a; discovering again" in caplog.text

    def test_without_verify_a_seed_that_dies_in_a_change_gives_no_wrong_byte(self, url: str) -> None:
        config = CONFIG.replace(verify="off", attach=False)
        with SeedProcess(seed(url, "a", memory="plain")) as a, SeedProcess(seed(url, "b", memory="plain")):
            begin = Slow("a/", 20, lambda: a.ask("begin change"))
            kill = Slow("a/", 30, a.kill)
            good(load_ranks(target(url, config=config), wrap=lambda r, t: kill(r, begin(r, t))))
        assert begin.happened.is_set()
        assert kill.happened.is_set()

    def test_a_seed_comes_back_after_it_was_lost(self, url: str) -> None:
        """With time to wait, a load goes on with who comes next."""
        with SeedProcess(seed(url, "a")) as a, ExitStack() as stack:
            kill = Slow("a/", 30, a.kill)
            later = threading.Timer(2.0, lambda: stack.enter_context(SeedProcess(seed(url, "b"))))
            later.start()
            good(results := load_ranks(target(url, 2, config=CONFIG.replace(wait_s=15.0)), wrap=kill))
            later.join()
        assert kill.happened.is_set()
        assert any(r.receipt is not None and "b/rank 0" in r.receipt.sources for r in results)

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
