"""Every family's bytes, in one process: a TP1 rank that a worker has loaded from disk feeds a rank of TP2, which then holds in
every tensor, buffers and plain attributes included, what SGLang's own load from disk puts there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed here: ./dev engines makes an environment for it")

from safetensors import safe_open
from test_layouts import DROPPED, REFUSED, family
from torch import nn

from peerload.config import Config
from peerload.coordinator.server import serve
from peerload.engines.sglang.loader import finishing
from peerload.engines.sglang.offline import VERSION, build, load_weights, rank_of
from peerload.engines.worker import Identity, Launch, NotFollowed, Worker
from peerload.model.catalog import Parallel
from peerload.testing.families import FAMILIES, write_family
from peerload.tracing.reachable import reachable_tensors


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve("127.0.0.1:0") as coordinator:
        yield coordinator.address


def worker(url: str, directory: Path, parallel: Parallel, instance: str, model: nn.Module) -> Worker:
    """Of one rank, which is alone in its instance as far as agreeing goes."""
    identity = Identity(VERSION, Launch(instance, f"{instance} of {directory}"), parallel, 0, 1)
    config = Config(url=url, retain_bytes=1 << 30, threads=1, transport="local")
    return Worker(identity, config, lambda: directory, engine_loader=load_weights, finish=finishing(model))


def sha256(model: nn.Module) -> dict[str, str]:
    found = {}
    for path, tensor in reachable_tensors(model).items():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found[path] = hashlib.sha256(f"{tensor.shape} {tensor.dtype} ".encode() + flat.numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED and name not in DROPPED])
def test_a_rank_of_tp2_is_fed_by_tp1(tmp_path: Path, url: str, name: str, record_property: Callable[[str, object], None]) -> None:
    found, split = family(name), Parallel(tp=2)
    directory = write_family(tmp_path / name, found)
    with rank_of(directory, split, 1) as config, safe_open(directory / "model.safetensors", "pt") as stored:
        stock = build(config, "cpu")
        load_weights(stock, ((name, stored.get_tensor(name)) for name in stored.keys()))  # noqa: SIM118 - no mapping
        expected = sha256(stock)
    with rank_of(directory, Parallel(), 0) as config:
        model = build(config, "cpu")
        seed = worker(url, directory, Parallel(), "seed", model)
        seed.load(model)
        assert seed.serve(model) is not None
    with rank_of(directory, split, 1) as config:
        model = build(config, "cpu")
        target = worker(url, directory, split, "target", model)
        receipt = target.load(model)
        target.close()
    seed.close()
    assert sha256(model) == expected
    assert sum(read.nbytes for source, read in receipt.sources.items() if source.startswith("disk:")) == 0
    record_property(
        "cell",
        {
            "engine": "sglang",
            "family": found.architecture,
            "quantization": found.quantization,
            "seed_tp": 1,
            "tp": 2,
            "made_by_the_engine": len(receipt.left),
        },
    )


@pytest.mark.parametrize("name", DROPPED)
def test_what_sglang_does_not_load_whole_is_left_to_it(tmp_path: Path, url: str, name: str) -> None:
    directory = write_family(tmp_path / name, family(name))
    with rank_of(directory, Parallel(), 0) as config:
        model = build(config, "cpu")
        with pytest.raises(NotFollowed, match="loader doesn't write it, and skips"):
            worker(url, directory, Parallel(), "seed", model).load(model)
