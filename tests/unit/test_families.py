"""The families' tensors are those of real checkpoints: transformers, asked what it would save, says the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peerload.engines.checkpoint import Checkpoint, ModelFiles
from peerload.testing.families import FAMILIES, Family, write_family

PLAIN = [family for family in FAMILIES.values() if family.quantization == "bf16"]
QUANTIZED = [family for family in FAMILIES.values() if family.quantization != "bf16"]


@pytest.mark.parametrize("family", PLAIN, ids=str)
def test_transformers_would_save_these_tensors(family: Family) -> None:
    architecture = pytest.importorskip("peerload.engines.transformers.architecture", reason="needs transformers")
    files = ModelFiles({"config.json": json.dumps(family.config).encode()})
    assert sorted(architecture.catalog_of(files)) == sorted(family.tensors)


@pytest.mark.parametrize("family", QUANTIZED, ids=str)
def test_quantization_keeps_every_layer_and_its_size(family: Family) -> None:
    """Each matrix of the unquantized model (and of as many experts) is there, with as many weights, and nothing else is."""
    plain = FAMILIES[family.name.removesuffix(f"-{family.quantization}")]
    own = {tensor.name.rpartition(".")[0] for tensor in family.tensors}
    others = tuple(f".experts.{expert}." for expert in range(family.experts, plain.experts))
    names = [tensor.name for tensor in plain.tensors if not any(other in tensor.name for other in others)]
    assert own == {name.rpartition(".")[0] for name in names}
    packed = 8 if family.quantization in ("gptq", "awq") else 1
    for tensor in family.tensors:
        layer, _, last = tensor.name.rpartition(".")
        if tensor.dtype in ("F8_E4M3", "I8") or last == "qweight":
            rows, cols = _matrix(family, layer)
            assert tensor.shape[0] * tensor.shape[1] * packed == rows * cols, tensor


def _matrix(family: Family, layer: str) -> tuple[int, int]:
    config = {key: value for key, value in family.config.items() if isinstance(value, int)}
    hidden, head, wide = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    wide = config["moe_intermediate_size"] if ".experts." in layer else wide
    return {
        "q_proj": (config["num_attention_heads"] * head, hidden),
        "o_proj": (hidden, config["num_attention_heads"] * head),
        "k_proj": (config["num_key_value_heads"] * head, hidden),
        "v_proj": (config["num_key_value_heads"] * head, hidden),
        "down_proj": (hidden, wide),
    }.get(layer.rpartition(".")[2], (wide, hidden))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_weights_are_finite_and_scales_positive(family: Family, tmp_path) -> None:
    checkpoint = Checkpoint.open(write_family(tmp_path, family, seed=1))
    assert [t.spec for t in checkpoint.tensors] == list(family.tensors)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if tensor.is_floating_point():
            assert torch.isfinite(tensor.float()).all(), name
            assert len(tensor.float().unique()) > 1 or tensor.numel() == 1, name
        if "scale" in name.rpartition(".")[2]:
            assert (tensor > 0).all(), name


def test_a_seed_decides_the_weights_and_shards_come_with_an_index(tmp_path) -> None:
    family = FAMILIES["qwen3-moe"]
    one = load_file(write_family(tmp_path / "one", family, seed=3) / "model.safetensors")
    write_family(tmp_path / "three", family, seed=3, shards=3)
    three = Checkpoint.open(tmp_path / "three")
    assert len(three.files.path) == 3
    assert three.catalog == Checkpoint.open(tmp_path / "one").catalog
    for path in three.files.path:
        assert all(torch.equal(tensor, one[name]) for name, tensor in load_file(path).items())
    other = load_file(write_family(tmp_path / "other", family, seed=4) / "model.safetensors")
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_no_weights_when_none_are_asked_for(tmp_path) -> None:
    write_family(tmp_path, FAMILIES["llama"], weights=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
