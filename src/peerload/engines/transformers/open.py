"""transformers as an engine: its own loader, under its own tensor-parallel plan, on weights that aren't there yet.

`from_pretrained(None, state_dict=...)` asks each rank for exactly the slices it wants. We hand out tensors on `meta` under a
`Recorder`; afterwards the layout is known, nothing was copied, and the parameters get memory. The same call under torch's
`fake` process group gives the layout of any rank without weights or peers.
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
from torch import Tensor, nn
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
from ...tracing.described import Describer
from ...tracing.dtypes import DTYPES
from ...tracing.reachable import reachable_tensors
from ...tracing.recorder import Recorder
from ...tracing.storages import view_of
from ...tracing.trace import uncollected
from ...tracing.views import View
from ..checkpoint import ModelFiles
from .aliases import with_aliases
from .architecture import FAILURES, built, catalog_of, class_of, config_of, generation_config, quiet
from .casts import Shadow, as_stored
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
        loaded = _load(files, catalog, parallel, rank)
    return loaded.held if kept_casts else loaded.layout


def whole_layout(files: ModelFiles, catalog: Catalog, kind: type[PreTrainedModel] | None = None, *, keep: bool = True) -> Whole:
    """What a process that isn't split holds, for `declared.declare`. Needs no weights, and minds no process group.

    kind: the model's class (default: as config.json says). keep: quantized weights are kept, not dequantized. Raises
    LayoutError and ConfigError as `layout_for` does."""
    with quiet(), kept(keep):
        loaded = _load(files, catalog, UNSPLIT, 0, kind)
    layout, local = loaded.layout, loaded.local
    home = {name: group[0] for group in loaded.groups for name in group}
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

    with quiet(logging.WARNING), kept(keep):
        loaded = _load(files, catalog, parallel, rank)
    sizes = loaded.layout.buffer_nbytes.tolist()
    home = None if arena is None or device.type != "cpu" else arena(Arena.room(sizes))
    memory, shadows = _settle(loaded, device, home)
    address = np.array([tensor.data_ptr() for tensor in memory], np.int64)
    return OpenModel(loaded.model, loaded.layout, address, home, files, shadows)


def stock_model(directory: str | Path, parallel: Parallel = UNSPLIT) -> PreTrainedModel:
    """The same rank's model by the engine's own load from disk."""
    with quiet(logging.WARNING):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(directory), dtype="auto", **_split(parallel))
    return model


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The `new_tokens` ids that follow `prompt`. All ranks of a tensor-parallel model call it with the same prompt."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
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

    recorder: Recorder
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
class _EngineLoad:
    """What the engine's own load has made: its model, on meta where it was loaded, and this rank's loaded tensors by name.

    held: the layout of the tensors; layout: that of what instances exchange, see `casts.as_stored`. groups: the names of each
    buffer, tied ones after the first."""

    model: PreTrainedModel
    held: Layout
    layout: Layout
    local: Mapping[str, Tensor]
    groups: Sequence[Sequence[str]]


def _load(
    files: ModelFiles,
    catalog: Catalog,
    parallel: Parallel,
    rank: int,
    kind: type[PreTrainedModel] | None = None,
) -> _EngineLoad:
    """The engine's own load, on tensors without values."""
    config = config_of(files, len(catalog))
    quantizer_of(files)  # refuses what can't be loaded here at all
    kind, recorder = kind or class_of(config), Recorder()
    state = {spec.name: _Slices(recorder, spec) for spec in catalog}
    try:
        # A recorder sees its own thread only.
        with _environment("HF_DEACTIVATE_ASYNC_LOAD", "1"), uncollected(), recorder:
            loaded: Any = kind.from_pretrained(
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
    model: PreTrainedModel = loaded[0]
    report: Mapping[str, Sequence[str]] = loaded[1]
    try:
        recorder.require_followed()
        _require_known(recorder, model)
    except LayoutError as refusal:
        raise _blamed(refusal, files) from refusal
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    local = {n: t for n, t in parameters_of(model).items() if n in trained or recorder.loaded(t)}
    reason = f"unknown to {kind.__name__}"
    ignored = {name: reason for name in report["unexpected_keys"] if name in catalog.row}
    return _described(
        recorder, model, local, Describer(recorder.storages, catalog, parallel, rank, kind.__name__), ignored, files
    )


def _require_known(recorder: Recorder, model: PreTrainedModel) -> None:
    """Raise LayoutError for a tensor of checkpoint values that is neither a parameter nor a buffer."""
    known = {t.untyped_storage()._cdata for t in parameters_of(model).values()}
    for path, tensor in reachable_tensors(model).items():
        if tensor.untyped_storage()._cdata not in known and recorder.storages.loaded(tensor):
            raise LayoutError(
                f"{path}: {type(model).__name__} makes it of checkpoint tensors while it loads, outside of its parameters",
                next_step="let the engine load this model itself",
            )


def _described(
    recorder: Recorder,
    model: PreTrainedModel,
    local: Mapping[str, Tensor],
    describer: Describer,
    ignored: Mapping[str, str],
    files: ModelFiles,
) -> _EngineLoad:
    """Raises LayoutError where a tensor has values that are no copies, apart from casts."""
    groups: dict[tuple[int, View], list[str]] = {}
    for name, tensor in local.items():
        if tensor.numel():
            groups.setdefault((tensor.untyped_storage()._cdata, view_of(tensor)), []).append(name)
    logical = recorder.storages.logical
    for first, *_ in groups.values():
        describer.add(first, local[first])
        for name in describer.derived.keys() - logical.keys():
            derived = describer.derived[name]
            raise _blamed(
                LayoutError(
                    f"{first}: {', '.join(derived.covers[:3])}: the engine's loader computes it: {derived.reason}",
                    next_step="let the engine load this model itself; is the checkpoint complete?",
                ),
                files,
            )
    held, names = describer.layout(ignored), list(groups.values())
    tied = {name for group in names if len(group) > 1 for name in group}
    for name in model.all_tied_weights_keys.keys() & local.keys() - tied:  # the checkpoint has different values for the two
        del model.all_tied_weights_keys[name]
    stored = as_stored(held, {name: logical[name][0] for name in describer.derived})
    return _EngineLoad(model, with_aliases(held, names), with_aliases(stored, names), local, names)


def _blamed(refusal: LayoutError, files: ModelFiles) -> LayoutError:
    """The refusal, with the quantizer named that is likely to be behind it."""
    method = method_of(files)
    if not method:
        return refusal
    return LayoutError(
        f"quantizer {method} makes other weights of them while it loads: {refusal.message}",
        next_step="use a device that has kernels for it, or let the engine load this model itself",
    )


def _settle(loaded: _EngineLoad, device: torch.device, arena: Arena | None) -> tuple[list[Tensor], tuple[Shadow, ...]]:
    """Give what was loaded memory that nobody has touched, in the arena if there is one. Returns that of each buffer of the
    layout, and the shadows."""
    memory: list[Tensor] = []
    shadows: list[Shadow] = []
    homes: dict[str, Tensor] = {}
    layout = loaded.layout
    dtypes = {
        int(buffer): DTYPES[layout.catalog.dtypes[int(tensor)]]
        for buffer, tensor in zip(layout.pieces.buffer, layout.pieces.tensor, strict=True)
    }
    for buffer, (nbytes, names) in enumerate(zip(layout.buffer_nbytes.tolist(), loaded.groups, strict=True)):
        tensor = loaded.local[names[0]]
        dtype = dtypes.get(buffer, tensor.dtype)
        count = tensor.numel()
        flat = (
            torch.empty(count, dtype=dtype, device=device)
            if arena is None
            else arena.tensor(arena.place(nbytes), (count,), dtype)
        )
        memory.append(flat.as_strided(tensor.shape, tensor.stride()))
        real = memory[-1] if dtype == tensor.dtype else torch.empty_like(memory[-1], dtype=tensor.dtype)
        homes.update(dict.fromkeys(names, real))
        if real is not memory[-1]:
            shadows.append(Shadow(real, memory[-1]))
    _replace(loaded.model, homes)
    return memory, tuple(shadows)


def _replace(model: PreTrainedModel, homes: Mapping[str, Tensor]) -> None:
    """Put `homes` in the place of this rank's parts of parameters and buffers. What is tied stays tied."""
    new: dict[int, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, old in named:
        if name not in homes:
            continue
        if id(old) not in new:
            made: Tensor = homes[name]
            if isinstance(old, DTensor):
                made = DTensor.from_local(
                    made, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
                )
            if isinstance(old, nn.Parameter):
                made = nn.Parameter(made, requires_grad=old.requires_grad)
            made.__dict__.update(vars(old))
            new[id(old)] = made
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        (module._parameters if last in module._parameters else module._buffers)[last] = new[id(old)]  # type: ignore[assignment]


def _split(parallel: Parallel) -> dict[str, Any]:
    """The arguments of `from_pretrained` that ask for this split under the model's own plan."""
    if parallel == UNSPLIT:
        return {}
    sizes = {"tp_size": parallel.tp, "pp_size": parallel.pp, "ep_size": parallel.ep}
    wanted: dict[str, Any] = {name: size for name, size in sizes.items() if size > 1}
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
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with _environment("LOCAL_RANK", "0"):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


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
