"""A loader plug-in's rank against a real coordinator and real transports, with an engine small enough to read in one go."""

from __future__ import annotations

import errno
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import coordinator_process
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peerload.config import Config
from peerload.coordinator.client import CoordinatorClient
from peerload.engines.worker import Identity, Launch, NotFollowed, Worker
from peerload.errors import CommitError, ConfigError, CoordinatorError, LayoutError, PlanError, VerifyError
from peerload.model.catalog import ModelKey, Parallel
from peerload.receipt import Receipt

HIDDEN, INTER = 64, 96


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with coordinator_process() as (_, address):
        yield address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    (directory / "config.json").write_text("{}")
    random = torch.Generator().manual_seed(1)
    tensors = {
        "up.weight": torch.randn(INTER, HIDDEN, generator=random).bfloat16(),
        "down.weight": torch.randn(HIDDEN, INTER, generator=random).bfloat16(),
        "norm.weight": torch.randn(HIDDEN, generator=random).bfloat16(),
        "decay": torch.randn(INTER, generator=random).bfloat16(),
        "scale": torch.rand(INTER, generator=random) + 0.5,
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


class Toy(nn.Module):
    """Its loader cuts (up, scale, decay by rows, down by columns), casts (norm to F32) and computes (decay)."""

    def __init__(self, tp: int, rank: int) -> None:
        super().__init__()
        self.tp, self.rank = tp, rank
        self.up = nn.Parameter(torch.full((INTER // tp, HIDDEN), torch.nan, dtype=torch.bfloat16), requires_grad=False)
        self.down = nn.Parameter(torch.full((HIDDEN, INTER // tp), torch.nan, dtype=torch.bfloat16), requires_grad=False)
        self.norm = nn.Parameter(torch.full((HIDDEN,), torch.nan), requires_grad=False)
        self.decay = nn.Parameter(torch.full((INTER // tp,), torch.nan), requires_grad=False)
        self.scale = nn.Parameter(torch.full((INTER // tp,), torch.nan), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            parameter = name.removesuffix(".weight")
            if parameter != "norm":
                tensor = tensor.chunk(self.tp, dim=1 if parameter == "down" else 0)[self.rank]
            if parameter == "decay":
                tensor = -torch.exp(tensor.float())
            getattr(self, parameter).data.copy_(tensor)
            loaded.add(parameter)
        return loaded

    def post_process(self) -> None:
        """As engines do: one tensor is rewritten in place, one is replaced by another, the rest is left alone."""
        self.scale.data.reciprocal_()
        self.down = nn.Parameter(self.down.data.t().contiguous(), requires_grad=False)


class Instance:
    """All ranks of an instance, in this process. finish: as of `Worker`; known_as: what the engine calls the model."""

    def __init__(
        self,
        name: str,
        tp: int,
        checkpoint: Path,
        config: Config,
        launch: Launch | None = None,
        *,
        finish: Callable[[nn.Module], object] | None = None,
        known_as: str = "",
    ) -> None:
        self.name, self.tp, self.checkpoint, self.config = name, tp, checkpoint, config
        self.finish, self.known_as = finish, known_as
        self.models = [Toy(tp, rank) for rank in range(tp)]
        self.launch = launch or Launch(name, uuid.uuid4().hex)
        self.workers = [self._worker(rank) for rank in range(tp)]

    def _worker(self, rank: int, checkpoint: Path | None = None) -> Worker:
        who = Identity("toy 1.0", self.launch, Parallel(tp=self.tp), rank, self.tp)
        return Worker(
            who,
            self.config,
            lambda: checkpoint or self.checkpoint,
            engine_loader=lambda model, weights: model.load_weights(weights),  # type: ignore[operator]
            finish=self.finish,
            known_as=self.known_as,
        )

    def load(self) -> list[Receipt]:
        with ThreadPoolExecutor(self.tp) as pool:
            futures = [pool.submit(w.load, m) for w, m in zip(self.workers, self.models, strict=True)]
            return [f.result() for f in futures]

    def failures(self) -> list[BaseException | None]:
        """[ranks], what each raises when all load at once."""
        with ThreadPoolExecutor(self.tp) as pool:
            return [f.exception() for f in [pool.submit(w.load, m) for w, m in zip(self.workers, self.models, strict=True)]]

    def falls_back(self) -> list[str]:
        """As an engine does: each rank's load fails with NotFollowed, whose reason is returned, and its model is built anew and
        loaded by the engine itself."""
        failures = self.failures()
        assert [type(f) for f in failures] == [NotFollowed] * self.tp, failures
        self.models = [Toy(self.tp, rank) for rank in range(self.tp)]
        for model in self.models:
            model.load_weights(load_file(self.checkpoint / "model.safetensors").items())
        return [str(f) for f in failures]

    def serve(self) -> None:
        for worker, model in zip(self.workers, self.models, strict=True):
            model.post_process()
            worker.serve(model)

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()


def expected(checkpoint: Path, tp: int) -> list[dict[str, Tensor]]:
    """What the engine's own loader makes of the checkpoint, by rank."""
    stock = [Toy(tp, rank) for rank in range(tp)]
    for model in stock:
        model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return [dict(model.named_parameters()) for model in stock]


def assert_loaded(instance: Instance) -> None:
    for model, wanted in zip(instance.models, expected(instance.checkpoint, instance.tp), strict=True):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, wanted[name]), name


def sources(receipts: list[Receipt]) -> set[str]:
    return {name.split("/")[0] for r in receipts for name in r.sources}


def configured(url: str, **changes: object) -> Config:
    return Config.from_mapping({"url": url, "transport": "local", "deadline_s": 30.0, **changes})


@pytest.mark.parametrize(("seed_tp", "tp"), [(1, 2), (2, 1), (2, 4), (4, 2), (2, 2)])
def test_any_tp_feeds_any_other_what_post_processing_has_left_or_copies_kept(
    url: str, checkpoint: Path, seed_tp: int, tp: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(url, model_name=f"toy-{seed_tp}-{tp}")
    with Instance("seed", seed_tp, checkpoint, config) as seed, Instance("target", tp, checkpoint, config) as target:
        assert sources(seed.load()) == {f"disk:{checkpoint.name}"}
        seed.serve()
        with caplog.at_level(logging.INFO, "peerload"):
            receipts = target.load()
        assert sources(receipts) == {"seed"}
        assert_loaded(target)
        left = {name for r in receipts for name in r.left}
        # What a rank has computed, only the same rank of another instance of that size holds.
        assert left == (set() if tp == seed_tp else {f"decay by toy 1.0 tp{tp} ep1 pp1 rank {r}" for r in range(tp)})
        assert "100.0 % of its bytes verified" in caplog.text


def test_what_was_rewritten_and_not_kept_comes_from_disk_and_the_log_says_so(
    url: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(url, model_name="toy-no-copies", retain_bytes=0)
    with Instance("seed", 1, checkpoint, config) as seed, Instance("target", 2, checkpoint, config) as target:
        seed.load()
        with caplog.at_level(logging.INFO, "peerload"):
            seed.serve()
        assert "2 are not offered" in caplog.text
        assert sources(target.load()) == {"seed", f"disk:{checkpoint.name}"}
        assert_loaded(target)


def test_without_fallback_it_names_what_nobody_holds(url: str, checkpoint: Path) -> None:
    config = configured(url, model_name="toy-strict", retain_bytes=0)
    with Instance("seed", 1, checkpoint, config) as seed, ExitStack() as stack:
        seed.load()
        seed.serve()
        target = stack.enter_context(Instance("target", 1, checkpoint, config.replace(fallback="fail")))
        with pytest.raises(PlanError) as caught:
            target.load()
        named = {hole.tensor for hole in caught.value.holes}
        assert named == {"down.weight", "scale"}
        assert all(torch.isnan(p).all() for p in target.models[0].parameters())


class Odd(Toy):
    """Its loader looks at values."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights((name, tensor) for name, tensor in weights if name != "scale" or tensor.max().item() > 0)


def test_a_model_that_cannot_be_followed_is_given_back_to_its_engine_or_refused(url: str, checkpoint: Path) -> None:
    for fallback, kind in (("disk", NotFollowed), ("fail", LayoutError)):
        with Instance("target", 1, checkpoint, configured(url, fallback=fallback)) as target:
            target.models = [Odd(1, 0)]
            with pytest.raises(kind, match="scale") as caught:
                target.load()
            assert type(caught.value) is kind


def test_a_host_without_the_checkpoint_loads_what_seeds_hold(url: str, checkpoint: Path, tmp_path: Path) -> None:
    config = configured(url, model_name="toy-no-checkpoint", revision="1")
    with Instance("target", 2, tmp_path, config) as early, pytest.raises(NotFollowed, match="nobody offers toy-no-checkpoint@1"):
        early.load()
    with Instance("seed", 2, checkpoint, config) as seed, Instance("target", 2, tmp_path, config) as target:
        seed.load()
        seed.serve()
        assert sources(target.load()) == {"seed"}
        target.checkpoint = checkpoint
        assert_loaded(target)


def test_a_host_without_the_checkpoint_waits_no_longer_than_its_deadline(url: str, checkpoint: Path, tmp_path: Path) -> None:
    config = configured(url, model_name="nobody-has-it", revision="1", fallback="fail", wait_s=20, deadline_s=1)
    begun_s = time.monotonic()
    with Instance("early", 1, tmp_path, config) as target, pytest.raises(ConfigError, match="nobody offers nobody-has-it"):
        target.load()
    assert time.monotonic() - begun_s < 10


def test_without_a_coordinator_its_engine_loads_from_disk_or_it_says_so(checkpoint: Path) -> None:
    config = configured("127.0.0.1:1")
    launch = Launch.now(config)
    assert "127.0.0.1:1" in launch.alone
    for fallback, kind in (("disk", NotFollowed), ("fail", CoordinatorError)):
        target = Instance("target", 1, checkpoint, config.replace(fallback=fallback), launch)
        with target, pytest.raises(kind, match=r"127\.0\.0\.1:1"):
            target.load()


def test_if_one_rank_cannot_be_followed_none_goes_on(url: str, checkpoint: Path) -> None:
    with Instance("target", 2, checkpoint, configured(url, model_name="toy-apart")) as target:
        target.models[1] = Odd(2, 1)
        reasons = target.falls_back()
        assert "rank 1 aborted: " in reasons[0]
        assert all("scale" in reason and "\n" not in reason for reason in reasons)
        assert_loaded(target)


def test_a_complete_replica_without_a_coordinator_serves_all_the_same(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with coordinator_process() as (running, address):
        instance = Instance("target", 1, checkpoint, configured(address, model_name="toy-late"))
        instance.load()
        running.kill()
        running.wait()
        instance.models[0].post_process()
        assert instance.workers[0].serve(instance.models[0]) is None
        assert "is no seed" in caplog.text


class Failure(Exception):
    """An error that is none of peerload's."""


class Broken(Toy):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        raise Failure("out of luck")


class Offloaded(Toy):
    """Its parameters lie on two devices."""

    def __init__(self, tp: int, rank: int) -> None:
        super().__init__(tp, rank)
        self.scale = nn.Parameter(self.scale.to("meta"), requires_grad=False)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [(Odd, LayoutError, "scale"), (Broken, Failure, "out of luck"), (Offloaded, LayoutError, "parameters lie on cpu, meta")],
)
def test_a_rank_that_fails_before_the_load_tells_the_others_at_once(
    url: str, checkpoint: Path, kind: type[Toy], error: type[Exception], words: str
) -> None:
    """Whatever it is, and whether or not they may load from disk."""
    for fallback in ("fail", "disk"):
        config = configured(url, model_name="toy-begin", fallback=fallback, deadline_s=600.0)
        with Instance("target", 2, checkpoint, config) as target:
            target.models[1] = kind(2, 1)
            begun_s = time.monotonic()
            if fallback == "disk":
                assert all(words in reason for reason in target.falls_back())
                assert_loaded(target)
            else:
                first, second = target.failures()
                assert type(first) is CommitError
                assert "rank 1 aborted: " in str(first)
                assert words in str(first)
                assert type(second) is error
            assert time.monotonic() - begun_s < 60


def test_a_rank_that_cannot_download_its_checkpoint_tells_the_others_at_once(url: str, checkpoint: Path) -> None:
    def full() -> Path:
        raise OSError(errno.ENOSPC, "no space left")

    with Instance("target", 2, checkpoint, configured(url, model_name="toy-download", deadline_s=600.0)) as target:
        target.workers[1]._find = full
        begun_s = time.monotonic()
        assert all("no space left" in reason for reason in target.falls_back())
        assert time.monotonic() - begun_s < 60


def test_a_rank_that_cannot_open_its_memory_tells_the_others_at_once(url: str, checkpoint: Path) -> None:
    """One region for all is asked for, and there are five allocations."""
    with Instance("target", 2, checkpoint, configured(url, model_name="toy-arena", fallback="fail", deadline_s=600.0)) as target:
        target.workers[1]._config = target.config.replace(registration="arena")
        begun_s = time.monotonic()
        first, second = target.failures()
        assert isinstance(second, ConfigError)
        assert isinstance(first, CommitError)
        assert "5 allocations" in str(first)
        assert time.monotonic() - begun_s < 60


def test_a_rank_that_fails_at_the_engines_last_step_stops_all(url: str, checkpoint: Path) -> None:
    """Before anybody has committed; the bytes have arrived, and what the engine makes of them has not."""

    def finish(model: nn.Module) -> None:
        assert not torch.isnan(model.up).any()
        assert not torch.isnan(model.decay).any(), "what no seed has is there too"
        if model.rank == 1:
            raise Failure("can't absorb")

    for fallback in ("fail", "disk"):
        config = configured(url, model_name="toy-finish", fallback=fallback)
        with Instance("seed", 2, checkpoint, config.replace(fallback="disk")) as seed:
            seed.load()
            seed.serve()
            with Instance("target", 2, checkpoint, config, finish=finish) as target:
                if fallback == "disk":
                    assert all("can't absorb" in reason for reason in target.falls_back())
                    assert_loaded(target)
                else:
                    first, second = target.failures()
                    assert type(first) is CommitError
                    assert type(second) is Failure


@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
def test_what_the_engines_last_step_rewrites_is_offered_as_it_was_before(url: str, checkpoint: Path, retain_bytes: int) -> None:
    """Out of a copy, or not at all: the target's engine takes that step itself, on the bytes of the checkpoint."""

    def finish(model: nn.Module) -> None:
        model.up.data.mul_(2)

    config = configured(url, model_name=f"toy-last-{retain_bytes}", retain_bytes=retain_bytes)
    with Instance("seed", 2, checkpoint, config, finish=finish) as seed:
        seed.load()
        seed.serve()
        with Instance("target", 2, checkpoint, config, finish=finish) as target:
            assert sources(target.load()) == ({"seed"} if retain_bytes else {"seed", f"disk:{checkpoint.name}"})
            for model in target.models:
                model.up.data.div_(2)
            assert_loaded(target)


def test_what_an_engine_makes_from_disk_is_made_before_anybody_commits(url: str, checkpoint: Path) -> None:
    """At another TP no seed has `decay`. Here a rank can't make it."""
    config = configured(url, model_name="toy-derive")
    with Instance("seed", 1, checkpoint, config) as seed, Instance("target", 2, checkpoint, config) as target:
        seed.load()
        seed.serve()

        class Once(Toy):
            def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
                Once.load_weights = fails  # type: ignore[method-assign]
                return Toy.load_weights(self, weights)

        def fails(self: Once, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            raise Failure(f"can't make {[name for name, _ in weights]}")

        target.models[1] = Once(2, 1)
        assert all("can't make ['decay']" in reason for reason in target.falls_back())
        assert_loaded(target)


def test_when_the_coordinator_is_lost_after_the_launch_all_ranks_load_from_disk(checkpoint: Path) -> None:
    """At its beginning, and while it waits for seeds."""
    for when in ("begin", "wait"):
        with coordinator_process() as (running, address):
            config = configured(address, model_name="toy-lost", deadline_s=3.0, wait_s=3.0)
            with Instance("target", 2, checkpoint, config, Launch.now(config)) as target, ThreadPoolExecutor(1) as pool:
                if when == "begin":
                    running.kill()
                    running.wait()
                loading = pool.submit(target.falls_back)
                if when == "wait":
                    time.sleep(1)
                    running.kill()
                for reason in loading.result():
                    assert address in reason
                assert_loaded(target)


def test_when_seeds_contradict_each_other_all_ranks_load_from_disk(url: str, checkpoint: Path, tmp_path: Path) -> None:
    """Two seeds of one name and revision, and one of them lies: nobody can tell which."""
    config = configured(url, model_name="toy-lie", revision="1")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["up.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors")
    with ExitStack() as stack:
        seeds = [stack.enter_context(Instance(n, 2, d, config)) for n, d in (("honest", checkpoint), ("liar", other))]
        for seed in seeds:  # both from disk, before either is announced
            seed.load()
        for seed in seeds:
            seed.serve()
        target = stack.enter_context(Instance("target", 4, checkpoint, config))
        assert all("up.weight" in reason for reason in target.falls_back())
        assert_loaded(target)
        with pytest.raises(VerifyError, match=r"up\.weight"):
            stack.enter_context(Instance("strict", 2, checkpoint, config.replace(fallback="fail"))).load()


def test_ranks_whose_hosts_have_different_checkpoints_load_neither(url: str, checkpoint: Path, tmp_path: Path) -> None:
    """They differ in rank 1's half of one tensor, so that no digest of the two ranks' could tell."""
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["up.weight"][-1, 5] += 1
    save_file(tensors, other / "model.safetensors")
    with Instance("target", 2, checkpoint, configured(url)) as target:
        target.workers[1] = target._worker(1, other)
        for failure in target.failures():
            assert isinstance(failure, NotFollowed), failure
            assert "ranks 0 and 1 would load different models" in failure.message


def test_when_time_is_up_all_ranks_load_from_disk(url: str, checkpoint: Path) -> None:
    """Rank 1 is late. Rank 0 doesn't wait for ever, and names it; rank 1 goes the same way when it comes."""
    with Instance("target", 2, checkpoint, configured(url, model_name="toy-late", deadline_s=1.0)) as target:
        with pytest.raises(NotFollowed, match="rank 1 of 2 did not vote in time"):
            target.workers[0].load(target.models[0])
        with pytest.raises(NotFollowed, match="rank 0"):
            target.workers[1].load(target.models[1])


def test_replicas_of_one_model_meet_whatever_they_are_started_with(url: str, checkpoint: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub, its name, a link to it, a copy in a directory of another name."""
    snapshot = tmp_path / "hub" / "models--org--toy-names" / "snapshots" / "0123456789abcdef"
    shutil.copytree(checkpoint, snapshot)
    tensors = load_file(snapshot / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, snapshot / "model.safetensors")  # a model of its own
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(snapshot)
    shutil.copytree(snapshot, copy)
    config = configured(url)
    with Instance("seed", 1, snapshot, config, known_as=str(snapshot)) as seed, CoordinatorClient(url) as client:
        seed.load()
        seed.serve()
        assert "org/toy-names" in {h.model.name for h in client.status().holdings}
        for directory, known_as in ((snapshot, "org/toy-names"), (link, str(link)), (copy, str(copy))):
            with Instance("target", 2, directory, config, Launch.now(config), known_as=known_as) as target:
                assert sources(target.load()) == {"seed"}, directory
                assert_loaded(target)
        with Instance("other", 1, copy, config.replace(model_name="mine"), Launch.now(config)) as other:
            assert sources(other.load()) == {"disk:copy"}, "a configured name keeps models apart"


def test_rank_0_tells_all_ranks_what_is_on_offer(url: str, checkpoint: Path) -> None:
    config = configured(url, model_name="toy-offered", revision="1")
    with Instance("seed", 1, checkpoint, config) as seed:
        seed.load()
        seed.serve()
        assert ModelKey("toy-offered", "1") in Launch.now(config).offered
