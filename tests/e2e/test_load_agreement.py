"""All ranks load or none does: ranks that die, a coordinator that goes away, waiting and deadlines."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, NAME, Slow, coordinator_process, faulty, good, only, seed, target

from peerload.coordinator.client import CoordinatorClient
from peerload.deadline import Deadline
from peerload.engines.bare import BareRank
from peerload.errors import CommitError, ConfigError, CoordinatorError, DeadlineExceeded, HostError, PeerloadError, PlanError
from peerload.integrity.claims import Measured
from peerload.job.exchange import Group
from peerload.job.load import Job, load
from peerload.job.rank import Member, Rank, kept_open
from peerload.job.seed import Seed
from peerload.model.boxes import Box, IntArray
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec
from peerload.model.layout import Layout, Piece, Pieces
from peerload.testing.instances import CONFIG, SeedProcess, TargetProcess, content, load_ranks, on_disk
from peerload.testing.layouts import layout
from peerload.transport.faulty import Faults
from peerload.transport.local import LocalTransport

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

    @pytest.mark.parametrize(("device", "transport", "kind"), [("abacus:0", "", HostError), ("cpu", "cuda_ipc", ConfigError)])
    def test_a_rank_that_cannot_open_what_it_needs_tells_the_others(
        self, url: str, device: str, transport: str, kind: type[PeerloadError]
    ) -> None:
        """Its device, or its transports."""

        heard = []
        with SeedProcess(seed(url, "a")), CoordinatorClient(url) as client:

            def one(number: int) -> None:
                bare = BareRank.of(layout(MODEL, Parallel(tp=2), number))
                rank = bare.rank(ModelKey(NAME[-1], MODEL.name), Member("target", number, 2, device), CONFIG, client)
                if number == 1:
                    changed = {"config": CONFIG.replace(transport=transport)} if transport else {"opening": kept_open({})}
                    rank = replace(rank, device=device, **changed)
                with closing(bare.arena), pytest.raises(PeerloadError) as caught:
                    load(Job(rank))
                heard.append((number, caught.value))

            begun_s = time.monotonic()
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(one, range(2)))
        (_, first), (_, second) = sorted(heard, key=lambda item: item[0])
        assert isinstance(second, kind), second
        assert isinstance(first, CommitError), first
        assert f"rank 1 aborted: {second.message}" in first.message
        assert time.monotonic() - begun_s < 15

    def test_a_rank_that_fails_while_the_coordinator_is_away_tells_the_others_when_it_is_back(self) -> None:
        with coordinator_process() as (process, url), CoordinatorClient(url) as mine, CoordinatorClient(url) as other:
            deadline = Deadline.after(40)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(Group("i/1", 1, 2, other, deadline).tell, b"")
                while not mine.status().open_rounds:
                    time.sleep(0.05)
                process.send_signal(signal.SIGSTOP)
                threading.Timer(5.0, lambda: process.send_signal(signal.SIGCONT)).start()
                Group("i/1", 0, 2, mine, deadline).abort(PlanError("nobody has it"))
                error = waiting.exception(timeout=20)
        assert isinstance(error, CommitError), error
        assert "nobody has it" in str(error)

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
        """Rank 0 says there are two, rank 1 that there are three: neither loads."""
        with SeedProcess(seed(url, "a")), ThreadPoolExecutor(1) as pool:
            other = pool.submit(load_ranks, target(url, 2, ranks=(0,), launch="sizes"))
            results = [*load_ranks(target(url, 2, ranks=(1,), launch="sizes"), size=3), *other.result()]
        for result in results:
            assert isinstance(result.error, CommitError), result.error
            assert re.search(r"rank [01] says the group has [23] ranks, an earlier vote said [23]", str(result.error))
            assert result.seconds < 10

    @pytest.mark.parametrize("said", [b"", b".", b"+", b".{}", b".[[", b".PLM1garbage", b"." + bytes(300)])
    def test_a_rank_that_talks_nonsense_is_named(self, url: str, said: bytes) -> None:
        launch = f"nonsense {said[:40]!r}"
        with SeedProcess(seed(url, "a")), CoordinatorClient(url) as client, ThreadPoolExecutor(1) as pool:
            vote = pool.submit(client.agree, f"target/{launch}", 0, 1, 2, said, Deadline.after(20))
            if said[:1] == b"+":  # there is more, and then there is nothing
                vote = pool.submit(client.agree, f"target/{launch}", 1, 1, 2, b"", Deadline.after(20))
            (result,) = load_ranks(target(url, 2, ranks=(0,), launch=launch))
            vote.result()
        assert isinstance(result.error, CommitError), result.error
        assert "rank 1 sent what makes no sense" in str(result.error)

    @pytest.mark.parametrize(
        "said",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"doubts": 5, "wrong": {}, "read": {}}',
            b"[" * 100_000,
            b"\xff",
            b'{"doubts": [], "wrong": {"0": [1000000]}, "read": {}}',
            b'{"doubts": [], "wrong": {"7": [0]}, "read": {}}',
            b'{"doubts": [], "wrong": {}, "read": {"a/rank 0": [1.5, NaN]}}',
        ],
    )
    def test_a_rank_whose_verdict_makes_no_sense_is_named(self, url: str, said: bytes) -> None:
        launch = f"verdict {said[:40]!r}"
        none, boxes = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
        empty = Measured(layout(MODEL).catalog, none, none, boxes, boxes, np.zeros(0, np.uint64), none, ())
        with SeedProcess(seed(url, "a")), CoordinatorClient(url) as client, ThreadPoolExecutor(1) as pool:
            group = f"target/{launch}"
            pool.submit(client.agree, group, 0, 1, 2, b"." + empty.encode(), Deadline.after(20))
            vote = pool.submit(client.agree, group, 1, 1, 2, b"." + said, Deadline.after(20))
            (result,) = load_ranks(target(url, 2, ranks=(0,), launch=launch))
            vote.result()
            with pytest.raises(CommitError, match=r"rank 0 aborted: .*rank 1 sent what makes no sense"):
                client.agree(group, 2, 1, 2, b"", Deadline.after(5))  # it hears of it, too
        assert isinstance(result.error, CommitError), result.error
        assert "rank 1 sent what makes no sense" in str(result.error)


def with_derived(made: Layout, spec: TensorSpec) -> Layout:
    """A layout that also wants a vector which its engine computes, in a buffer of its own."""
    p, width = made.pieces, made.catalog.width
    one = Pieces.of([Piece(len(made.catalog), Box.whole(spec.shape), len(made.buffer_names), 0, (4,))], width)
    pieces = Pieces(*(np.concatenate([getattr(p, c), getattr(one, c)]) for c in Pieces.__slots__))
    return replace(
        made,
        catalog=Catalog.of([*made.catalog, spec]),
        buffer_names=(*made.buffer_names, spec.name),
        buffer_nbytes=np.append(made.buffer_nbytes, 4 * spec.shape[0]),
        pieces=pieces,
    )


def holder(stack: ExitStack, made: Layout) -> tuple[IntArray, LocalTransport]:
    """Memory of a rank, filled as it must be, and a transport that offers it."""
    bare = BareRank.of(made)
    stack.callback(bare.arena.close)
    must = content(MODEL, made.parallel, made.rank)
    for name, address, nbytes in zip(made.buffer_names, bare.address.tolist(), made.buffer_nbytes.tolist(), strict=True):
        bare.arena.write(address, must[name][:nbytes].tobytes())
    local = stack.enter_context(closing(LocalTransport(1)))
    local.register([bare.arena.region()])
    return bare.address, local


#: Rank 1 of a TP2 target on the main thread, over a source that takes a second for each read.
CTRL_C = """
import time
from contextlib import closing
from peerload.engines.bare import BareRank
from peerload.config import Config
from peerload.job.load import Job, load
from peerload.job.rank import Member, kept_open
from peerload.model.catalog import ModelKey, Parallel
from peerload.coordinator.client import CoordinatorClient
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
        load(Job(bare.rank(ModelKey("{name}", "small"), Member("target", 1, 2, "two"),
                           Config(fallback="fail", deadline_s=30.0), client, kept_open({{"local": local}}))))
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
        (result,) = results = load_ranks(target(url, config=CONFIG.replace(deadline_s=3.0)))
        error = only(results, CoordinatorError)
        assert 2.5 < result.seconds < 7
        assert f"coordinator {url} can't be reached" in str(error)
        assert "is `peerload coordinator` running there" in str(error)

    def test_it_comes_back_within_the_deadline(self, tmp_path: Path) -> None:
        """Later than any call of its client would wait by itself."""
        where = f"sqlite:{tmp_path}/db"
        with ExitStack() as stack:
            first, url = stack.enter_context(coordinator_process(where))
            stack.enter_context(SeedProcess(seed(url, "a", ttl_s=30.0)))
            first.kill()
            first.wait()
            later = threading.Timer(5.0, lambda: stack.enter_context(coordinator_process(where, url)))
            later.start()
            good(results := load_ranks(target(url, 2)))
            later.join()
        assert min(r.seconds for r in results) > 4

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_it_goes_before_the_commit(self, how: signal.Signals) -> None:
        """Every rank gives up soon after its deadline, and says what kept it."""
        with coordinator_process() as (process, url), SeedProcess(seed(url, "a")):
            gone = Slow("a/", 20, lambda: process.send_signal(how))
            life = target(url, 2, config=CONFIG.replace(deadline_s=4.0))
            results = load_ranks(life, wrap=lambda r, t: gone(r, t) if r == 0 else t)
        assert gone.happened.is_set()
        for result in results:
            assert isinstance(result.error, CoordinatorError | DeadlineExceeded), result.error
            assert url in str(result.error)
            assert result.seconds < 4 + 2 + 2  # the deadline, the farewell, a busy machine


