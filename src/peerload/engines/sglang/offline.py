"""SGLang's model of any rank, built in one process that has no peers and needs no GPU: what its loader puts where.

SGLang asks one object, `get_parallel()`, for ranks, sizes and process groups. `rank_of` gives it an instance of one's own
in which the groups have a rank and a size and nothing else: a collective operation fails loudly. The model and its
`load_weights` are SGLang's, unmodified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Final

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__
from torch import Tensor, nn

from ...errors import ConfigError, LayoutError
from ...model.catalog import Catalog, Parallel
from ...tracing.blame import told
from ...tracing.probe.run import Probed, probe
from ...tracing.reachable import reachable_tensors
from ...tracing.trace import Traced, trace_loader
from ..checkpoint import Checkpoint, ModelFiles
from ..twin import FAILURES, built, checked

#: What this engine is called in layouts and reports.
VERSION: Final = f"sglang {__version__}"

#: SGLang's models that are transformers', for architectures that it has none of its own for.
_TRANSFORMERS: Final = "sglang.srt.models.transformers"

_UNSPLIT: Final = Parallel()

#: Arguments of SGLang's that are said otherwise, and how.
_OURS: Final = {
    "model_path": "say it with --model",
    "tp_size": "say it with --tp",
    "pp_size": "say it with --pp",
    "ep_size": "say it with --ep",
    "dp_size": "a layout is that of one data-parallel replica",
    "device": "a layout is that of this host's device",
}


@dataclass(frozen=True, slots=True)
class _LoneGroup:
    """A process group with a rank and a size, whose other members don't exist."""

    world_size: int
    rank_in_group: int
    cpu_group: None = None
    device_group: None = None

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def rank(self) -> int:
        return self.rank_in_group

    @property
    def local_rank(self) -> int:
        return self.rank_in_group

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


@contextmanager
def rank_of(
    directory: Path, parallel: Parallel, rank: int, arguments: Mapping[str, object] = MappingProxyType({})
) -> Iterator[ModelConfig]:
    """SGLang's process-wide configuration, for as long as the block lasts, that of rank `rank` (tensor-parallel rank
    fastest) of an instance of the model in `directory`. Yields the model's configuration. arguments: more of SGLang's
    `ServerArgs`. Not thread-safe."""
    arguments = checked(VERSION, arguments, ServerArgs, _OURS)
    size = parallel.tp * parallel.pp
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below {size}")
    if parallel.tp % parallel.ep:
        raise ConfigError(f"SGLang's expert parallelism divides its tensor parallelism: ep={parallel.ep}, tp={parallel.tp}")
    before = runtime_context.snapshot_context()
    runtime_context.reset_context()
    try:
        with _capability():
            yield _configured(directory, parallel, rank, arguments)
    finally:
        runtime_context.restore_context(before)


def _configured(directory: Path, parallel: Parallel, rank: int, arguments: Mapping[str, object]) -> ModelConfig:
    chosen = {"skip_tokenizer_init": True, "disable_radix_cache": True, **arguments}
    try:
        server = ServerArgs(
            model_path=str(directory), tp_size=parallel.tp, pp_size=parallel.pp, ep_size=parallel.ep, device=_device(), **chosen
        )
        runtime_context.publish(server, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
        known, now = runtime_context._parallel_fields(), runtime_context.get_parallel()
        groups = {
            "world_group": _LoneGroup(parallel.tp * parallel.pp, rank),
            "pp_group": _LoneGroup(parallel.pp, now.pp_rank),
            "tp_group": _LoneGroup(parallel.tp, now.tp_rank),
            "attn_tp_group": _LoneGroup(now.attn_tp_size, now.attn_tp_rank),
            "attn_cp_group": _LoneGroup(1, 0),
            "moe_ep_group": _LoneGroup(now.moe_ep_size, now.moe_ep_rank),
            "moe_tp_group": _LoneGroup(now.moe_tp_size, now.moe_tp_rank),
            "moe_dp_group": _LoneGroup(1, 0),
            "shared_experts_tp_group": _LoneGroup(parallel.tp, now.tp_rank),
        }
        now.override_permanently(**{name: group for name, group in groups.items() if name in known})
        config = ModelConfig.from_server_args(server)
        if _device() == "cpu":  # heads and experts are padded there, where on a GPU heads would be replicated
            config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), parallel.tp)
    except FAILURES as error:
        next_step = "SGLang's arguments are given as --engine-arg KEY=VALUE, as in --engine-arg trust_remote_code=true"
        raise LayoutError(
            f"{VERSION} refuses this model at {parallel}: {' '.join(str(error).split()) or told(error)}",
            next_step=next_step if any(word in str(error) for word in ("argument", "trust")) else "",
        ) from error
    return config


