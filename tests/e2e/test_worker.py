"""A loader plug-in's rank against a real coordinator and real transports, with an engine small enough to read in one go."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import coordinator_process
from safetensors.torch import save_file
from torch import Tensor, nn

from peerload.config import Config
from peerload.engines.worker import Identity, Launch, NotFollowed, Worker
from peerload.errors import CommitError, ConfigError, CoordinatorError, LayoutError, PlanError
from peerload.manifest import Parallel
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
    """All ranks of an instance, in this process."""

    def __init__(self, name: str, tp: int, checkpoint: Path, config: Config, launch: Launch | None = None) -> None:
        self.name, self.tp, self.checkpoint, self.config = name, tp, checkpoint, config
        self.models = [Toy(tp, rank) for rank in range(tp)]
        self.launch = launch or Launch(name, uuid.uuid4().hex)
        self.workers = [self._worker(rank) for rank in range(tp)]

    def _worker(self, rank: int) -> Worker:
        who = Identity("toy 1.0", self.launch, Parallel(tp=self.tp), rank, self.tp)
        return Worker(
            who, self.config, self.checkpoint,
            load_weights=lambda model, weights: model.load_weights(weights),  # type: ignore[operator]
        )  # fmt: skip

    def load(self) -> list[Receipt]:
        with ThreadPoolExecutor(self.tp) as pool:
            futures = [pool.submit(w.load, m) for w, m in zip(self.workers, self.models, strict=True)]
            return [f.result() for f in futures]

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
    from safetensors.torch import load_file

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
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(w.load, m) for w, m in zip(target.workers, target.models, strict=True)]
        for future in futures:
            assert isinstance(future.exception(), NotFollowed)
            assert "rank 1: " in str(future.exception())


def test_a_complete_replica_without_a_coordinator_serves_all_the_same(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with coordinator_process() as (running, address):
        instance = Instance("target", 1, checkpoint, configured(address, model_name="toy-late"))
        instance.load()
        running.kill()
        running.wait()
        instance.models[0].post_process()
        assert instance.workers[0].serve(instance.models[0]) is None
        assert "is no seed" in caplog.text


def test_a_rank_that_cannot_open_its_memory_tells_the_others_at_once(url: str, checkpoint: Path) -> None:
    """One region for all is asked for, and there are five allocations."""
    with Instance("target", 2, checkpoint, configured(url, model_name="toy-arena")) as target:
        target.workers[1]._config = target.config.replace(registration="arena")
        begun_s = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(w.load, m) for w, m in zip(target.workers, target.models, strict=True)]
        assert isinstance(futures[1].exception(), ConfigError)
        assert isinstance(futures[0].exception(), CommitError)
        assert "5 allocations" in str(futures[0].exception())
        assert time.monotonic() - begun_s < target.config.deadline_s / 2
