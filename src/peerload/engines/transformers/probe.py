"""A probe of transformers: its unmodified `from_pretrained` on values that say where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...model.catalog import Catalog, Parallel
from ...tracing.probe.run import Probed, probe
from ..checkpoint import ModelFiles
from .architecture import class_of, config_of, generation_config, quiet
from .open import _environment, _impersonated, _split, parameters_of
from .quantized import kept


class _Home(nn.Module):
    """Where the model goes that transformers makes while it loads."""

    model: PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Slice:
    """A tensor with the interface of safetensors' slices, which transformers asks for a rank's part."""

    tensor: Tensor
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return self.name

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401 - torch's
        return self.tensor[index]


def probe_layout(
    model: ModelFiles | str | Path, parallel: Parallel, rank: int, catalog: Catalog, *, bits: int | None = None
) -> Probed:
    """What rank `rank` of `parallel` holds, by loading coded values. transformers has no post-processing on a CPU, so this is
    the final layout too. bits: as in `tracing.probe.run.probe`. Not thread-safe. Raises as `transformers.layout_for` does."""
    files = ModelFiles.of(model)
    kind = class_of(config_of(files))

    def load(home: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        dtypes = dict(zip(catalog.names, catalog.dtypes, strict=True))
        state = {name: _Slice(tensor, dtypes[name]) for name, tensor in weights}
        home.model = kind.from_pretrained(
            None,
            config=config_of(files),
            state_dict=state,
            dtype="auto",
            generation_config=generation_config(files),
            **_split(parallel),
        )

    with _impersonated(rank, parallel.tp * parallel.pp), _environment("HF_DEACTIVATE_ASYNC_LOAD", "1"), quiet(), kept():
        return probe(_Home, load, catalog, tensors_of=_tensors, bits=bits)


def _tensors(home: nn.Module) -> dict[str, Tensor]:
    """None before there is a model."""
    return parameters_of(home.model) if isinstance(home, _Home) and hasattr(home, "model") else {}
