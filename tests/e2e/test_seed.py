"""Seeds from beginning to end: leases, heartbeats, ways to end, and what they leave behind (nothing)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from conftest import coordinator_process

from peerload.config import Config
from peerload.coordinator.client import CoordinatorClient, Granted
from peerload.coordinator.server import Coordinator, serve
from peerload.engines.bare import BareRank, bare_ranks
from peerload.errors import CommitError, CoordinatorError, DeadlineExceeded, HostError, LeaseSuperseded, PlanError, VerifyError
from peerload.job.rank import Member, Rank, kept_open
from peerload.job.seed import Seed
from peerload.memory.space import HOST, Fence, Host, digest_layout
from peerload.model.catalog import ModelKey, Parallel
from peerload.model.offer import SourceId
from peerload.testing.instances import Life, SeedProcess, load_ranks, on_disk
from peerload.testing.layouts import layout, llama, tiny_llama
from peerload.transport.local import LocalTransport
from peerload.transport.process import boot_id

pytestmark = pytest.mark.e2e

MODEL = tiny_llama()
KEY = ModelKey("synthetic", MODEL.name)
CONFIG = Config(transport="local", fallback="fail", deadline_s=20.0, threads=1)


@pytest.fixture
def client(coordinator: Coordinator) -> Iterator[CoordinatorClient]:
    with CoordinatorClient(coordinator.address, timeout_s=3.0) as running:
        yield running


@pytest.fixture
def rank() -> Iterator[BareRank]:
    bare = BareRank.of(layout(MODEL))
    with closing(bare.arena):
        yield bare


@pytest.fixture
def local(rank: BareRank) -> Iterator[LocalTransport]:
    with closing(LocalTransport(1)) as transport:
        transport.register([rank.arena.region()])
        yield transport


def make(
    client: CoordinatorClient, rank: BareRank, local: LocalTransport, ttl_s: float = 1.0, kind: type[Rank] = Rank, **more: Any
) -> Seed:
    """Without the arena: its memory is never frozen."""
    here = kind(KEY, rank.layout, rank.address, [], Member("seed"), CONFIG, client, opening=kept_open({"local": local}))
    return Seed(here, ttl_s=ttl_s, **more)


def descriptors() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue
        if "peerload" in target:
            found.add(f"{fd.name} {target}")
    return found


def heartbeats() -> list[str]:
    return [t.name for t in threading.enumerate() if "heartbeat" in t.name]


class TestLeases:
    def test_the_lease_is_renewed_as_long_as_the_block_lasts(
        self, client: CoordinatorClient, rank: BareRank, local: LocalTransport
    ) -> None:
        with make(client, rank, local):
            time.sleep(2.2)
            assert [h.source.instance for h in client.status().holdings] == ["seed"]
            assert heartbeats()
        assert client.status().holdings == ()
        assert heartbeats() == []

    def test_the_coordinator_forgets_and_is_told_again(
        self, client: CoordinatorClient, rank: BareRank, local: LocalTransport
    ) -> None:
        with make(client, rank, local) as seed:
            client.withdraw(Granted(seed.offer.source, 1.0))
            assert client.discover(KEY) == []
            time.sleep(0.8)
            assert [o.source for o in client.discover(KEY)] == [seed.offer.source]

    def test_a_heartbeat_in_the_middle_of_a_change_does_not_end_the_lease(
        self, coordinator: Coordinator, rank: BareRank, local: LocalTransport
    ) -> None:
        with SlowToHear(coordinator.address) as client, make(client, rank, local) as seed:
            with seed.changing():
                pass
            time.sleep(2.0)
            assert [h.source for h in client.status().holdings] == [seed.offer.source]

    def test_a_change_that_fails_ends_the_offer(self, client: CoordinatorClient, rank: BareRank, local: LocalTransport) -> None:
        with make(client, rank, local) as seed:
            with pytest.raises(RuntimeError), seed.changing():
                raise RuntimeError("half written")
            assert client.status().holdings == ()
            time.sleep(0.8)
            assert client.status().holdings == ()

    def test_a_second_process_of_the_same_name_takes_over(
        self, client: CoordinatorClient, rank: BareRank, local: LocalTransport, caplog: pytest.LogCaptureFixture
    ) -> None:
        ended: SimpleQueue[LeaseSuperseded] = SimpleQueue()
        with make(client, rank, local, on_ended=ended.put), make(client, rank, local) as second:
            assert second.offer.source.generation in ended.get(timeout=10).message
            time.sleep(1.0)
            assert [h.source for h in client.status().holdings] == [second.offer.source]
        assert ended.empty()
        assert "no longer offered" in caplog.text

    def test_where_it_runs_is_announced(self, client: CoordinatorClient, rank: BareRank, local: LocalTransport) -> None:
        with make(client, rank, local):
            assert [h.host for h in client.status().holdings] == [boot_id()]

    @pytest.mark.parametrize("store", ["memory", "sqlite"])
    def test_a_change_while_the_coordinator_is_away_is_announced_later(
        self, rank: BareRank, local: LocalTransport, store: str, tmp_path: Path
    ) -> None:
        where = "memory" if store == "memory" else f"sqlite:{tmp_path}/db"
        with ExitStack() as stack:
            first, url = stack.enter_context(coordinator_process(where))
            client = stack.enter_context(CoordinatorClient(url, timeout_s=0.5))
            seed = stack.enter_context(make(client, rank, local, ttl_s=6.0))
            before = seed.offer.source
            first.kill()
            first.wait()
            with seed.changing():
                view = rank.arena.view(int(rank.address[0]), 8)
                view[:] = b"\1" * 8
            assert seed.offer.source != before
            stack.enter_context(coordinator_process(where, url))
            with CoordinatorClient(url, timeout_s=10.0) as asks:
                wait_until(lambda: [h.source for h in asks.status().holdings] == [seed.offer.source])
                life = Life(url=url, model=MODEL, instance="target", config=CONFIG)
                (result,) = load_ranks(life)
                assert result.error is None

    def test_a_seed_whose_fence_fails_is_withdrawn_all_the_same(
        self, client: CoordinatorClient, rank: BareRank, local: LocalTransport
    ) -> None:
        """As a GPU's driver may, in the end."""
        seed = make(client, rank, local, kind=Disordered)
        with pytest.raises(HostError, match="out of order"), seed:
            pass
        assert client.status().holdings == ()
        assert heartbeats() == []