class TestWaiting:
    def test_what_the_seeds_will_never_have_is_not_waited_for(self, url: str, tmp_path: Path) -> None:
        """They are complete, but for a tensor that is computed at their size alone and one that their engine has rewritten."""
        whole = layout(MODEL)
        lost = whole.catalog.names[0]
        kept = replace(whole, pieces=whole.pieces.take(whole.pieces.tensor != 0), ignored={lost: "rewritten by post-processing"})
        wanted = with_derived(whole, TensorSpec("A by test 1 tp1", "F32", (4,)))
        config = CONFIG.replace(wait_s=60.0, fallback="disk")
        with ExitStack() as stack:
            client = stack.enter_context(CoordinatorClient(url))
            address, local = holder(stack, whole)
            key = ModelKey(NAME[-1], MODEL.name)
            stack.enter_context(
                Seed(Rank(key, kept, address, [], Member("a"), CONFIG, client, opening=kept_open({"local": local})))
            )
            here = BareRank.of(wanted)
            stack.callback(here.arena.close)
            rank = here.rank(key, Member("target"), config, client)
            receipt = load(Job(rank, [on_disk(MODEL, tmp_path)], derives=True))
        assert receipt.wall_s < 20
        assert receipt.left == ("A by test 1 tp1",)
        assert set(receipt.sources) == {"a/rank 0", f"{tmp_path}/rank 0"}
        assert 0 < receipt.checkpoint_nbytes < receipt.needed_nbytes
        assert receipt.verified_nbytes + receipt.checkpoint_nbytes == receipt.needed_nbytes

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
        assert results[0].receipt.seconds["discover"] > 0.9  # the other half might have come
        assert len(results[0].receipt.sources) == 2

    def test_the_deadline_ends_a_slow_transfer(self, url: str) -> None:
        with SeedProcess(seed(url, "a")):
            life = target(url, 2, config=CONFIG.replace(deadline_s=2.0))
            results = load_ranks(life, wrap=faulty(Faults(source="a/", delay_s=60.0)))
        for result in results:
            assert isinstance(result.error, DeadlineExceeded | CommitError), result.error
            assert "a/rank 0" in str(result.error)
            assert result.seconds < 5
