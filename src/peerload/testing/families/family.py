"""A family: what it is and how its files are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...model.catalog import Catalog, TensorSpec
from ...tracing.dtypes import DTYPES


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A model: `config` is its config.json, `tensors` are its checkpoint's, by name. `architecture` and `quantization` are
    the words for people; `experts` counts routed ones, 0 for a dense model."""

    name: str
    architecture: str
    config: Mapping[str, object]
    tensors: tuple[TensorSpec, ...]
    quantization: str = "bf16"
    experts: int = 0
    kv_heads: int = 4

    @property
    def catalog(self) -> Catalog:
        return Catalog.of(self.tensors)

    def __str__(self) -> str:
        return self.name


def write_family(directory: str | Path, family: Family, seed: int = 0, *, weights: bool = True, shards: int = 1) -> Path:
    """Write config.json, and with `weights` random tensors: the same for the same `seed`, finite, scales positive, so that the
    engine can also run the model. More than one shard comes with its index. The directory is made; its path is returned."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(family.config, indent=1))
    if not weights:
        return directory
    from safetensors.torch import save_file

    random, files = torch.Generator().manual_seed(seed), {}
    step = -(-len(family.tensors) // shards)
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {spec.name: values(spec, random) for spec in family.tensors[shard * step : (shard + 1) * step]}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
    if shards > 1:
        nbytes = sum(math.prod(spec.shape) * DTYPES[spec.dtype].itemsize for spec in family.tensors)
        index = {"metadata": {"total_size": nbytes}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def values(spec: TensorSpec, random: torch.Generator) -> torch.Tensor:
    """Norms near 1, small biases, unit-variance embeddings; quantized integers and floats use their whole range, and their
    scales are such that matrices about keep the variance of what they multiply, whatever their size."""
    name, dtype, shape = spec
    kind = DTYPES[dtype]
    noise: torch.Tensor = torch.randn(shape, generator=random)
    even = 0.5 + torch.rand(shape, generator=random)
    if name.endswith("g_idx"):
        return torch.arange(shape[0], dtype=kind) // 128
    if name.endswith("qzeros"):
        return torch.full(shape, 0x77777777, dtype=kind)  # zero is 8 in GPTQ, which stores one less, and 7 in AWQ
    if dtype == "I32":
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int64).to(kind)
    if dtype == "I8":
        return torch.randint(-127, 128, shape, generator=random, dtype=kind)
    if dtype == "F8_E4M3":
        return (noise * 100).clamp(-448, 448).to(kind)
    if name.endswith("input_scale"):
        return (0.02 * even).to(kind)
    if "scale" in name.rpartition(".")[2]:
        return (0.02 * even if name.endswith("scales") else 0.0015 * even).to(kind)
    if name.endswith("A_log"):
        return (even * 2).to(kind)
    if "norm" in name or ".ln_" in name:
        return ((0 if name.endswith("bias") else 1) + 0.1 * noise).to(kind)
    if len(shape) < 2 or name.endswith("_bias"):
        return (0.1 * noise).to(kind)
    if any(word in name for word in ("embed", "wte", "wpe")):
        return noise.to(kind)
    return (noise * (1.5 / math.sqrt(shape[-1]))).to(kind)