def build(config: ModelConfig, device: str = "meta") -> nn.Module:
    """The model of the rank that `rank_of` is, its parameters not yet written; on meta unless its constructor needs values.
    Raises LayoutError for what SGLang can't build here."""
    load = LoadConfig()

    def make(device: str) -> nn.Module:
        quantization = loader._get_quantization_config(config, load)
        with set_default_torch_dtype(config.dtype), torch.device(device):
            return loader._initialize_model(config, load, quantization)

    try:
        if get_model_architecture(config)[0].__module__ == _TRANSFORMERS:
            device = _device()  # on meta, it replaces parameters by some that don't know how to be loaded
        return built(make, VERSION) if device == "meta" else make(device)
    except FAILURES as error:
        raise LayoutError(
            f"{VERSION} can't build {config.hf_config.architectures} here: {told(error)}",
            next_step="" if torch.cuda.is_available() else "ask on a GPU host, whose kernels SGLang may need to build this model",
        ) from error


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """What SGLang does with a checkpoint's tensors, up to its post-processing."""
    loader.DefaultModelLoader.load_weights_only(model, weights, torch.device(_device()))


def postprocess(model: nn.Module) -> None:
    loader.DefaultModelLoader.postprocess_weights(model, torch.device(_device()))


def trace_layout(
    model: str | Path | ModelFiles,
    parallel: Parallel = _UNSPLIT,
    rank: int = 0,
    catalog: Catalog | None = None,
    *,
    arguments: Mapping[str, object] = MappingProxyType({}),
) -> Traced:
    """What `rank` of an instance of this model holds after SGLang's `load_weights`. Needs no weights and no memory for them.

    model: a directory, or the files of one. catalog: the checkpoint's tensors, by default those of the directory's safetensors
    files. arguments: more of SGLang's `ServerArgs`. Raises ConfigError for a split or an argument that SGLang doesn't have,
    LayoutError for what it can't build here or what can't be followed. Not thread-safe: SGLang's process-wide configuration
    is borrowed, and put back."""
    with _opened(model, catalog) as (directory, tensors), rank_of(directory, parallel, rank, arguments) as config:
        twin = build(config)
        return trace_loader(twin, partial(load_weights, twin), tensors, parallel=parallel, rank=rank, engine=VERSION)


def probe_layout(
    model: str | Path | ModelFiles,
    parallel: Parallel = _UNSPLIT,
    rank: int = 0,
    catalog: Catalog | None = None,
    *,
    processed: bool = False,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    bits: int | None = None,
    groups: Sequence[frozenset[str]] = (),
    arguments: Mapping[str, object] = MappingProxyType({}),
) -> Probed:
    """What `rank` of an instance really has after loading coded values and, if `processed`, after SGLang's post-processing: for
    small models, which are loaded several times. For `fixed`, `bits` and `groups` see `tracing.probe.run.probe`;
    otherwise like `trace_layout`."""
    with _opened(model, catalog) as (directory, tensors), rank_of(directory, parallel, rank, arguments) as config:
        return probe(
            partial(build, config, "cpu"),
            load_weights,
            tensors,
            finish=postprocess if processed else None,
            tensors_of=reachable_tensors,
            fixed=fixed,
            bits=bits,
            groups=groups,
        )


@contextmanager
def _opened(model: str | Path | ModelFiles, catalog: Catalog | None) -> Iterator[tuple[Path, Catalog]]:
    """A directory with the model's small files, and its tensors."""
    with TemporaryDirectory(prefix="peerload-") as scratch:
        if catalog is None:
            if isinstance(model, ModelFiles):
                raise ConfigError("a model's small files don't say which tensors it has", next_step="give a checkpoint directory")
            yield Path(model), Checkpoint.open(model).catalog
            return
        ModelFiles.of(model).write(Path(scratch))
        yield Path(scratch), catalog


@contextmanager
def _capability() -> Iterator[None]:
    """Where there is no GPU, some quantization methods ask for one's capability all the same: that of an H100 or H200."""
    ask = torch.cuda.get_device_capability
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda *_: (9, 0)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = ask


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
