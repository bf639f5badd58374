"""vLLM's model of any rank, built in one process that has no peers and needs no GPU: what its loader puts where.

vLLM keeps its process groups in variables of one module. `rank_of` puts groups there that have a rank and a size and
nothing else: a collective operation fails loudly. The model, its `load_weights` and its post-processing are vLLM's, unmodified.
`..versions` says for which releases of vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Final, TypeVar

import torch
import vllm.distributed.parallel_state as groups
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm import __version__
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype

from ...errors import ConfigError, LayoutError
from ...model.catalog import Catalog, Parallel
from ...tracing.blame import told
from ...tracing.probe.run import Probed, probe
from ...tracing.reachable import reachable_tensors
from ...tracing.trace import Traced, trace_loader
from ..checkpoint import Checkpoint, ModelFiles
from ..twin import FAILURES, built, checked, warn_once
from .loader import refuse_unfollowable
from .platform import any_experts_kernel, any_linear_kernel, cuda_platform, has_cuda, some_platform

#: What this engine is called in layouts and reports.
VERSION: Final = f"vllm {__version__}"

T = TypeVar("T")

_UNSPLIT: Final = Parallel()

#: Arguments of vLLM's that are said otherwise, and how.
_OURS: Final = {
    "model": "say it with --model",
    "tensor_parallel_size": "say it with --tp",
    "pipeline_parallel_size": "say it with --pp",
    "enable_expert_parallel": "say it with --ep",
    "data_parallel_size": "a layout is that of one data-parallel replica",
    "distributed_executor_backend": "it has no part in a layout",
}


class Unbuilt(LayoutError):
    """vLLM can't build the model here."""


def trace_layout(
    model: str | Path | ModelFiles,
    parallel: Parallel = _UNSPLIT,
    rank: int = 0,
    *,
    catalog: Catalog | None = None,
    arguments: Mapping[str, object] = MappingProxyType({}),
    platform: str = "auto",
) -> Traced:
    """What `rank` of an instance of this model holds after vLLM's `load_weights`. Needs no weights, and no memory for them unless
    the model's constructor needs values.

    model: a directory, or the files of one. catalog: the checkpoint's tensors, by default those of the directory's safetensors
    files. arguments: more of vLLM's `EngineArgs`. platform: "auto" is this host's; a model that vLLM can't build for it is built
    as on a CUDA host. "cuda" always does that.
    Raises ConfigError for sizes and arguments that vLLM has no words for, LayoutError for what it can't build here or what can't
    be followed. Not thread-safe: vLLM's process-wide state is borrowed, and put back."""
    tensors = _catalog(model) if catalog is None else catalog

    def trace(platform: str) -> Traced:
        with rank_of(model, parallel, rank, arguments, platform) as config:
            twin = build(config)
            refuse_unfollowable(twin)
            return trace_loader(twin, partial(load_weights, twin), tensors, parallel=parallel, rank=rank, engine=VERSION)

    return _on(platform, trace)


def probe_layout(
    model: str | Path | ModelFiles,
    parallel: Parallel = _UNSPLIT,
    rank: int = 0,
    *,
    processed: bool = False,
    catalog: Catalog | None = None,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    bits: int | None = None,
    groups: Sequence[frozenset[str]] = (),
    arguments: Mapping[str, object] = MappingProxyType({}),
    platform: str = "auto",
) -> Probed:
    """What `rank` of an instance really has after loading coded values and, if `processed`, after vLLM's post-processing: for
    small models, which are loaded several times. For `fixed`, `bits` and `groups` see `tracing.probe.run.probe`; otherwise like
    `trace_layout`."""
    tensors = _catalog(model) if catalog is None else catalog

    def probed(platform: str) -> Probed:
        with rank_of(model, parallel, rank, arguments, platform) as config:
            finish: Callable[[nn.Module], object] | None = partial(postprocess, config=config) if processed else None
            return probe(
                partial(build, config, "cpu"),
                load_weights,
                tensors,
                finish=finish,
                tensors_of=reachable_tensors,
                fixed=fixed,
                bits=bits,
                groups=groups,
            )

    return _on(platform, probed)


def _on(platform: str, work: Callable[[str], T]) -> T:
    """Do the work on the platform that was asked for; one of its host's that is asked for by nobody gives way to CUDA's."""
    try:
        return work(platform)
    except Unbuilt as error:
        problem = error
    words, next_step = problem.message, problem.next_step
    if platform == "auto" and not has_cuda():
        try:
            found = work("cuda")
        except Unbuilt as error:
            if error.message != words:
                words += f"; and as on a CUDA host: {error.message}"
                next_step = next_step or "ask on a GPU host: vLLM needs to look at the GPU to build this model"
        else:
            warn_once(f"this model is built as on a CUDA host: {words}")
            return found
    raise LayoutError(
        words, next_step=next_step or "vLLM itself fails there: try another parallel layout, or other arguments (--engine-arg)"
    ) from problem


