"""Real vLLM instances load from each other at other TP sizes, and end up with every tensor as after a load from disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from engine import Vllm
from kinds import ARGUMENTS, write_kind

from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator, serve
from peerload.testing.families import FAMILIES, write_family

#: With two KV heads, so that at TP4 each lies on two ranks.
DENSE, SPARSE = "llama-kv2", "qwen3-moe-kv2"
#: The instance's line about what came from a source.
RECEIVED = re.compile(r"peerload: ([0-9.]+ [kMG]?B) from (\S+)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        **{name: write_family(root / name, FAMILIES[name]) for name in (DENSE, SPARSE)},
        **{name: write_kind(root / name, name) for name in ARGUMENTS},
    }


class Fleet:
    """Instances that are started once and shared by tests. Each seed has a coordinator of its own, so that a target has no
    choice; only the last one runs, because memory is short."""

    def __init__(self, models: dict[str, Path]) -> None:
        self._models = models
        self._running = ExitStack()
        self._seed: tuple[str, int] = ("", 0)
        self._found: tuple[Vllm, Coordinator]
        self._stock: dict[tuple[str, int], tuple[list[dict[str, str]], list[list[int]]]] = {}

    def seed(self, model: str, tp: int) -> tuple[Vllm, Coordinator]:
        if self._seed != (model, tp):
            self.close()
            coordinator = self._running.enter_context(serve("127.0.0.1:0"))
            config = {"url": coordinator.address}
            self._found = self._running.enter_context(Vllm(self._models[model], tp, config)).wait(), coordinator
            self._seed = model, tp
        return self._found

    def close(self) -> None:
        self._running.close()
        self._seed = ("", 0)

    @contextmanager
    def target(self, model: str, tp: int, *, seed_tp: int, **config: object) -> Iterator[Vllm]:
        """One that can only load from the seed of size `seed_tp`."""
        _, coordinator = self.seed(model, seed_tp)
        told = {"url": coordinator.address, "source": False, "fallback": "fail", **config}
        with Vllm(self._models[model], tp, told) as running:
            yield running.wait()

    def stock(self, model: str, tp: int) -> tuple[list[dict[str, str]], list[list[int]]]:
        """sha256 by rank and tensor, and tokens, of an instance that vLLM has loaded from disk by itself."""
        if (model, tp) not in self._stock:
            with Vllm(self._models[model], tp) as running:
                running.wait()
                self._stock[model, tp] = running.sha256(), running.tokens()
        return self._stock[model, tp]


@pytest.fixture(scope="module")
def fleet(models: dict[str, Path]) -> Iterator[Fleet]:
    with closing(Fleet(models)) as running:
        yield running


def sources(instance: Vllm) -> set[str]:
    """Where its log says that its bytes came from: "disk", "peer"."""
    return {"disk" if source.startswith("disk:") else "peer" for _, source in RECEIVED.findall(instance.log)}


def assert_equals_stock(fleet: Fleet, model: str, tp: int, instance: Vllm) -> None:
    tensors, tokens = fleet.stock(model, tp)
    mine = instance.sha256()
    assert [sorted(rank) for rank in mine] == [sorted(rank) for rank in tensors]
    wrong = [f"rank {r}: {path}" for r, rank in enumerate(tensors) for path, sha in rank.items() if mine[r][path] != sha]
    assert not wrong
    assert instance.tokens() == tokens


@pytest.mark.timeout(900)
def test_without_a_seed_it_loads_from_disk_and_becomes_one(fleet: Fleet) -> None:
    first, _ = fleet.seed(DENSE, 1)
    assert sources(first) == {"disk"}
    assert "peerload: seed " in first.log
    assert_equals_stock(fleet, DENSE, 1, first)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "seed_tp", "tp"),
    [(DENSE, 1, 1), (DENSE, 1, 2), (DENSE, 2, 1), (DENSE, 2, 4), (SPARSE, 1, 2), (SPARSE, 2, 4)],
)
def test_a_new_instance_loads_from_a_running_one(
    fleet: Fleet, model: str, seed_tp: int, tp: int, record_property: Callable[[str, object], None]
) -> None:
    with fleet.target(model, tp, seed_tp=seed_tp) as target:
        assert sources(target) == {"peer"}
        assert "100.0 % of its bytes verified" in target.log
        assert_equals_stock(fleet, model, tp, target)
    record_property("cell", {"engine": "vllm", "family": model, "seed_tp": seed_tp, "tp": tp})


@pytest.mark.timeout(900)
def test_what_cannot_come_from_peers_is_loaded_by_vllm_itself(fleet: Fleet) -> None:
    """One region for all parameters is asked for, which vLLM allocates one by one. That is known once the model is built, so
    it is built twice."""
    with fleet.target(DENSE, 1, seed_tp=1, fallback="disk", registration="arena") as target:
        assert re.search(r"peerload: .* allocations.*; vLLM loads it from disk, and this instance is no seed of it", target.log)
        assert_equals_stock(fleet, DENSE, 1, target)


@pytest.mark.timeout(900)
def test_a_seed_whose_weights_change_is_one_no_longer(fleet: Fleet) -> None:
    seed, coordinator = fleet.seed(DENSE, 1)
    with CoordinatorClient(coordinator.address) as client:
        assert len(client.status().holdings) == 1
        seed.load_nothing()
        assert not client.status().holdings
    assert "the weights are about to change" in seed.log


@pytest.mark.timeout(900)
def test_a_seed_whose_weights_are_packed_gives_the_copies_it_kept(fleet: Fleet, models: dict[str, Path]) -> None:
    """vLLM as it runs on CPUs: linear weights are packed for oneDNN and freed, so tokens say what tensors can't."""
    fleet.close()
    with serve("127.0.0.1:0") as coordinator, Vllm(models[DENSE], 1, packed=True) as stock:
        told = {"url": coordinator.address, "fallback": "fail", "source": False}
        with Vllm(models[DENSE], 1, {"url": coordinator.address, "retain_bytes": 1 << 30}, packed=True) as seed:
            assert re.search(r"peerload: seed .* in copies", seed.wait().log)
            with Vllm(models[DENSE], 1, told, packed=True) as target:
                assert sources(target.wait()) == {"peer"}
                stock.wait()
                assert visible(target) == visible(stock)
                assert target.tokens() == stock.tokens()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_other_kinds_of_models(
    models: dict[str, Path], fleet: Fleet, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A vision tower, Mamba, a classifier, from TP1 to TP2. The target's directory is another, of the same model."""
    fleet.close()
    again = tmp_path / "again"
    shutil.copytree(models[kind], again)
    with serve("127.0.0.1:0") as coordinator, Vllm(models[kind], 1, {"url": coordinator.address}, **ARGUMENTS[kind]) as seed:
        seed.wait()
        told = {"url": coordinator.address, "source": False}
        with Vllm(again, 2, told, **ARGUMENTS[kind]) as target, Vllm(models[kind], 2, **ARGUMENTS[kind]) as stock:
            target.wait()
            assert "peer" in sources(target)
            # Mamba's A is computed, and no rank of another TP has it: vLLM makes it from disk.
            left = re.findall(r"no seed has (\d+) derived tensors \((\S+):", target.log)
            assert left == ([("1", "model.layers.0.mamba.A")] if kind == "GraniteMoeHybrid" else [])
            assert "100.0 % of its bytes verified" in target.log
            stock.wait()
            assert target.sha256() == stock.sha256()
            if "runner" not in ARGUMENTS[kind]:
                assert target.tokens() == stock.tokens()
        with CoordinatorClient(coordinator.address) as client:
            assert len(client.status().holdings) == 1
            assert [seed.withdraw(), seed.withdraw()] == [[True], [False]]
            assert not client.status().holdings
    record_property("cell", {"engine": "vllm", "family": kind, "seed_tp": 1, "tp": 2})


def visible(instance: Vllm) -> list[dict[str, str]]:
    """[ranks], sha256 by path, but for the tensors that hold an address of packed weights: those differ between any two loads."""
    return [{path: sha for path, sha in rank.items() if not path.endswith(".handler_tensor")} for rank in instance.sha256()]
