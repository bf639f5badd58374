"""transformers as an engine: its own loader, under its own tensor-parallel plan, on weights that aren't there yet.

`from_pretrained(None, state_dict=...)` asks each rank for exactly the slices it wants. What we hand out are untouched
tensors under a `Recorder`; afterwards the parameters are in place, nothing was copied, and the layout is known. The same
call on `meta`, under torch's `fake` process group, gives the layout of any rank without weights or peers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from ...errors import ConfigError, HostError, LayoutError
from ...memory.arena import Arena
from ...model.boxes import IntArray
from ...model.catalog import Catalog, Parallel, TensorSpec
from ...model.layout import Layout
from ...tracing.recorder import DTYPES, Allocate, layout_of, on_meta, view_of
from ...tracing.views import View
from ..checkpoint import ModelFiles
from .architecture import FAILURES, built, catalog_of, class_of, config_of, generation_config, quiet
from .casts import CastRecorder, Shadow, as_kept
from .declared import Whole
from .quantized import kept, method_of, quantizer_of

UNSPLIT: Final = Parallel()


@dataclass(frozen=True, slots=True, eq=False)
class OpenModel:
    """An engine's model whose parameters lie, yet to be written, at `address` [buffers of layout].

    Owns the memory: `arena` (None: the tensors' own storages) must stay open while the model or a reader uses it.
    shadows: parameters that the engine keeps in another dtype than the checkpoint's; `address` is that of their shadows."""

    model: PreTrainedModel
    layout: Layout
    address: IntArray
    arena: Arena | None
    files: ModelFiles
    shadows: tuple[Shadow, ...] = ()

    @torch.no_grad()
    def accept(self) -> None:
        """Cast what has been written beside parameters into them."""
        for shadow in self.shadows:
            shadow.accept()


def layout_for(
    model: ModelFiles | str | Path, parallel: Parallel, rank: int = 0, catalog: Catalog | None = None, *, kept_casts: bool = False
) -> Layout:
    """What rank `rank` (tensor-parallel rank fastest) of `parallel` holds. Needs no weights and no peers, and an
    accelerator only as far as transformers binds to the first one it sees.

    `catalog`: the checkpoint's tensors; None: those that transformers would save. Quantized models are as on a device that
    has kernels for them. A parameter that the engine casts is described as its shadow, in the checkpoint's dtype, which is what
    instances exchange; with `kept_casts` as the engine keeps it, holding `<tensor> as <dtype>`.

    Not thread-safe (it makes and destroys the process's group). Raises LayoutError for what the engine does that can't be
    described, ConfigError for a model or a split that transformers doesn't have, HostError in a process that already has a
    process group."""
    files = ModelFiles.of(model)
    catalog = catalog_of(files) if catalog is None else catalog
    with _impersonated(rank, parallel.tp * parallel.pp), quiet(), kept():
        loaded = _load(files, catalog, parallel, rank, on_meta)
    return as_kept(loaded.layout, loaded.wanted) if kept_casts else loaded.layout


def whole_layout(files: ModelFiles, catalog: Catalog, kind: type[PreTrainedModel] | None = None, *, keep: bool = True) -> Whole:
    """What a process that isn't split holds, for `declared.declare`. Needs no weights, and minds no process group.

    kind: the model's class (default: as config.json says). keep: quantized weights are kept, not dequantized. Raises
    LayoutError and ConfigError as `layout_for` does."""
    with quiet(), kept(keep):
        loaded = _load(files, catalog, UNSPLIT, 0, on_meta, kind)
    layout, local = loaded.layout, loaded.local
    first: dict[tuple[int, View], str] = {}
    home = {name: first.setdefault((t.untyped_storage()._cdata, view_of(t)), name) for name, t in local.items() if t.numel()}
    views = {name: View(0, tuple(local[name].shape), tuple(local[name].stride())) for name in layout.buffer_names}
    return Whole(layout, views, home)


def open_model(
    model: ModelFiles | str | Path,
    catalog: Catalog,
    parallel: Parallel = UNSPLIT,
    *,
    rank: int = 0,
    arena: Callable[[int], Arena] | None = Arena,
    keep: bool = False,
) -> OpenModel:
    """The engine's model on this rank, as a stock load would leave it, but for parameters that nobody has written or
    touched. Needs the process group of `parallel` (or torchrun's environment, from which transformers makes it).

    arena: makes the arena that the parameters lie in, given its bytes; None leaves each in a storage of its own, and so
    does a GPU.
    keep: hold quantized weights as the checkpoint has them even where transformers would dequantize them, having no kernels.
    Raises as `layout_for` does."""
    files = ModelFiles.of(model)
    device = _device(parallel)

    def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with quiet(logging.WARNING), kept(keep):
        loaded = _load(files, catalog, parallel, rank, untouched)
    layout, local = loaded.layout, loaded.local
    home = None if arena is None or device.type != "cpu" else _settle(layout, local, arena)
    address = np.array([local[name].data_ptr() for name in layout.buffer_names], np.int64)
    return OpenModel(loaded.model, layout, address, home, files, loaded.cast())


def stock_model(directory: str | Path, parallel: Parallel = UNSPLIT) -> PreTrainedModel:
    """The same rank's model by the engine's own load from disk."""
    with quiet(logging.WARNING):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(directory), dtype="auto", **_split(parallel))
    return model


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The `new_tokens` ids that follow `prompt`. All ranks of a tensor-parallel model call it with the same prompt."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The rank's own part of each parameter and buffer, tied names included: the very tensors, not views of them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: t._local_tensor if isinstance(t, DTensor) else t for name, t in named}