class TestChainOfCustody:
    def test_bytes_that_change_before_they_are_offered_are_not_passed_on_as_truth(
        self, coordinator: Coordinator, client: CoordinatorClient
    ) -> None:
        """a -> b -> c: a bit of b's memory flips after b has committed and before it offers; c finds out."""
        life = Life(url=coordinator.address, model=MODEL, instance="a", config=CONFIG)
        layouts = [layout(MODEL, Parallel(tp=2), rank) for rank in range(2)]
        member = Member("b", size=2, launch="1")
        with ExitStack() as stack:
            with SeedProcess(life):
                ranks = stack.enter_context(bare_ranks(layouts, KEY, member, CONFIG, client))
            local = stack.enter_context(closing(LocalTransport(1)))
            for rank, receipt in ranks:
                assert len(receipt.digests) == len(rank.layout.pieces)
                rank.arena.view(int(rank.address[0]), 1)[0] ^= 1
                local.register([rank.arena.region()])
            for rank, receipt in ranks:
                stack.enter_context(
                    Seed(
                        Rank(
                            KEY,
                            rank.layout,
                            rank.address,
                            [],
                            Member("b"),
                            CONFIG,
                            client,
                            opening=kept_open({"local": local}),
                        ),
                        proven=receipt.digests,
                    )
                )
            (result,) = load_ranks(replace(life, instance="c", launch="2"))
            assert isinstance(result.error, VerifyError), result.error
            assert "announced" in result.error.message
            with SeedProcess(life):
                (result,) = load_ranks(replace(life, instance="c", launch="3"))
            assert result.error is None
            assert result.wrong == []
            assert result.receipt is not None
            assert result.receipt.reread_nbytes > 0

    def test_proven_digests_are_those_of_hashing_it_all(self, coordinator: Coordinator, client: CoordinatorClient) -> None:
        life = Life(url=coordinator.address, model=MODEL, instance="a", parallel=Parallel(tp=2), config=CONFIG)
        third = bare_ranks([layout(MODEL, Parallel(tp=3), 1)], KEY, Member("b", rank=1), CONFIG, client)
        with SeedProcess(life), third as ((rank, receipt),):
            hashed = digest_layout(HOST, rank.layout, rank.address, threads=1)
        assert receipt.digests == dict(enumerate(hashed.tolist()))
        assert "digests" not in receipt.to_dict()

    def test_what_has_changed_is_hashed_anew(self, client: CoordinatorClient, rank: BareRank, local: LocalTransport) -> None:
        proven = dict.fromkeys(range(len(rank.layout.pieces)), 7)
        del proven[0]
        with make(client, rank, local, proven=proven) as seed:
            assert seed.offer.binding.digests is not None
            assert seed.offer.binding.digests.tolist() == [0, *[7] * len(proven)]  # zeros have digest 0
            with seed.changing():
                pass
            assert not seed.offer.binding.digests.any()
        for wrong in ({len(rank.layout.pieces): 0}, {0: -1}, {0: (1 << 61) - 1}):
            with pytest.raises(ValueError, match="proven"):
                make(client, rank, local, proven=wrong)