@contextmanager
def rank_of(
    model: str | Path | ModelFiles,
    parallel: Parallel,
    rank: int,
    arguments: Mapping[str, object] = MappingProxyType({}),
    platform: str = "auto",
) -> Iterator[VllmConfig]:
    """The process-wide state of vLLM, for as long as the block lasts, that of rank `rank` (tensor-parallel rank fastest) of an
    instance of the model. Yields its configuration. arguments: as for `trace_layout`. platform: "auto" is this host's, "cuda" a
    CUDA host's from when the configuration is made. Not thread-safe."""
    size = parallel.tp * parallel.pp
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below {size}")
    if parallel.ep not in (1, parallel.tp):
        raise ConfigError(f"vLLM's experts are split over all tensor-parallel ranks or none: tp={parallel.tp}, ep={parallel.ep}")
    arguments = checked(VERSION, arguments, EngineArgs, _OURS)
    files = ModelFiles.of(model)
    state = {name: value for name, value in vars(groups).items() if name.startswith("_") and name[1:].replace("_", "").isupper()}
    environment, rotary = dict(os.environ), dict(_ROPE_DICT)
    with ExitStack() as stack:
        stack.callback(_restore, state, environment, rotary)
        stack.enter_context(some_platform())
        directory = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
        if directory is None:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            files.write(directory)
        config = _config(files, directory, parallel, rank, arguments)
        if platform == "cuda":
            stack.enter_context(cuda_platform())
        stage, shard = divmod(rank, parallel.tp)
        same_stage = [stage * parallel.tp + i for i in range(parallel.tp)]
        same_shard = [i * parallel.tp + shard for i in range(parallel.pp)]
        members = {
            "_WORLD": list(range(size)),
            "_TP": same_stage,
            "_ETP": same_stage,
            "_EP": same_stage,
            "_PP": same_shard,
            "_DP": [rank],
            "_DCP": [rank],
            "_PCP": [rank],
        }
        for name in members.keys() & state.keys():
            setattr(groups, name, _group(name, members[name], rank))
        groups._NODE_COUNT = 1
        stack.enter_context(set_current_vllm_config(config))
        yield config


def build(config: VllmConfig, device: str = "meta") -> nn.Module:
    """The model of the rank that `rank_of` is, its parameters not yet written; on meta unless its constructor needs values.
    Raises LayoutError for what vLLM can't build here."""
    try:
        return built(partial(_built_somehow, config), VERSION) if device == "meta" else _built_somehow(config, device)
    except FAILURES as error:
        raise Unbuilt(f"{VERSION} can't build {config.model_config.architecture} here: {told(error)}") from error


def _built_somehow(config: VllmConfig, device: str) -> nn.Module:
    remedies = {"find a kernel": any_linear_kernel, "MoE backend supports": any_experts_kernel}
    with ExitStack() as stack:
        while True:
            try:
                return _built(config, device)
            except (ValueError, NotImplementedError) as error:
                lacking = [words for words in remedies if words in str(error)]
                if not lacking:
                    raise
                stack.enter_context(remedies.pop(lacking[0])())


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> object:
    """What vLLM does with a checkpoint's tensors, up to its post-processing."""
    found: object = model.load_weights(weights)  # type: ignore[operator]
    return found


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


def _config(files: ModelFiles, directory: Path, parallel: Parallel, rank: int, arguments: Mapping[str, object]) -> VllmConfig:
    chosen = {"enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True, **arguments}
    try:
        with _inspected_here(files):
            config = EngineArgs(
                model=str(directory),
                tensor_parallel_size=parallel.tp,
                pipeline_parallel_size=parallel.pp,
                enable_expert_parallel=parallel.ep > 1,
                distributed_executor_backend="mp" if parallel.tp * parallel.pp > 1 else "uni",
                **chosen,
            ).create_engine_config()
    except FAILURES as error:
        words = " ".join(str(error).partition(" [type=")[0].split()) or told(error)  # pydantic adds the arguments
        next_step = "vLLM's arguments are given as --engine-arg KEY=VALUE, as in --engine-arg trust_remote_code=true"
        raise LayoutError(
            f"{VERSION} refuses this model at {parallel}: {words}", next_step=next_step if "argument" in words else ""
        ) from error
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
    """What models ask of a torch process group: which of how many. torch itself looks a group up before it communicates."""

    ranks: list[int]
    own: int

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self.own)

    def __hash__(self) -> int:
        raise RuntimeError("it communicates with other ranks, of which there are none here")


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
