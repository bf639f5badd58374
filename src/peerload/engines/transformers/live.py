"""A model that exists: where its parameters lie on this rank, whoever built it and however it is distributed.

Plain tensors, DTensors of transformers' own tensor parallelism, and those of a trainer's `fully_shard` are the same here:
parts of the engine's whole model, described in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import ConfigError, LayoutError
from ...memory.placing import placed, regions_for
from ...memory.region import Region
from ...model.boxes import IntArray
from ...model.catalog import Catalog, Parallel
from ...model.layout import Layout
from ...tracing.dtypes import DTYPES
from ..checkpoint import ModelFiles
from .architecture import catalog_of
from .casts import Shadow
from .declared import Cut, Own, Whole, cuts_of, declare, shares
from .open import whole_layout
from .quantized import holds_quantized

#: What wrappers put into the names of parameters (torch.compile, activation checkpointing).
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, eq=False)
class LiveModel:
    """This rank's part of a model, in place. Owns nothing but the memory of its `shadows`; keep the model.

    tensors: by buffer of `layout`, the memory that holds it: the parameter's own, or its shadow's."""

    layout: Layout
    tensors: Mapping[str, Tensor]
    shadows: tuple[Shadow, ...]
    device: torch.device
    files: ModelFiles

    @cached_property
    def address(self) -> IntArray:
        return np.array([self.tensors[name].data_ptr() for name in self.layout.buffer_names], np.int64)

    def regions(self, registration: str) -> list[Region]:
        """What to register. Memory that others have allocated is no arena: then each allocation is registered."""
        granularity = "per-allocation" if registration == "arena" else registration
        return regions_for([placed(t) for t in self.tensors.values()], granularity)

    def settle(self) -> None:
        """Wait until all that was asked of the device has happened."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @torch.no_grad()
    def publish(self) -> None:
        """Make what is registered hold what the parameters hold now."""
        for shadow in self.shadows:
            shadow.publish()
        self.settle()

    @torch.no_grad()
    def accept(self) -> None:
        """Make the parameters hold what has arrived."""
        for shadow in self.shadows:
            shadow.accept()
        self.settle()


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what torch wraps around it. Raises ConfigError for any other model."""
    inner: object = model
    while not isinstance(inner, PreTrainedModel):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ConfigError(
                f"the model is a {type(model).__name__}, not one of transformers",
                next_step="vLLM and SGLang load through their own options, see docs/engines.md",
            )
    return inner


def files_of(model: PreTrainedModel) -> ModelFiles:
    """The model's configuration as the files of a model directory, for a model that has none."""
    values = {k: v for k, v in model.config.to_dict().items() if k != "distributed_config"}
    values["architectures"] = [_kind(model).__name__]
    return ModelFiles({"config.json": json.dumps(values, default=str).encode()})


def live_model(model: nn.Module, files: ModelFiles | None = None, catalog: Catalog | None = None, *, rank: int = 0) -> LiveModel:
    """Where the parameters of `model` lie in this process, rank `rank` of those that share it. Copies nothing, but for
    parameters in another dtype than the checkpoint's, which get memory in that dtype.

    files, catalog: the checkpoint's configuration and tensors; None: what transformers would save. Parameters that
    `fully_shard` has gathered are sharded again. Raises LayoutError, naming the parameter, for what can't be described, and
    ConfigError for a model that isn't one of transformers."""
    inner = unwrapped(model)
    files = files_of(inner) if files is None else files
    whole = whole_layout(files, catalog_of(files) if catalog is None else catalog, _kind(inner), keep=holds_quantized(inner))
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    with torch.no_grad():
        held, cuts = _held(inner, whole)
    own = {name: Own(cuts[name], tuple(t.shape), tuple(t.stride())) for name, t in held.items()}
    layout = declare(whole, own, parallel=_parallel(inner, cuts), rank=rank)
    device = _device(held)
    tensors, shadows = dict(held), []
    for name, tensor in held.items():
        dtype = _dtype(whole, name)
        if tensor.dtype != dtype:
            tensors[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
            shadows.append(Shadow(tensor, tensors[name]))
    return LiveModel(layout, tensors, tuple(shadows), device, files)


def _kind(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers itself of the model; `fully_shard` and users derive from it."""
    return next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c.__module__.startswith("transformers."))


def _held(model: PreTrainedModel, whole: Whole) -> tuple[dict[str, Tensor], dict[str, tuple[Cut, ...]]]:
    """This rank's part of each parameter, and how it is cut. One name for tied parameters, none for empty parts."""
    found: dict[str, Tensor] = {}
    cuts: dict[str, tuple[Cut, ...]] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    named = dict(_named(model))
    for name, tensor in named.items():
        if name not in whole.home and not isinstance(tensor, nn.Parameter):
            continue  # a buffer that no checkpoint has: the model's constructor computes it
        local, cuts[name] = _own_part(tensor), cuts_of(name, tensor)
        if not local.numel():
            if name in whole.home and shares(whole.views[whole.home[name]].shape, cuts[name]):
                raise LayoutError(f"{name}: is empty on this rank, which its placements don't say")
            continue
        if local.is_meta:
            raise LayoutError(f"{name}: has no memory (device meta)", next_step="make the model with memory, as `to_empty` does")
        first = seen.setdefault((local.data_ptr(), tuple(local.shape)), name)
        if first != name and whole.home.get(first) != whole.home.get(name):
            raise LayoutError(f"{name}: shares memory with {first}, of which the checkpoint has both")
        if first == name:
            found[name] = local
    lacking = sorted(name for name in whole.home if name not in named and not hasattr(model, "_pp_stage"))
    if lacking:
        raise LayoutError(
            f"{lacking[0]}: the checkpoint has it, the model doesn't", next_step="is FSDP1 around it? use fully_shard"
        )
    return found, cuts


def _named(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, tensor


def _own_part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def _dtype(whole: Whole, name: str) -> torch.dtype:
    """The checkpoint's dtype of a parameter."""
    layout = whole.layout
    buffer = layout.buffer_names.index(whole.home[name])
    row = int(np.flatnonzero(layout.pieces.buffer == buffer)[0])
    return DTYPES[layout.tensor_of(row).dtype]


def _device(held: Mapping[str, Tensor]) -> torch.device:
    devices = {t.device for t in held.values()}
    if len(devices) != 1:
        raise LayoutError(
            f"this rank's parameters lie on {len(devices)} devices", next_step="place the model on one device a process"
        )
    return devices.pop()


def _parallel(model: PreTrainedModel, cuts: Mapping[str, tuple[Cut, ...]]) -> Parallel:
    """As the engine was told to split the model, else the number of parts that the most divided parameter is cut into."""
    told = getattr(model.config, "distributed_config", None)
    if told is not None and getattr(told, "fsdp_size", 1) in (None, 1):
        return Parallel(*(getattr(told, f"{name}_size", None) or 1 for name in ("tp", "pp", "ep")))
    return Parallel(max((int(np.prod([c.parts for c in some])) for some in cuts.values()), default=1))