class BrokenFences(Host):
    """Memory whose fences can't be cleared."""

    def fence(self) -> Fence:
        fence = super().fence()
        write = fence.write

        def broken(data: bytes) -> None:
            if not any(data):
                raise HostError("out of order")
            write(data)

        fence.write = broken  # type: ignore[method-assign]
        return fence


class Disordered(Rank):
    space = BrokenFences()  # type: ignore[assignment]


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.1)


class SlowToHear(CoordinatorClient):
    """Announces, and learns of it only after two heartbeats."""

    def announce(self, *args: object, **kwargs: object) -> Granted:  # type: ignore[override]
        lease = super().announce(*args, **kwargs)  # type: ignore[arg-type]
        time.sleep(0.8)
        return lease


class Unheard(CoordinatorClient):
    """The coordinator takes every announcement, and its answer is lost."""

    def announce(self, *args: Any, **more: Any) -> Granted:
        super().announce(*args, **more)
        raise DeadlineExceeded("the answer did not come")


class TestEnds:
    def test_a_seed_that_never_heard_whether_it_is_announced_is_offered_no_more(
        self, coordinator: Coordinator, rank: BareRank, local: LocalTransport
    ) -> None:
        with Unheard(coordinator.address) as client:
            with pytest.raises(DeadlineExceeded, match="did not come"), make(client, rank, local, ttl_s=600.0):
                pass
            assert client.status().holdings == ()
        assert heartbeats() == []

    def test_a_seed_opens_its_transports_and_closes_them(self, client: CoordinatorClient, rank: BareRank) -> None:
        before = descriptors()
        with Seed(rank.rank(KEY, Member("seed"), CONFIG, client)):
            assert [h.source.instance for h in client.status().holdings] == ["seed"]
        assert client.status().holdings == ()
        assert descriptors() == before

    def test_without_a_coordinator_nothing_is_left_behind(self, rank: BareRank, local: LocalTransport) -> None:
        with serve("127.0.0.1:0") as gone:
            address = gone.address
        before = descriptors()
        client = CoordinatorClient(address, timeout_s=0.5)
        with client, pytest.raises(CoordinatorError), make(client, rank, local):
            pass
        assert descriptors() == before
        assert heartbeats() == []

    def test_an_absent_coordinator_does_not_hold_up_the_end(self, rank: BareRank, local: LocalTransport) -> None:
        with serve("127.0.0.1:0") as running, CoordinatorClient(running.address) as client:
            seed = make(client, rank, local, ttl_s=30.0)
            seed.__enter__()
            running.stop(0)
            begun_s = time.monotonic()
            seed.__exit__()
            assert time.monotonic() - begun_s < 6
        assert heartbeats() == []

    def test_a_silent_coordinator_does_not_hold_up_the_end(self, rank: BareRank, local: LocalTransport) -> None:
        """Stopped, not dead: it accepts and never answers."""
        code = "from peerload.coordinator.server import serve; c = serve('127.0.0.1:0'); print(c.address, flush=True); c.wait()"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            with CoordinatorClient(process.stdout.readline().strip()) as client:
                before = descriptors()
                with make(client, rank, local, ttl_s=30.0):
                    process.send_signal(signal.SIGSTOP)
                    begun_s = time.monotonic()
                assert time.monotonic() - begun_s < 6
                assert descriptors() == before
            process.kill()

    def test_many_lives_leave_no_descriptor(self, coordinator: Coordinator, tmp_path: Path) -> None:
        """Loads that succeed, that fail, and seeds, over and over."""
        life = Life(url=coordinator.address, model=MODEL, instance="target", config=CONFIG)
        shared = {*Path("/dev/shm").iterdir()}
        with SeedProcess(Life(url=coordinator.address, model=MODEL, instance="seed", config=CONFIG)):
            load_ranks(life)
            before, count = descriptors(), len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(5):
                (result,) = load_ranks(life)
                assert result.error is None
        (failed,) = load_ranks(life)
        assert isinstance(failed.error, PlanError)
        assert descriptors() == before
        assert len(list(Path("/proc/self/fd").iterdir())) <= count
        assert {*Path("/dev/shm").iterdir()} == shared

    def test_fds_of_a_process_that_reads_many_seeds(self, coordinator: Coordinator) -> None:
        def life(name: str) -> Life:
            return Life(url=coordinator.address, model=MODEL, instance=name, config=CONFIG)

        with SeedProcess(life("a")), SeedProcess(life("b")), SeedProcess(life("c")):
            load_ranks(life("target"))
            count = len(list(Path("/proc/self/fd").iterdir()))
            load_ranks(life("target"))
            assert len(list(Path("/proc/self/fd").iterdir())) <= count


