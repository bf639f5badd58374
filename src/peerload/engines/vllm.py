"""vLLM's model of any rank, built in one process that has no peers and needs no GPU: what its loader puts where.

vLLM keeps its process groups in variables of one module. `rank_of` puts groups there that have a rank and a size and
nothing else: a collective operation fails loudly. The model, its `load_weights` and its post-processing are vLLM's, unmodified.
For vLLM 0.24.0 to 0.32.0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Final

import torch
import vllm.distributed.parallel_state as groups
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm import __version__
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import UnspecifiedPlatform
from vllm.utils.torch_utils import set_default_torch_dtype

from ..errors import ConfigError, LayoutError
from ..layout.loader import Traced, trace_loader
from ..layout.probe import Probed, probe
from ..layout.reachable import reachable_tensors
from ..manifest import Catalog, Parallel
from .checkpoint import Checkpoint, ModelFiles

#: What this engine is called in layouts and reports.
VERSION: Final = f"vllm {__version__}"

_UNSPLIT: Final = Parallel()

#: What vLLM raises for models, quantizations and hosts that it doesn't support.
_FAILURES: Final = (
    ValueError, NotImplementedError, AssertionError, RuntimeError, AttributeError, TypeError, KeyError, ImportError,
)  # fmt: skip


def trace_layout(
    model: str | Path | ModelFiles, parallel: Parallel = _UNSPLIT, rank: int = 0, *, catalog: Catalog | None = None
) -> Traced:
    """What `rank` of an instance of this model holds after vLLM's `load_weights`. Needs no weights and no memory for them.

    model: a directory, or the files of one. catalog: the checkpoint's tensors, by default those of the directory's safetensors
    files. Raises ConfigError for sizes that vLLM has no words for, LayoutError for what it can't build here or what can't be
    followed. Not thread-safe: vLLM's process-wide state is borrowed, and put back."""
    catalog = _catalog(model) if catalog is None else catalog
    with rank_of(model, parallel, rank) as config:
        twin = build(config)
        return trace_loader(twin, partial(load_weights, twin), catalog, parallel=parallel, rank=rank, engine=VERSION)


def probe_layout(
    model: str | Path | ModelFiles,
    parallel: Parallel = _UNSPLIT,
    rank: int = 0,
    *,
    processed: bool = False,
    catalog: Catalog | None = None,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    bits: int | None = None,
) -> Probed:
    """What `rank` of an instance really has after loading coded values and, if `processed`, after vLLM's post-processing: for
    small models, which are loaded several times. For `fixed` and `bits` see `layout.probe`; otherwise like `trace_layout`."""
    catalog = _catalog(model) if catalog is None else catalog
    with rank_of(model, parallel, rank) as config:
        finish: Callable[[nn.Module], object] | None = partial(postprocess, config=config) if processed else None
        return probe(
            partial(build, config, "cpu"),
            load_weights,
            catalog,
            finish=finish,
            tensors_of=reachable_tensors,
            fixed=fixed,
            bits=bits,
        )


@contextmanager
def rank_of(model: str | Path | ModelFiles, parallel: Parallel, rank: int) -> Iterator[VllmConfig]:
    """The process-wide state of vLLM, for as long as the block lasts, that of rank `rank` (tensor-parallel rank fastest) of an
    instance of the model. Yields its configuration. Not thread-safe."""
    size = parallel.tp * parallel.pp
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below {size}")
    if parallel.ep not in (1, parallel.tp):
        raise ConfigError(f"vLLM's experts are split over all tensor-parallel ranks or none: tp={parallel.tp}, ep={parallel.ep}")
    files = ModelFiles.of(model)
    state = {name: value for name, value in vars(groups).items() if name.startswith("_") and name[1:].replace("_", "").isupper()}
    environment, rotary = dict(os.environ), dict(_ROPE_DICT)
    with ExitStack() as stack:
        stack.callback(_restore, state, environment, rotary)
        stack.enter_context(_some_platform())
        directory = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
        if directory is None:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            files.write(directory)
        config = _config(files, directory, parallel, rank)
        stage, shard = divmod(rank, parallel.tp)
        same_stage = [stage * parallel.tp + i for i in range(parallel.tp)]
        same_shard = [i * parallel.tp + shard for i in range(parallel.pp)]
        members = {
            "_WORLD": list(range(size)), "_TP": same_stage, "_ETP": same_stage, "_EP": same_stage, "_PP": same_shard,
            "_DP": [rank], "_DCP": [rank], "_PCP": [rank],
        }  # fmt: skip
        for name in members.keys() & state.keys():
            setattr(groups, name, _group(name, members[name], rank))
        groups._NODE_COUNT = 1
        stack.enter_context(set_current_vllm_config(config))
        yield config


def build(config: VllmConfig, device: str = "meta") -> nn.Module:
    """The model of the rank that `rank_of` is, its parameters not yet written. Raises LayoutError for what vLLM can't build
    here."""
    remedies = {"find a kernel": _any_linear_kernel, "MoE backend supports": _any_experts_kernel}
    try:
        with ExitStack() as stack:
            while True:
                try:
                    return _built(config, device)
                except (ValueError, NotImplementedError) as error:
                    lacking = [words for words in remedies if words in str(error)]
                    if not lacking:
                        raise
                    stack.enter_context(remedies.pop(lacking[0])())
    except _FAILURES as error:
        raise LayoutError(f"{VERSION} can't build {config.model_config.architecture} here: {error!r}") from error


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> object:
    """What vLLM does with a checkpoint's tensors, up to its post-processing."""
    return model.load_weights(weights)


