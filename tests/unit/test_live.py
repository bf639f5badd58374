"""Models that exist, described in place: what is refused, by name, and what a public API has to be like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers.distributed")

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import peerload
from peerload.engines.checkpoint import Checkpoint, ModelFiles
from peerload.engines.transformers.api import settings_of
from peerload.engines.transformers.live import live_model
from peerload.errors import ConfigError, LayoutError
from peerload.testing.checkpoints import make_checkpoint, model_config
from peerload.testing.families import FAMILIES, write_family


def made(family: Any = "llama", **changes: Any) -> Any:
    values = model_config(family, **changes)
    config = getattr(transformers, f"{values['architectures'][0].removesuffix('ForCausalLM')}Config").from_dict(values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_importing_does_nothing() -> None:
    """Not even NumPy is imported."""
    code = """
import sys
import peerload
assert not {"torch", "numpy", "grpc", "transformers"} & sys.modules.keys()
assert {"load", "seed", "Config", "Receipt", "PeerloadError", "ModelSeed"} <= set(dir(peerload))
from peerload.job.load import Job
from peerload.job.seed import Seed
assert "torch" not in sys.modules
assert peerload.Config(url="here:1").url == "here:1"
assert callable(peerload.load) and callable(peerload.seed)
assert peerload.load.__module__ == "peerload.engines.transformers.api"
try:
    peerload.nothing
except AttributeError as error:
    assert "'nothing'" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_whole_model_is_described_in_place() -> None:
    """Without any checkpoint: in the names and shapes in which transformers would save it."""
    model = made("qwen3_moe", tie_word_embeddings=True)
    live = live_model(model)
    live.layout.prove_cover()
    assert live.layout.catalog.row.keys() >= {"model.layers.0.mlp.experts.7.up_proj.weight", "lm_head.weight"}
    assert live.layout.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert dict(zip(live.layout.buffer_names, live.address.tolist(), strict=True)) == addresses
    assert len(live.regions("per-tensor")) == len(live.regions("arena")) == len(addresses)


def test_another_dtype_has_memory_beside_the_parameter() -> None:
    files = ModelFiles({"config.json": json.dumps(model_config("llama")).encode()})
    model = made().float()
    live = live_model(model, files)
    assert len(live.shadows) == len(live.layout.buffer_names)
    assert {t.dtype for t in live.tensors.values()} == {torch.bfloat16}
    norm = model.model.norm.weight
    with torch.no_grad():
        norm.fill_(1.5)
    live.publish()
    assert (live.tensors["model.norm.weight"] == 1.5).all()
    live.tensors["model.norm.weight"].fill_(0.25)
    live.accept()
    assert norm.dtype == torch.float32
    assert (norm == 0.25).all()


def test_wrappers_of_torch_are_seen_through() -> None:
    model = made()
    plain = live_model(model).layout
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert set(live_model(torch.compile(model)).layout.buffer_names) == set(plain.buffer_names)


def test_tied_in_the_checkpoint_but_not_in_the_model() -> None:
    """Two memories of one tensor: both are filled."""
    files = ModelFiles({"config.json": json.dumps(model_config("qwen2", tie_word_embeddings=True)).encode()})
    model = made("qwen2", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    layout = live_model(model, files).layout
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(layout.buffer_names)
    layout.prove_cover()


class TestRefusals:
    def test_no_model_of_transformers(self) -> None:
        with pytest.raises(ConfigError, match="the model is a Linear, not one of transformers"):
            live_model(nn.Linear(2, 2))

    def test_no_memory(self) -> None:
        with torch.device("meta"):
            model = made()
        with pytest.raises(LayoutError, match=r"^model.embed_tokens.weight: has no memory \(device meta\)"):
            live_model(model)

    def test_another_shape(self, tmp_path: Path) -> None:
        directory = make_checkpoint(tmp_path, "llama")
        model = made(vocab_size=512)
        with pytest.raises(
            LayoutError, match=r"^model.embed_tokens.weight: has shape \(512, 96\) on this rank; of the check.*\(504, 96\)"
        ):
            live_model(model, ModelFiles.of(directory), Checkpoint.open(directory).catalog)

    def test_a_parameter_that_no_checkpoint_has(self) -> None:
        model = made()
        model.model.layers[1].mlp.adapter = nn.Linear(2, 2)
        with pytest.raises(
            LayoutError, match=r"^model.layers.1.mlp.adapter.weight: the model has it, the engine's loader doesn't"
        ):
            live_model(model)

    def test_a_tensor_that_the_model_lacks(self) -> None:
        model = made()
        del model.model.layers[1].mlp.up_proj
        with pytest.raises(LayoutError, match=r"^model.layers.1.mlp.up_proj.weight: the checkpoint has it, the model doesn't"):
            live_model(model)

    def test_scattered_elements(self) -> None:
        model = made()
        model.model.norm.weight.data = torch.zeros(192, dtype=torch.bfloat16)[::2]
        with pytest.raises(LayoutError, match=r"^model.norm.weight: its \(96,\) elements lie scattered, with strides \(2,\)"):
            live_model(model)

    def test_shared_memory_of_two_tensors(self) -> None:
        model = made()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(
            LayoutError, match=r"^model.layers.1.mlp.up_proj.weight: shares memory with model.layers.0.mlp.up_proj"
        ):
            live_model(model)

    def test_fp8_that_this_host_has_dequantized(self, tmp_path: Path) -> None:
        """Without kernels transformers computes BF16 weights as it loads: they are no tensors of the checkpoint any more."""
        directory = write_family(tmp_path, FAMILIES["llama-fp8-block"])
        model = AutoModelForCausalLM.from_pretrained(directory)
        if any(p.dtype == torch.float8_e4m3fn for p in model.parameters()):
            pytest.skip("this host has kernels for FP8")
        with pytest.raises(LayoutError, match=r"quantizer fp8 makes other weights of them while it loads: .*weight"):
            live_model(model, ModelFiles.of(directory), Checkpoint.open(directory).catalog)


class TestCalling:
    def test_a_model_without_a_name(self) -> None:
        with pytest.raises(ConfigError, match="neither a name nor a checkpoint"):
            peerload.load(made(), '{"url": "127.0.0.1:1"}')

    def test_configuration_in_any_form(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        values = {"url": "127.0.0.1:1", "revision": "one"}
        text = json.dumps(values)
        (tmp_path / "config.json").write_text(text)
        monkeypatch.setenv("PEERLOAD_CONFIG", text)
        for config in (values, peerload.Config(**values), text, str(tmp_path / "config.json"), None):
            assert settings_of(config) == peerload.Config(**values)
        with pytest.raises(ConfigError, match="unknown configuration key 'urll'"):
            peerload.load(made(), {"urll": "x"})