class TestBareRanks:
    def test_a_rank_that_fails_is_the_error_and_all_is_freed(self, coordinator: Coordinator, client: CoordinatorClient) -> None:
        before = descriptors()
        layouts = [layout(MODEL)]
        member = Member("pull", launch="1")
        with pytest.raises(PlanError), bare_ranks(layouts, KEY, member, CONFIG, client):
            pass
        assert descriptors() == before

    def test_ctrl_c_while_loading(self, coordinator: Coordinator) -> None:
        """It ends long before the deadline, and without a crash."""
        with SeedProcess(Life(url=coordinator.address, model=SMALL, instance="seed", config=CONFIG)):
            command = [sys.executable, "-c", CTRL_C, coordinator.address]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
                begun_s = time.monotonic()
                process.send_signal(signal.SIGINT)
                said, errors = process.communicate(timeout=20)
        assert said == "KeyboardInterrupt\n", errors
        assert process.returncode == 0, errors
        assert time.monotonic() - begun_s < 5


SMALL = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)
#: Two ranks in one process, which the reports of progress make slow.
CTRL_C = """
import sys, time
from peerload.engines.bare import bare_ranks
from peerload.config import Config
from peerload.job.rank import Member
from peerload.model.catalog import ModelKey, Parallel
from peerload.coordinator.client import CoordinatorClient
from peerload.testing.layouts import layouts, llama
from peerload.transport.base import Limits
from peerload.transport.local import LocalTransport
LocalTransport.limits = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=64 << 10)
model = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)
def slowly(rank, done, _):
    if rank == 0 and done <= 64 << 10:
        print("begun", flush=True)
    time.sleep(0.5)
config = Config(transport="local", fallback="fail", deadline_s=60.0, threads=1)
with CoordinatorClient(sys.argv[1]) as client:
    try:
        with bare_ranks(layouts(model, Parallel(tp=2)), ModelKey("synthetic", "small"), Member("t", size=2, launch="x"), config,
                        client, on_bytes=slowly):
            print("loaded", flush=True)
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
"""


class TestCommand:
    def test_sigterm_withdraws_and_exits_with_0(
        self, coordinator: Coordinator, client: CoordinatorClient, tmp_path: Path
    ) -> None:
        from peerload.testing.checkpoints import make_checkpoint

        model = make_checkpoint(tmp_path / "tiny")
        command = [
            sys.executable,
            "-m",
            "peerload",
            "seed",
            "--checkpoint",
            str(model),
            "--tp",
            "2",
            "--url",
            coordinator.address,
        ]
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert len(client.status().holdings) == 2
            process.terminate()
            rest, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert rest == ""
        assert said["instance"]
        assert client.status().holdings == ()

    def test_one_that_has_lost_its_place_stops_and_says_so(
        self, coordinator: Coordinator, client: CoordinatorClient, tmp_path: Path
    ) -> None:
        from peerload.testing.checkpoints import make_checkpoint

        command = [sys.executable, "-m", "peerload", "seed", "--checkpoint", str(make_checkpoint(tmp_path / "tiny"))]
        command += ["--instance", "twin", "--url", coordinator.address]
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, "--json"], stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            (mine,) = client.status().holdings
            offer = client.discover(mine.model)[0]
            taken = replace(offer, binding=replace(offer.binding, source=SourceId.new("twin", 0, 0)))
            client.announce(taken, mine.model)
            said, errors = process.communicate(timeout=40)  # after its next heartbeat
        assert process.returncode == 1
        assert "superseded" in said + errors
        assert "Traceback" not in errors


def test_the_disk_of_a_model_without_seeds(coordinator: Coordinator, tmp_path: Path) -> None:
    life = Life(url=coordinator.address, model=MODEL, instance="target", config=CONFIG.replace(fallback="disk"))
    (result,) = load_ranks(life, reserve=[on_disk(MODEL, tmp_path)])
    assert result.error is None
    assert result.wrong == []


def test_commit_errors_are_not_passed_on_as_aborts(coordinator: Coordinator) -> None:
    """A rank that hears of an abort doesn't claim it for itself: all name the rank that began."""
    life = Life(url=coordinator.address, model=MODEL, instance="target", config=CONFIG)
    with SeedProcess(Life(url=coordinator.address, model=MODEL, instance="seed", config=CONFIG)):
        with CoordinatorClient(coordinator.address) as client:
            client.abort(f"target/{life.launch}", 0, 1, 2, "not today")
        (result,) = load_ranks(life, size=2)
    assert isinstance(result.error, CommitError)
    assert "rank 1 aborted: not today" in str(result.error)
