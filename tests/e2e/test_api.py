"""`peerload.load` and `peerload.seed` between real processes: transformers models whole, tensor- and expert-parallel, a
trainer's `fully_shard`, quantized. Every byte is compared with the engine's own load of the same checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from conftest import coordinator_process

import peerload

pytestmark = pytest.mark.e2e

distributed = pytest.importorskip("transformers.distributed")
newer = pytest.mark.skipif(not hasattr(distributed.DistributedConfig, "ep_size"), reason="this transformers can't load it itself")

PROMPT = [17, 42, 300, 5, 88]
NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One instance. how: "plain", or "tp", "ep" (transformers' own split), "fsdp" (a trainer's `fully_shard`), "fsdp+tp".
    dtype: of the parameters ("" as in the checkpoint). keep: quantized weights are kept as on an accelerator, not dequantized
    as on a CPU; such a model has all its bytes, but can't run here."""

    directory: Path
    how: str = "plain"
    size: int = 1
    dtype: str = ""
    config: dict[str, Any]
    rendezvous: str = ""
    keep: bool = False


def built(spec: Spec) -> Any:
    """The model by the engine's own load from disk, distributed as `spec` says."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from peerload.engines.quantized import kept

    ways = {
        "tp": {"tp_plan": "auto", "tp_size": spec.size},
        "ep": {"tp_plan": "auto", "tp_size": spec.size, "ep_size": spec.size},
        "fsdp+tp": {"tp_plan": "auto", "tp_size": 2, "fsdp_size": 2},
    }
    split = {"distributed_config": DistributedConfig(**ways[spec.how])} if spec.how in ways else {}
    with kept(spec.keep):
        dtype = getattr(torch, spec.dtype) if spec.dtype else "auto"
        model = AutoModelForCausalLM.from_pretrained(spec.directory, dtype=dtype, **split)
    if spec.how == "fsdp":
        mesh = init_device_mesh("cpu", (spec.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def wipe(model: Any) -> None:
    import torch

    from peerload.engines.transformers import parameters_of

    loaded = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, tensor in parameters_of(model).items():
            if name in loaded:
                tensor.view(torch.uint8).fill_(0xAB) if tensor.dim() else tensor.fill_(7)


def differing(a: Any, b: Any) -> list[str]:
    """Names of parameters and buffers of which not every byte is equal."""
    import torch

    from peerload.engines.transformers import parameters_of

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
    from peerload.engines.transformers import greedy

    stock, model = built(spec), built(spec)
    wipe(model)
    receipt = peerload.load(model, spec.config)
    wrong = differing(model, stock)
    tokens = None if spec.keep else (greedy(model, PROMPT, NEW_TOKENS), greedy(stock, PROMPT, NEW_TOKENS))
    link.send((receipt.to_dict(), wrong, tokens))


def offer(spec: Spec, link: Connection) -> None:
    """Seed the engine's own load. "halve": change the weights on all ranks. "step": a trainer's forward and backward."""
    import torch

    model = built(spec)
    with peerload.seed(model, spec.config) as seed:
        link.send(sorted(seed.layout.buffer_names))
        while (order := link.recv()) != "end":
            if order == "halve":
                with seed.changing(), torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.5)
            elif order == "step":
                model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
            link.send("done")


def refuse(spec: Spec, link: Connection) -> None:
    """As `load`, of a model that lacks a layer on rank 1: what each rank raises."""
    import torch.distributed as dist

    model = built(spec)
    if dist.get_rank() == 1:
        del model.model.norm
    try:
        peerload.load(model, spec.config)
    except peerload.PeerloadError as error:
        link.send((type(error).__name__, str(error)))


def halved(spec: Spec, link: Connection) -> None:
    """As `load`, of weights that a seed has halved."""
    import torch

    stock, model = built(spec), built(spec)
    wipe(model)
    receipt = peerload.load(model, spec.config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(0.5)
    link.send((receipt.to_dict(), differing(model, stock), None))


def run_rank(act: Any, spec: Spec, rank: int, link: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(spec.size))
    try:
        if spec.size > 1:
            dist.init_process_group("gloo", init_method=f"file://{spec.rendezvous}", rank=rank, world_size=spec.size)
        act(spec, link)
        if spec.size > 1:
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the test's process hears of it
        link.send(RuntimeError(traceback.format_exc()))


class Instance:
    """The ranks of `spec`, each in a process that runs `act`."""

    def __init__(self, act: Any, spec: Spec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["peerload.engines.api", "transformers.models.llama.modeling_llama"])
        self._directory = tempfile.TemporaryDirectory()
        spec = replace(spec, rendezvous=f"{self._directory.name}/rendezvous")
        pairs = [context.Pipe() for _ in range(spec.size)]
        self._links = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=run_rank, args=(act, spec, rank, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def hear(self) -> list[Any]:
        """What each rank says next, by rank."""
        said = []
        for link in self._links:
            assert link.poll(120), "a rank says nothing"
            said.append(link.recv())
        problems = [str(words) for words in said if isinstance(words, BaseException)]
        assert not problems, "\n".join(problems)
        return said

    def ask(self, order: str) -> None:
        for link in self._links:
            link.send(order)
        assert self.hear() == ["done"] * len(self._links)

    def close(self) -> None:
        for link, process in zip(self._links, self._processes, strict=True):
            if process.is_alive():
                try:
                    link.send("end")
                except OSError:
                    continue
        for process in self._processes:
            process.join(15)
            if process.is_alive():
                process.kill()
        self._directory.cleanup()


@contextmanager
def running(act: Any, spec: Spec) -> Iterator[Instance]:
    instance = Instance(act, spec)
    try:
        yield instance
    finally:
        instance.close()


def results(act: Any, spec: Spec) -> list[Any]:
    with running(act, spec) as instance:
        return instance.hear()


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


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with coordinator_process() as (_, address):
        yield address


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def checkpoint(models: Path, family: str, **changes: Any) -> Path:
    from peerload.testing.checkpoints import make_checkpoint

    name = "-".join([family, *changes])
    return models / name if (models / name).is_dir() else make_checkpoint(models / name, family, **changes)


def published(models: Path, family: str) -> Path:
    """A checkpoint named and typed as published ones are."""
    from peerload.testing.families import FAMILIES, write_family

    return models / family if (models / family).is_dir() else write_family(models / family, FAMILIES[family])


def test_tensor_parallel_seed(url: str, models: Path) -> None:
    """A TP2 instance feeds one that isn't split, one of TP2, and a trainer's ranks; tokens included."""
    spec = Spec(directory=checkpoint(models, "llama"), how="tp", size=2, config={"url": url, "fallback": "fail"})
    with running(offer, spec) as seed:
        assert "model.norm.weight" in seed.hear()[0]
        targets = [spec, replace(spec, how="plain", size=1), replace(spec, how="fsdp")]
        with ExitStack() as stack:
            for target in [stack.enter_context(running(load, target)) for target in targets]:
                check(target.hear())


@newer
def test_experts(url: str, models: Path) -> None:
    """Stacked experts, cut by tensor and by expert parallelism, out of a whole model and back."""
    directory, config = checkpoint(models, "qwen3_moe"), {"url": url, "fallback": "fail"}
    whole = Spec(directory=directory, config=config)
    with running(offer, whole) as seed:
        seed.hear()
        check(results(load, replace(whole, how="tp", size=2)))
    with running(offer, replace(whole, how="ep", size=2)) as seed:
        seed.hear()
        check(results(load, whole))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_more_experts(url: str, models: Path, family: str) -> None:
    """Experts stored one by one, or stacked already; a router's bias that the engine keeps in another dtype."""
    spec = Spec(directory=published(models, family), config={"url": url, "fallback": "fail"})
    with running(offer, replace(spec, how="tp", size=2)) as seed:
        seed.hear()
        check(results(load, spec))


