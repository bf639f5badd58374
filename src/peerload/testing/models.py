"""Instances of transformers models in real processes, for tests of `peerload.load` and `peerload.seed`.

    with RankProcesses(offer, spec) as seed:
        seed.hear()
        check(results(load, replace(spec, how="tp", size=2)))

`offer`, `load`, `halved`, `spoil`, `fail` and `lack` are what a rank can be told to do; every byte that arrives is compared with
the engine's own load of the same checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import peerload

from ..engines.transformers.open import greedy, parameters_of
from ..engines.transformers.quantized import kept
from .processes import Child, close_all, hear_all, orders

PROMPT: Final = [17, 42, 300, 5, 88]
NEW_TOKENS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One instance. how: "plain", or "tp", "ep" (transformers' own split), "fsdp" (a trainer's `fully_shard`), "fsdp+tp".
    dtype: of the parameters ("" as in the checkpoint). keep: quantized weights are kept as on an accelerator, not dequantized
    as on a CPU; such a model has all its bytes, but can't run here. device: "cpu", or "cuda": rank r on the r-th GPU."""

    directory: Path
    how: str = "plain"
    size: int = 1
    dtype: str = ""
    config: dict[str, Any]
    rendezvous: str = ""
    keep: bool = False
    device: str = "cpu"


#: What a rank's process does, saying what it has found over the connection.
Act: TypeAlias = Callable[["Spec", Connection], None]