@dataclass(frozen=True, slots=True)
class _Slices:
    """What stands for a checkpoint tensor in a state dict: the interface of safetensors' slices, answered by a recorder."""

    recorder: CastRecorder
    spec: TensorSpec

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.dtype]

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)

    def get_dtype(self) -> str:
        return self.spec.dtype

    def __getitem__(self, index: object) -> Tensor:
        """Of slices with step 1, or an ellipsis for all."""
        cuts = list(index) if isinstance(index, tuple) else [index]
        cuts = [c for c in cuts if c is not ...]
        whole = [slice(None)] * (len(self.spec.shape) - len(cuts))
        ranges = []
        for cut, size in zip([*cuts, *whole], self.spec.shape, strict=True):
            if not isinstance(cut, slice) or cut.step not in (None, 1):
                raise LayoutError(f"{self.spec.name}: transformers asks for index {cut!r}, only plain slices can be served")
            ranges.append(range(size)[cut])
        return self.recorder.source(self.spec.name, [r.start for r in ranges], [len(r) for r in ranges], self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """What the engine's own load has made: its model, this rank's loaded tensors by name, and the dtype that it wanted for
    those of which the checkpoint has another."""

    model: PreTrainedModel
    layout: Layout
    local: Mapping[str, Tensor]
    wanted: Mapping[str, torch.dtype]

    def cast(self) -> tuple[Shadow, ...]:
        """Give the parameters their dtypes, in memory of their own; what they had becomes their shadow's. Raises LayoutError."""
        named = dict([*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)])
        made: dict[int, Shadow] = {}
        for name, dtype in self.wanted.items():
            parameter = named[name]
            if isinstance(parameter, DTensor):
                raise LayoutError(f"{name}: the engine casts a part of it from {parameter.dtype} to {dtype}")
            if id(parameter) not in made:
                memory = parameter.data
                parameter.data = torch.empty_like(memory, dtype=dtype)
                made[id(parameter)] = Shadow(parameter, memory)
        return tuple(made.values())