def test_a_trainer_feeds_inference(url: str, models: Path) -> None:
    """Two ranks of `fully_shard`, F32 masters, tied embeddings: offered in BF16 in place of what the checkpoint has, also
    after a step of training has gathered parameters, and after the weights have changed."""
    directory = checkpoint(models, "qwen3_moe", tie_word_embeddings=True)
    config = {"url": url, "fallback": "fail", "revision": "run-1"}
    target = Spec(directory=directory, config=config)
    with running(offer, replace(target, how="fsdp", size=2, dtype="float32")) as trainer:
        names, _ = trainer.hear()
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
        check(results(load, target))
        trainer.ask("step")
        trainer.ask("halve")
        check(results(halved, replace(target, how="tp", size=2)))


@newer
def test_a_trainer_of_two_dimensions(url: str, models: Path) -> None:
    """FSDP over tensor parallelism: parts of parts."""
    spec = Spec(directory=checkpoint(models, "llama"), config={"url": url, "fallback": "fail", "revision": "run-2"})
    with running(offer, replace(spec, how="fsdp+tp", size=4)) as trainer:
        trainer.hear()
        check(results(load, spec))


@pytest.mark.parametrize("family", ["llama-fp8-block", "qwen3-moe-fp8-block"])
def test_fp8(url: str, models: Path, family: str) -> None:
    """Block-quantized weights and their scales, kept as the checkpoint has them, from TP2 to one and back."""
    spec = Spec(directory=published(models, family), config={"url": url, "fallback": "fail"}, keep=True)
    with running(offer, replace(spec, how="tp", size=2)) as seed:
        assert any(name.endswith("scale_inv") for name in seed.hear()[0])
        check(results(load, spec))
    with running(offer, spec) as seed:
        seed.hear()
        check(results(load, replace(spec, how="tp", size=2)))


def test_a_process_that_may_not_be_a_source(url: str, models: Path) -> None:
    """Its block runs, and nobody finds it."""
    spec = Spec(directory=checkpoint(models, "llama"), config={"url": url, "revision": "secret", "source": False})
    with running(offer, spec) as seed:
        seed.hear()
        seed.ask("halve")
        check(results(load, spec), disk=True)


def test_nobody_is_there(url: str, models: Path) -> None:
    """The checkpoint on disk, when no seed runs and the policy allows it."""
    spec = Spec(directory=checkpoint(models, "llama"), how="tp", size=2, config={"url": url, "revision": "nobody has this"})
    check(results(load, spec), disk=True)


def test_a_rank_that_cannot_load_stops_all(url: str, models: Path) -> None:
    spec = Spec(directory=checkpoint(models, "llama"), how="tp", size=2, config={"url": url})
    first, second = results(refuse, spec)
    assert first[0] == "CommitError"
    assert "rank 1 gave up" in first[1]
    assert second == ("LayoutError", second[1])
    assert "model.norm.weight: the checkpoint has it, the model doesn't" in second[1]
