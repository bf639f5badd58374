"""Real SGLang instances load from each other at other TP sizes, and end up with every tensor as after a load from disk.

One story, told in order, because starting an instance takes ten seconds and more: the first instance loads from disk, the
second from the first, later ones from the second; then nobody is left.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed here: ./dev engines makes an environment for it")

from engine import Sglang

from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import serve
from peerload.testing.families import FAMILIES, write_family

#: With two KV heads; at TP4, SGLang's CPU backend pads them to four.
DENSE, SPARSE = "llama-kv2", "qwen3-moe-kv2"
RECEIVED = re.compile(r"peerload: (\S+ \S+) from (\S+)")

pytestmark = pytest.mark.timeout(600)


class Fleet:
    """Instances started once and shared by the tests, which all know one coordinator."""

    def __init__(self, root: Path, url: str, stack: ExitStack) -> None:
        self.url, self._stack, self._root = url, stack, root
        self.model = cache(self._model)
        self.stock = cache(self._stock)
        self.first = cache(lambda model: self._start(model, 1, fallback="disk"))
        self.second = cache(lambda model: self._after(self.first(model), self._start(model, 2)))

    def target(self, model: str, tp: int, **config: object) -> Sglang:
        """One that can load from peers only and is no seed, not entered."""
        return Sglang(self.model(model), tp, {"url": self.url, "fallback": "fail", "source": False, **config})

    def seeds(self) -> Counter[str]:
        """How many ranks of which layout are announced."""
        with CoordinatorClient(self.url) as client:
            return Counter(str(h.parallel) for h in client.status().holdings)

    def _model(self, name: str) -> Path:
        return write_family(self._root / name, FAMILIES[name])

    def _start(self, model: str, tp: int, **config: object) -> Sglang:
        return self._stack.enter_context(self.target(model, tp, source=True, **config)).wait()

    def _stock(self, model: str, tp: int) -> tuple[list[dict[str, str]], list[list[int]]]:
        """sha256 by rank and tensor, and tokens, of an instance that SGLang has loaded from disk by itself."""
        with Sglang(self.model(model), tp) as running:
            running.wait()
            return running.sha256(), running.tokens()

    @staticmethod
    def _after(_: Sglang, then: Sglang) -> Sglang:
        return then


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        coordinator = stack.enter_context(serve("127.0.0.1:0"))
        yield Fleet(tmp_path_factory.mktemp("models"), coordinator.address, stack)


def sources(instance: Sglang) -> set[str]:
    """Where its bytes came from, by its log: "disk" or "peer"."""
    return {"disk" if source.startswith("disk:") else "peer" for _, source in RECEIVED.findall(instance.log)}


def assert_equals_stock(fleet: Fleet, model: str, tp: int, instance: Sglang) -> None:
    tensors, tokens = fleet.stock(model, tp)
    mine = instance.sha256()
    assert len(mine) == tp
    assert [sorted(rank) for rank in mine] == [sorted(rank) for rank in tensors]
    wrong = [f"rank {r}: {path}" for r, rank in enumerate(tensors) for path, sha in rank.items() if mine[r][path] != sha]
    assert not wrong
    assert instance.tokens() == tokens


def assert_all_from_peers(instance: Sglang, tp: int) -> None:
    assert sources(instance) == {"peer"}
    assert re.search(rf"rank 0: 100\.0 % of its bytes verified.* {tp} ranks have committed", instance.log)


def test_without_a_seed_it_loads_from_disk_and_becomes_one(fleet: Fleet) -> None:
    first = fleet.first(DENSE)
    assert sources(first) == {"disk"}
    assert fleet.seeds() == {"tp=1": 1}
    assert_equals_stock(fleet, DENSE, 1, first)


def test_a_second_one_loads_from_the_first_at_tp2(fleet: Fleet, record_property: Callable[[str, object], None]) -> None:
    second = fleet.second(DENSE)
    assert_all_from_peers(second, 2)
    assert fleet.seeds() == {"tp=1": 1, "tp=2": 2}
    assert_equals_stock(fleet, DENSE, 2, second)
    record_property("cell", {"engine": "sglang", "family": DENSE, "seed_tp": 1, "tp": 2})


def test_a_seed_whose_weights_are_updated_is_one_no_longer(fleet: Fleet) -> None:
    """The update itself is SGLang's own, of the same weights."""
    first = fleet.first(DENSE)
    fleet.second(DENSE)
    success, message = first.update(fleet.model(DENSE))
    assert success, message
    assert fleet.seeds() == {"tp=2": 2}
    assert "the weights are about to change: this rank is no seed any more" in first.log
    assert_equals_stock(fleet, DENSE, 1, first)
    first.kill()


@pytest.mark.parametrize("tp", [1, 4])
def test_others_load_from_the_second(fleet: Fleet, tp: int, record_property: Callable[[str, object], None]) -> None:
    fleet.second(DENSE)
    assert fleet.seeds() == {"tp=2": 2}
    fleet.stock(DENSE, tp)
    with fleet.target(DENSE, tp) as target:
        assert_all_from_peers(target.wait(), tp)
        assert_equals_stock(fleet, DENSE, tp, target)
    record_property("cell", {"engine": "sglang", "family": DENSE, "seed_tp": 2, "tp": tp})


def test_a_seed_that_has_been_killed_is_replaced_by_the_checkpoint(fleet: Fleet) -> None:
    fleet.second(DENSE).kill()
    assert fleet.seeds() == {"tp=2": 2}, "its lease has not run out yet"
    with fleet.target(DENSE, 1, fallback="disk") as target:
        assert sources(target.wait()) == {"disk"}
        assert_equals_stock(fleet, DENSE, 1, target)


def test_when_the_coordinator_is_lost_after_the_launch_it_loads_from_disk(fleet: Fleet) -> None:
    """While all ranks wait for a seed. SGLang builds its model anew, and loads it as ever."""
    fleet.stock(DENSE, 2)
    with ExitStack() as stack:
        coordinator = stack.enter_context(serve("127.0.0.1:0"))
        config = {"url": coordinator.address, "wait_s": 600.0, "deadline_s": 15.0}
        with Sglang(fleet.model(DENSE), 2, config) as target:
            while "(traced in " not in target.log:
                time.sleep(0.1)
            stack.close()
            target.wait()
            assert len(re.findall("SGLang loads it from disk, and this instance is no seed of it", target.log)) == 2
            assert_equals_stock(fleet, DENSE, 2, target)


def test_without_a_coordinator_no_model_is_built_in_vain(fleet: Fleet) -> None:
    with Sglang(fleet.model(DENSE), 1, {"url": "127.0.0.1:1"}) as target:
        target.wait()
        assert re.search(r"127\.0\.0\.1:1 .*SGLang loads it from disk", target.log)
        assert "traced in" not in target.log
        assert_equals_stock(fleet, DENSE, 1, target)


def test_experts_are_split_too(fleet: Fleet, record_property: Callable[[str, object], None]) -> None:
    fleet.stock(SPARSE, 2)
    fleet.first(SPARSE)
    with fleet.target(SPARSE, 2) as target:
        assert_all_from_peers(target.wait(), 2)
        assert_equals_stock(fleet, SPARSE, 2, target)
    record_property("cell", {"engine": "sglang", "family": SPARSE, "seed_tp": 1, "tp": 2})
