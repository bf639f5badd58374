"""`peerload.load` and `peerload.seed` between real processes: transformers models whole, tensor- and expert-parallel, a
trainer's `fully_shard`, quantized. Every byte is compared with the engine's own load of the same checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import coordinator_process

import peerload
from peerload.coordinator.client import CoordinatorClient
from peerload.engines.checkpoint import Checkpoint
from peerload.errors import ConfigError
from peerload.testing.models import RankProcesses, Spec, check, fail, halved, jam, lack, load, offer, results, spoil

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
    with RankProcesses(offer, spec) as seed:
        assert "model.norm.weight" in seed.hear()[0]
        targets = [spec, replace(spec, how="plain", size=1), replace(spec, how="fsdp")]
        with ExitStack() as stack:
            for target in [stack.enter_context(RankProcesses(load, target)) for target in targets]:
                check(target.hear())


@newer
def test_experts(url: str, models: Path) -> None:
    """Stacked experts, cut by tensor and by expert parallelism, out of a whole model and back."""
    directory, config = checkpoint(models, "qwen3_moe"), {"url": url, "fallback": "fail"}
    whole = Spec(directory=directory, config=config)
    with RankProcesses(offer, whole) as seed:
        seed.hear()
        check(results(load, replace(whole, how="tp", size=2)))
    with RankProcesses(offer, replace(whole, how="ep", size=2)) as seed:
        seed.hear()
        check(results(load, whole))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_more_experts(url: str, models: Path, family: str) -> None:
    """Experts stored one by one, or stacked already; a router's bias that the engine keeps in another dtype."""
    spec = Spec(directory=published(models, family), config={"url": url, "fallback": "fail"})
    with RankProcesses(offer, replace(spec, how="tp", size=2)) as seed:
        seed.hear()
        check(results(load, spec))


def test_a_trainer_feeds_inference(url: str, models: Path) -> None:
    """Two ranks of `fully_shard`, F32 masters, tied embeddings: offered in BF16 in place of what the checkpoint has, also
    after a step of training has gathered parameters, and after the weights have changed. While they change nobody gets any."""
    directory = checkpoint(models, "qwen3_moe", tie_word_embeddings=True)
    config = {"url": url, "fallback": "fail", "revision": "run-1"}
    target = Spec(directory=directory, config=config)
    with RankProcesses(offer, replace(target, how="fsdp", size=2, dtype="float32")) as trainer:
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
    with RankProcesses(offer, replace(spec, how="fsdp+tp", size=4)) as trainer:
        trainer.hear()
        check(results(load, spec))


@pytest.mark.parametrize("family", ["llama-fp8-block", "qwen3-moe-fp8-block"])
def test_fp8(url: str, models: Path, family: str) -> None:
    """Block-quantized weights and their scales, kept as the checkpoint has them, from TP2 to one and back."""
    spec = Spec(directory=published(models, family), config={"url": url, "fallback": "fail"}, keep=True)
    with RankProcesses(offer, replace(spec, how="tp", size=2)) as seed:
        assert any(name.endswith("scale_inv") for name in seed.hear()[0])
        check(results(load, spec))
    with RankProcesses(offer, spec) as seed:
        seed.hear()
        check(results(load, replace(spec, how="tp", size=2)))


def opened(directory: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=how.pop("dtype", "auto"), **how)


def offered(url: str) -> set[str]:
    with CoordinatorClient(url) as client:
        return {str(h.model) for h in client.status().holdings}


@pytest.mark.parametrize("much", ["samples", "all"])
def test_changed_weights_are_not_offered_as_the_checkpoints(url: str, models: Path, much: str) -> None:
    """They are once they have a revision of their own."""
    directory = checkpoint(models, "llama")
    model, own = opened(directory), Checkpoint.open(directory).key()
    with peerload.seed(model, {"url": url}, check=much) as seed:
        assert seed.model == own
        assert str(own) in offered(url)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    refused = pytest.raises(
        ConfigError, match=rf"^{name}\[\d+:\d+, \d+:\d+\] on rank 0 isn't what the checkpoint {directory} has"
    )
    with refused as caught, peerload.seed(model, {"url": url}, check=much):
        pass
    assert "set `revision`" in str(caught.value)
    assert str(own) not in offered(url)
    with peerload.seed(model, {"url": url, "revision": f"twice-{much}"}, check=much):
        assert f"llama@twice-{much}" in offered(url)


def test_one_changed_element_is_found_when_all_are_compared(url: str, models: Path) -> None:
    model = opened(checkpoint(models, "llama"))
    name = "model.layers.0.mlp.down_proj.weight"
    last = ", ".join(f"{n - 1}:{n}" for n in model.get_parameter(name).shape)
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] += 1
    refused = pytest.raises(ConfigError, match=rf"^{name}\[{last}\] .*\(1 of ")
    with refused, peerload.seed(model, {"url": url}, check="all"):
        pass


def test_casts_are_the_checkpoints_if_they_lose_nothing(url: str, models: Path) -> None:
    """A BF16 checkpoint in F32 is offered in BF16 again; in F16 it isn't the same any more."""
    directory = checkpoint(models, "llama")
    with peerload.seed(opened(directory, dtype=torch.float32), {"url": url}, check="all"):
        pass
    model = opened(directory, dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e-7)
    with pytest.raises(ConfigError, match="trained or cast"), peerload.seed(model, {"url": url}):
        pass


def test_if_one_ranks_weights_differ_no_rank_is_a_seed(url: str, models: Path) -> None:
    first, second = results(spoil, Spec(directory=checkpoint(models, "llama"), how="tp", size=2, config={"url": url}))
    assert first[0] == "CommitError"
    assert "rank 1 gave up" in first[1]
    assert second[0] == "ConfigError"
    assert second[1].startswith("model.norm.weight[")
    assert "on rank 1" in second[1]


def test_if_one_rank_cannot_begin_a_change_no_rank_waits_for_it(url: str, models: Path) -> None:
    config = {"url": url, "revision": "jammed"}
    first, second = results(jam, Spec(directory=checkpoint(models, "llama"), how="tp", size=2, config=config))
    assert first[0] == "CommitError"
    assert f"rank 1 gave up, so rank 0 does: {second[0]}" in first[1]
    assert second[0]
    assert "llama@jammed" not in offered(url)


def test_without_a_checkpoint_weights_need_a_revision(url: str, models: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint(models, "llama")), dtype=torch.bfloat16)
    model.config.name_or_path = ""
    for config in ({"model_name": "new"}, {"revision": "1"}):
        with pytest.raises(ConfigError, match=r"set (`revision`|model_name)"), peerload.seed(model, {"url": url, **config}):
            pass
    with peerload.seed(model, {"url": url, "model_name": "new", "revision": "1"}):
        assert "new@1" in offered(url)


def test_a_copy_in_another_directory_is_the_same_model(url: str, models: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(checkpoint(models, "llama"), again)
    config = {"url": url, "fallback": "fail"}
    with RankProcesses(offer, Spec(directory=checkpoint(models, "llama"), config=config)) as seed:
        seed.hear()
        check(results(load, Spec(directory=again, config=config)))


def test_a_process_that_may_not_be_a_source(url: str, models: Path) -> None:
    """Its block runs, and nobody finds it."""
    spec = Spec(directory=checkpoint(models, "llama"), config={"url": url, "revision": "secret", "source": False})
    with RankProcesses(offer, spec) as seed:
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
