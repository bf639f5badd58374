"""What vLLM's own post-processing has requantized travels between ranks of other sizes, and every tensor is as after a load from
disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from ranks import Directory, Outcome, Ranks
from torch import Tensor

from peerload.engines import recipes
from peerload.model.catalog import Parallel
from peerload.testing.families import FAMILIES, write_family

BLOCKS, DENSE, SPARSE, SPARSE_BLOCKS = "llama-fp8-block", "llama-fp8-tensor", "qwen3-moe-fp8-tensor", "qwen3-moe-fp8-block"


@pytest.fixture
def url() -> Iterator[str]:
    with Directory() as address:
        yield address


class Models:
    """Checkpoints, and what vLLM makes of them by itself."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stock: dict[tuple[str, Parallel], list[dict[str, str]]] = {}

    def directory(self, name: str) -> Path:
        path = self._root / name
        return path if path.exists() else write_family(path, FAMILIES[name], seed=3)

    def stock(self, name: str, parallel: Parallel) -> list[dict[str, str]]:
        if (name, parallel) not in self._stock:
            with Ranks(self.directory(name), parallel, "") as ranks:
                self._stock[name, parallel] = [o.sha256 for o in ranks.outcomes()]
        return self._stock[name, parallel]

    def assert_equal(self, name: str, parallel: Parallel, outcomes: list[Outcome]) -> None:
        for rank, (outcome, theirs) in enumerate(zip(outcomes, self.stock(name, parallel), strict=True)):
            assert outcome.sha256.keys() == theirs.keys()
            assert not [f"rank {rank}: {path}" for path, sha in theirs.items() if outcome.sha256[path] != sha], outcome.log


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [BLOCKS, DENSE, SPARSE, SPARSE_BLOCKS])
def test_three_generations_have_no_byte_from_disk(url: str, models: Models, name: str) -> None:
    directory = models.directory(name)
    # What vLLM computes of input scales while it loads experts differs between layouts: it makes these few bytes from disk.
    fallback, expected = ("disk", {"peer", "engine"}) if name == SPARSE else ("fail", {"peer"})
    with ExitStack() as stack:
        first = stack.enter_context(Ranks(directory, Parallel(2), url))
        models.assert_equal(name, Parallel(2), first.outcomes())
        for generation, tp in enumerate((4, 2)):
            ranks = stack.enter_context(Ranks(directory, Parallel(tp), url, fallback=fallback, wait_s=20.0))
            outcomes = ranks.outcomes()
            assert all(outcome.sources == expected for outcome in outcomes), (generation, outcomes[0].log)
            assert "in post-processed form is as the seeds have it" in outcomes[0].log
            models.assert_equal(name, Parallel(tp), outcomes)
            first.__exit__(None, None, None)
            first = ranks


def no_inverse(self: object, weight: Tensor, scale: Tensor) -> Tensor:
    del self, weight
    return torch.mul(scale, 1.0)


def wrong_recipe() -> None:
    recipes.BlockScales.prepare = no_inverse  # type: ignore[method-assign]


@pytest.mark.timeout(900)
def test_a_wrong_recipe_is_found_out_and_vllm_loads_from_disk(url: str, models: Models) -> None:
    """Without the right inverse post-processing makes something else of some blocks."""
    directory = models.directory(BLOCKS)
    with Ranks(directory, Parallel(1), url) as seed:
        seed.outcomes()
        with Ranks(directory, Parallel(2), url, wrong_recipe, source=False) as target:
            outcomes = target.outcomes()
        assert all("post-processing has not made" in outcome.reason for outcome in outcomes), [o.reason for o in outcomes]
        models.assert_equal(BLOCKS, Parallel(2), outcomes)
