"""Weights that a seed's post-processing has requantized, and targets whose own does the same, nothing, or something else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peerload.config import Config
from peerload.coordinator.server import serve
from peerload.engines.recipes import RECIPES
from peerload.engines.worker import Identity, Launch, NotFollowed, Worker
from peerload.errors import CommitError, VerifyError
from peerload.model.catalog import Parallel

NAMES = ("q", "k", "v")
ROWS, COLUMNS = 16, 32


class Fused(nn.Module):
    """Three matrices in one parameter, each with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(torch.zeros(3 * ROWS, COLUMNS).to(torch.float8_e4m3fn), requires_grad=False)
        self.layer.weight_scale = nn.Parameter(torch.zeros(3), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            base, _, kind = name.partition(".")
            row = NAMES.index(base)
            if kind == "weight":
                self.layer.weight.data[row * ROWS : (row + 1) * ROWS].copy_(tensor)
            else:
                self.layer.weight_scale.data[row].copy_(tensor)


class Absorbing(Fused):
    """Its loader computes a tensor out of weights, outside of parameters."""

    def absorb(self) -> None:
        self.absorbed = self.layer.weight.data.float() * self.layer.weight_scale.data.repeat_interleave(ROWS)[:, None]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights(weights)
        self.absorb()


def requantize(model: Fused, share: float = 1.0) -> None:
    """As vLLM does: all three with the largest scale, or with `share` of it."""
    weight, scale = model.layer.weight.data, model.layer.weight_scale.data
    largest = scale.max() * share
    for row in range(3):
        part = weight[row * ROWS : (row + 1) * ROWS]
        values = (part.half() * scale[row]).float() * (1.0 / largest)
        part.copy_(values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn))
    model.layer.weight_scale = nn.Parameter(largest, requires_grad=False)


@pytest.fixture
def url() -> Iterator[str]:
    with serve("127.0.0.1:0") as coordinator:
        yield coordinator.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, random = tmp_path_factory.mktemp("fused"), torch.Generator().manual_seed(1)
    tensors = {f"{n}.weight": (torch.randn(ROWS, COLUMNS, generator=random) * 50).to(torch.float8_e4m3fn) for n in NAMES}
    tensors |= {f"{n}.weight_scale": torch.tensor(0.01 * (i + 1)) for i, n in enumerate(NAMES)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def worker(
    checkpoint: Path,
    url: str,
    *,
    finish: Callable[[nn.Module], object] | None = None,
    who: tuple[Launch, int, int] | None = None,
    **config: object,
) -> Worker:
    launch, rank, size = who or (Launch(uuid.uuid4().hex[:8], uuid.uuid4().hex), 0, 1)
    told = Config.from_mapping({"url": url, "transport": "local", "retain_bytes": 0, "deadline_s": 30.0, **config})
    identity = Identity("toy 1.0", launch, Parallel(tp=size), rank, size)

    def load(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> object:
        return model.load_weights(weights)  # type: ignore[operator]

    return Worker(identity, told, lambda: checkpoint, engine_loader=load, finish=finish, recipes=RECIPES)


@pytest.fixture
def seed(checkpoint: Path, url: str) -> Iterator[Fused]:
    with ExitStack() as stack:
        model, own = Fused(), worker(checkpoint, url)
        stack.callback(own.close)
        own.load(model)
        requantize(model)
        own.settle(model)
        assert own.serve(model) is not None
        yield model


def test_what_a_seed_has_requantized_is_requantized_to_the_same(checkpoint: Path, url: str, seed: Fused) -> None:
    model, target = Fused(), worker(checkpoint, url, fallback="fail", source=False)
    receipt = target.load(model)
    assert {name.partition("/")[0] for name in receipt.sources}.isdisjoint({f"disk:{checkpoint.name}"})
    assert len(set(model.layer.weight_scale.tolist())) == 1
    requantize(model)
    target.settle(model)
    assert torch.equal(model.layer.weight.view(torch.uint8), seed.layer.weight.view(torch.uint8))
    assert torch.equal(model.layer.weight_scale, seed.layer.weight_scale)


@pytest.mark.parametrize(
    ("process", "problem"),
    [(lambda model: requantize(model, 1.25), "has not made"), (lambda _: None, "has left layer.weight_scale alone")],
    ids=["another scale", "nothing"],
)
def test_other_post_processing_is_found_out(
    checkpoint: Path, url: str, seed: Fused, process: Callable[[Fused], None], problem: str
) -> None:
    for fallback, kind in (("fail", VerifyError), ("disk", NotFollowed)):
        model, target = Fused(), worker(checkpoint, url, fallback=fallback)
        target.load(model)
        process(model)
        with pytest.raises(kind, match=problem):
            target.settle(model)
        assert target.serve(model) is None


def test_what_the_loader_computes_it_computes_of_the_checkpoints_weights(checkpoint: Path, url: str, seed: Fused) -> None:
    """Not of those that post-processing has made: the seed has no others, so they come from disk."""
    model, stock = Absorbing(), Absorbing()
    target = worker(checkpoint, url, source=False, finish=lambda model: model.absorb())
    target.load(model)
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        stock.load_weights((name, stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118 - not a mapping
    assert torch.equal(model.absorbed, stock.absorbed)
    assert torch.equal(model.layer.weight.view(torch.uint8), stock.layer.weight.view(torch.uint8))


def test_what_seeds_have_given_up_is_not_waited_for(checkpoint: Path, url: str) -> None:
    """Post-processing that no recipe knows has rewritten the weights."""
    with ExitStack() as stack:
        model, own = Fused(), worker(checkpoint, url, retain_bytes=1 << 10)
        stack.callback(own.close)
        own.load(model)
        model.layer.weight.data.zero_()
        own.settle(model)
        assert own.serve(model) is not None
        begun_s = time.monotonic()
        worker(checkpoint, url, source=False, wait_s=25.0).load(Fused())
        assert time.monotonic() - begun_s < 15


def test_a_rank_that_fails_in_post_processing_tells_the_others(checkpoint: Path, url: str, seed: Fused) -> None:
    launch, models = Launch(uuid.uuid4().hex[:8], uuid.uuid4().hex), (Fused(), Fused())
    ranks = [worker(checkpoint, url, who=(launch, rank, 2), fallback="fail", source=False, deadline_s=120.0) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda own, model: own.load(model), ranks, models))
        waiting = pool.submit(ranks[0].settle, models[0])
        ranks[1].give_up(RuntimeError("out of memory"))
        with pytest.raises(CommitError, match="rank 1 aborted: RuntimeError: out of memory"):
            waiting.result(timeout=30)