def built(spec: Spec) -> PreTrainedModel:
    """The model by the engine's own load from disk, distributed as `spec` says."""
    ways: dict[str, dict[str, Any]] = {
        "tp": {"tp_plan": "auto", "tp_size": spec.size},
        "ep": {"tp_plan": "auto", "tp_size": spec.size, "ep_size": spec.size},
        "fsdp+tp": {"tp_plan": "auto", "tp_size": 2, "fsdp_size": 2},
    }
    split = {"distributed_config": DistributedConfig(**ways[spec.how])} if spec.how in ways else {}
    with kept(spec.keep):
        dtype = getattr(torch, spec.dtype) if spec.dtype else "auto"
        model = AutoModelForCausalLM.from_pretrained(spec.directory, dtype=dtype, **split)
    if spec.device != "cpu":
        model.to(spec.device)  # type: ignore[arg-type]
    if spec.how == "fsdp":
        mesh = init_device_mesh(spec.device, (spec.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def wipe(model: PreTrainedModel) -> None:
    loaded = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, tensor in parameters_of(model).items():
            if name in loaded:
                tensor.view(torch.uint8).fill_(0xAB) if tensor.dim() else tensor.fill_(7)


def differing(a: PreTrainedModel, b: PreTrainedModel) -> list[str]:
    """Names of parameters and buffers of which not every byte is equal."""
    ours, theirs = parameters_of(a), parameters_of(b)
    assert list(ours) == list(theirs)
    return [
        name
        for name, x in ours.items()
        if (x.shape, x.stride(), x.dtype) != (theirs[name].shape, theirs[name].stride(), theirs[name].dtype)
        or not torch.equal(x.detach().reshape(-1).view(torch.uint8), theirs[name].detach().reshape(-1).view(torch.uint8))
    ]


def load(spec: Spec, link: Connection) -> None:
    """Load a wiped model through the API, next to one by the engine's own load, and tell how they compare."""
    stock, model = built(spec), built(spec)
    wipe(model)
    receipt = peerload.load(model, spec.config)
    wrong = differing(model, stock)
    tokens = None if spec.keep else (greedy(model, PROMPT, NEW_TOKENS), greedy(stock, PROMPT, NEW_TOKENS))
    link.send((receipt.to_dict(), wrong, tokens))


def offer(spec: Spec, link: Connection) -> None:
    """Seed the engine's own load. "halve": change the weights on all ranks. "hold": be about to, until told to go on. "step": a
    trainer's forward and backward."""
    model = built(spec)
    with peerload.seed(model, spec.config) as seed:
        link.send(sorted(seed.layout.buffer_names))
        for order in orders(link):
            if order == "halve":
                with seed.changing(), torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.5)
            elif order == "hold":
                with seed.changing():
                    link.send("done")
                    link.recv()
            elif order == "step":
                ids = torch.tensor([PROMPT], device=spec.device)
                model(ids, labels=ids).loss.backward()
            link.send("done")


def spoil(spec: Spec, link: Connection) -> None:
    """Try to seed weights of which rank 1's norm isn't the checkpoint's: what each rank raises."""
    model = built(spec)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
    try:
        with peerload.seed(model, spec.config):
            link.send(("", "it succeeds"))
    except peerload.PeerloadError as error:
        link.send((type(error).__name__, str(error)))


def jam(spec: Spec, link: Connection) -> None:
    """Change the weights of a seed of which rank 1 can't withdraw the old ones: what each rank raises."""
    model = built(spec)
    try:
        with peerload.seed(model, spec.config) as seed:
            if dist.get_rank() == 1:
                assert seed._seed is not None, "it is a source"
                seed._seed._fence.close()
            with seed.changing():
                link.send(("", "it succeeds"))
    except Exception as error:
        link.send((type(error).__name__, str(error)))


def fail(spec: Spec, link: Connection) -> None:
    """A load that can't succeed: what each rank raises."""
    _try(built(spec), spec, link)


def lack(spec: Spec, link: Connection) -> None:
    """As `fail`, of a model of which rank 1 lacks a layer."""
    model = built(spec)
    if dist.get_rank() == 1:
        del model.model.norm
    _try(model, spec, link)


def _try(model: PreTrainedModel, spec: Spec, link: Connection) -> None:
    try:
        peerload.load(model, spec.config)
        link.send(("", "it succeeds"))
    except peerload.PeerloadError as error:
        link.send((type(error).__name__, str(error)))


def halved(spec: Spec, link: Connection) -> None:
    """As `load`, of weights that a seed has halved."""
    stock, model = built(spec), built(spec)
    wipe(model)
    receipt = peerload.load(model, spec.config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(0.5)
    link.send((receipt.to_dict(), differing(model, stock), None))


def run_rank(act: Act, spec: Spec, rank: int, link: Connection) -> None:
    """`act` in this process, which is a rank of the group that `spec` describes."""
    torch.set_num_threads(1)
    if spec.device != "cpu":
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(spec.size))
    if spec.size > 1:
        backend = "gloo" if spec.device == "cpu" else f"cpu:gloo,{spec.device}:nccl"
        dist.init_process_group(backend, init_method=f"file://{spec.rendezvous}", rank=rank, world_size=spec.size)
    act(spec, link)
    if spec.size > 1:
        dist.destroy_process_group()


class RankProcesses:
    """The ranks of `spec`, each in a process that runs `act`, until the block ends."""

    def __init__(self, act: Act, spec: Spec) -> None:
        self._directory = tempfile.TemporaryDirectory()
        spec = replace(spec, rendezvous=f"{self._directory.name}/rendezvous")
        self._ranks = [
            Child(f"{__name__}:run_rank", act, spec, rank, name=f"rank {rank} of {act.__name__}") for rank in range(spec.size)
        ]

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._ranks)
        self._directory.cleanup()

    def hear(self) -> list[Any]:
        """What each rank says next, by rank."""
        return hear_all(self._ranks, 120)

    def ask(self, order: str) -> None:
        for rank in self._ranks:
            rank.tell(order)
        assert self.hear() == ["done"] * len(self._ranks)


def results(act: Act, spec: Spec) -> list[Any]:
    with RankProcesses(act, spec) as ranks:
        return ranks.hear()


def check(found: Sequence[Any], *, disk: bool = False) -> None:
    for receipt, wrong, tokens in found:
        assert wrong == []
        assert receipt["needed_nbytes"] > 100_000
        assert receipt["verified_nbytes"] == (0 if disk else receipt["needed_nbytes"])
        assert all(name.startswith("disk:") == disk for name in receipt["sources"])
        if tokens is not None:
            ours, stock = tokens
            assert len(ours) == NEW_TOKENS
            assert ours == stock
    assert len({receipt["digest"] for receipt, _, _ in found}) == 1