def postprocess(model: nn.Module, config: VllmConfig) -> None:
    """What vLLM does with loaded parameters before it serves."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    with set_default_torch_dtype(config.model_config.dtype):
        process_weights_after_loading(model, config.model_config, device)


def _catalog(model: str | Path | ModelFiles) -> Catalog:
    if isinstance(model, ModelFiles) or not Path(model).is_dir():
        raise ConfigError(
            "a config.json alone doesn't say which tensors its checkpoint has", next_step="give a model directory, or a catalog"
        )
    return Checkpoint.open(model).catalog


def _config(files: ModelFiles, directory: Path, parallel: Parallel, rank: int) -> VllmConfig:
    try:
        with _inspected_here(files):
            config = EngineArgs(
                model=str(directory), tensor_parallel_size=parallel.tp, pipeline_parallel_size=parallel.pp,
                enable_expert_parallel=parallel.ep > 1, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
                distributed_executor_backend="mp" if parallel.tp * parallel.pp > 1 else "uni",
            ).create_engine_config()  # fmt: skip
    except _FAILURES as error:
        raise LayoutError(f"{VERSION} refuses this model at {parallel}: {error}") from error
    config.parallel_config.rank = rank
    return config


def _restore(state: Mapping[str, object], environment: Mapping[str, str], rotary: Mapping[tuple[object, ...], nn.Module]) -> None:
    vars(groups).update(state)
    _ROPE_DICT.clear()
    _ROPE_DICT.update(rotary)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@contextmanager
def _some_platform() -> Iterator[None]:
    """A vLLM built for GPUs knows no platform where there is none, and configures nothing without one: a CPU's will do."""
    found = type(current_platform)
    if found is UnspecifiedPlatform:
        current_platform.__class__ = CpuPlatform
    try:
        yield
    finally:
        current_platform.__class__ = found


@contextmanager
def _inspected_here(files: ModelFiles) -> Iterator[None]:
    """Import a model's class here, where it is needed anyway, before vLLM does so in a process of its own to look at it, which
    takes five seconds the first time."""
    known, asked = ModelRegistry.models, files.config.get("architectures")
    lazy = {name: known[name] for name in asked if name in known} if isinstance(asked, list) else {}
    try:
        for name, entry in lazy.items():
            ModelRegistry.register_model(name, entry.load_model_cls())
        yield
    finally:
        known.update(lazy)


@dataclass(frozen=True, slots=True)
class _Members:
    """What models ask of a torch process group: which of how many."""

    ranks: list[int]
    own: int

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self.own)


def _group(name: str, ranks: list[int], rank: int) -> groups.GroupCoordinator:
    """A process group with a rank and a size, whose other members don't exist and which can't communicate."""
    group = groups.GroupCoordinator.__new__(groups.GroupCoordinator)
    group.unique_name = name
    group.rank, group.local_rank, group.device_index = rank, 0, 0
    group.ranks, group.group_ranks = ranks, [ranks]
    group.world_size, group.rank_in_group = len(ranks), ranks.index(rank)
    group.cpu_group = group.device_group = _Members(ranks, rank)
    group.device = torch.device("cpu")
    group.use_device_communicator, group.device_communicator, group.mq_broadcaster = False, None, None
    group.use_custom_op_call = group.use_cpu_custom_send_recv = False
    return group


@contextmanager
def _any_linear_kernel() -> Iterator[None]:
    """Accept kernels that could serve a layer if this host's processor were another one. What a layer's parameters are before
    post-processing is up to its quantization method, whatever kernel serves it."""
    honest = linear.is_supported_and_can_implement_kernel
    linear.is_supported_and_can_implement_kernel = lambda kernel, config, _capability: kernel.can_implement(config)
    try:
        yield
    finally:
        linear.is_supported_and_can_implement_kernel = honest


@contextmanager
def _any_experts_kernel() -> Iterator[None]:
    """The same for layers of experts."""
    honest = FusedMoEExperts.is_supported_config

    def anywhere(*arguments: object) -> tuple[bool, str | None]:
        accepted, reason = honest(*arguments)
        return (True, None) if reason is not None and "current device" in reason else (accepted, reason)

    FusedMoEExperts.is_supported_config = staticmethod(anywhere)
    try:
        yield
    finally:
        FusedMoEExperts.is_supported_config = staticmethod(honest)


class _MapsHaveValues(TorchFunctionMode):
    """Maps of experts are looked into while a model is built: what is filled with whole numbers isn't made on meta."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        del types
        kwargs = kwargs or {}
        if func in (torch.full, torch.arange) and kwargs.get("dtype") in (torch.int32, torch.int64):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _built(config: VllmConfig, device: str) -> nn.Module:
    config.compilation_config.static_forward_context.clear()
    _ROPE_DICT.clear()  # models share these modules, on whatever device the first one was built
    with set_default_torch_dtype(config.model_config.dtype), torch.device(device), _MapsHaveValues():
        return initialize_model(config)
