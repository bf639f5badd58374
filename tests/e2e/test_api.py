"""`peerload.load` and `peerload.seed` between real processes: transformers models whole, tensor- and expert-parallel, a
trainer's `fully_shard`, quantized. Every byte is compared with the engine's own load of the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import coordinator_process

from peerload.testing.models import Spec, check, fail, halved, lack, load, offer, results, running

pytestmark = pytest.mark.e2e

distributed = pytest.importorskip("transformers.distributed")
newer = pytest.mark.skipif(not hasattr(distributed.DistributedConfig, "ep_size"), reason="this transformers can't load it itself")


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
    after a step of training has gathered parameters, and after the weights have changed. While they change nobody gets any."""
    directory = checkpoint(models, "qwen3_moe", tie_word_embeddings=True)
    config = {"url": url, "fallback": "fail", "revision": "run-1"}
    target = Spec(directory=directory, config=config)
    with running(offer, replace(target, how="fsdp", size=2, dtype="float32")) as trainer:
        names, _ = trainer.hear()
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
        check(results(load, target))
        trainer.ask("step")
        trainer.ask("hold")
        ((error, words),) = results(fail, target)
        assert error == "SourcesExhausted"
        assert "its weights have changed since it announced them" in words
        trainer.ask("go on")
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
    first, second = results(lack, spec)
    assert first[0] == "CommitError"
    assert "rank 1 gave up" in first[1]
    assert second == ("LayoutError", second[1])
    assert "model.norm.weight: the checkpoint has it, the model doesn't" in second[1]