def _load(
    files: ModelFiles,
    catalog: Catalog,
    parallel: Parallel,
    rank: int,
    allocate: Allocate,
    kind: type[PreTrainedModel] | None = None,
) -> _Loaded:
    """The engine's own load on tensors out of `allocate`."""
    config = config_of(files, len(catalog))
    quantizer_of(files)  # refuses what can't be loaded here at all
    kind, recorder = kind or class_of(config), CastRecorder(allocate)
    state = {spec.name: _Slices(recorder, spec) for spec in catalog}
    try:
        # A recorder sees its own thread only.
        with _environment("HF_DEACTIVATE_ASYNC_LOAD", "1"), recorder:
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype="auto",
                output_loading_info=True,
                generation_config=generation_config(files),
                **_split(parallel),
            )
    except LayoutError as refusal:
        raise _blamed(refusal, files) from refusal
    except FAILURES as error:
        if recorder.refusals:
            raise _blamed(recorder.refusals[0], files) from error
        built(kind, config_of(files, len(catalog)))  # raises ConfigError where the split isn't to blame
        quantizer = f" with quantizer {method}" if (method := method_of(files)) else ""
        problem, next_step = f"{kind.__name__} at {parallel}{quantizer}: transformers fails: {error!r}", ""
        if parallel.tp > 1 and parallel.pp > 1 and isinstance(error, KeyError):
            # Seen in 5.23: its tensor-parallel plan is applied to every layer's name after the other stages' layers are gone.
            problem += " (it can't split the layers of a pipeline stage by tensor parallelism)"
            next_step = "use tp or pp alone, or another transformers"
        raise LayoutError(problem, next_step=next_step) from error
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    local = {n: t for n, t in parameters_of(model).items() if n in trained or recorder.known(t)}
    reason = f"unknown to {kind.__name__}"
    ignored = {name: reason for name in report["unexpected_keys"] if name in catalog.row}
    layout = layout_of(recorder, local, catalog, parallel=parallel, rank=rank, ignored=ignored)
    wanted = {name: recorder.wanted(tensor) for name, tensor in local.items() if tensor.numel()}
    return _Loaded(model, layout, local, {name: dtype for name, dtype in wanted.items() if dtype != local[name].dtype})


def _blamed(refusal: LayoutError, files: ModelFiles) -> LayoutError:
    """The refusal, with the quantizer named that is likely to be behind it."""
    method = method_of(files)
    if not method:
        return refusal
    return LayoutError(
        f"quantizer {method} makes other weights of them while it loads: {refusal.message}",
        next_step="use a device that has kernels for it, or let the engine load this model itself",
    )


def _settle(layout: Layout, local: Mapping[str, Tensor], make: Callable[[int], Arena]) -> Arena:
    """Move the (still untouched) tensors into one arena that holds them and nothing else. Copies nothing."""
    homes: dict[int, Tensor] = {}
    sizes = dict(zip(layout.buffer_names, layout.buffer_nbytes.tolist(), strict=True))
    arena = make(Arena.room(list(sizes.values())))
    for name, nbytes in sizes.items():
        tensor = local[name]
        flat = arena.tensor(arena.place(nbytes), (tensor.numel(),), tensor.dtype)
        homes[tensor.data_ptr()] = flat.as_strided(tensor.shape, tensor.stride())
    for tensor in {id(t): t for t in local.values() if t.numel()}.values():
        tensor.data = homes[tensor.data_ptr()]
    for name, tensor in local.items():
        if not arena.contains(tensor.data_ptr(), tensor.nbytes) and tensor.numel():
            raise LayoutError(f"{name}: the engine keeps it outside the memory it was given")
    return arena


def _split(parallel: Parallel) -> dict[str, Any]:
    """The arguments of `from_pretrained` that ask for this split under the model's own plan."""
    if parallel == UNSPLIT:
        return {}
    sizes = {"tp_size": parallel.tp, "pp_size": parallel.pp, "ep_size": parallel.ep}
    wanted = {name: size for name, size in sizes.items() if size > 1}
    lacking = wanted.keys() - {f.name for f in dataclasses.fields(DistributedConfig)}
    if lacking:
        raise ConfigError(f"{parallel}: this transformers has no {lacking.pop()}", next_step="install a newer one")
    return {"distributed_config": DistributedConfig(tp_plan="auto" if parallel.tp > 1 else None, **wanted)}


def _device(parallel: Parallel) -> torch.device:
    """Where transformers puts this rank: on the accelerator when it splits, else on the CPU."""
    if parallel == UNSPLIT or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # is_available() said so
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _impersonated(rank: int, size: int) -> Iterator[None]:
    """Pretend to be rank `rank` of `size`, of which nobody else exists: collectives return at once."""
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below {size}")
    if size == 1:
        yield
        return
    if dist.is_initialized():
        raise HostError("this process already has a process group", next_step="derive layouts in a process of its own")
    # DTensor's caches know meshes by everything but the rank: an answer for one rank would be given for the next.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with _environment("LOCAL_RANK", "0"):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """One variable set to `value`, and put back afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
