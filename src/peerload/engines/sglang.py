"""SGLang's model of any rank, built in one process that has no peers and needs no GPU: what its loader puts where.

SGLang asks one object, `get_parallel()`, for ranks, sizes and process groups. `rank_of` gives it an instance of one's own
in which the groups have a rank and a size and nothing else: a collective operation fails loudly. The model and its
`load_weights` are SGLang's, unmodified.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.model_runner import adjust_config_with_unaligned_cpu_tp
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__
from torch import Tensor, nn

from ..errors import ConfigError, LayoutError
from ..manifest import Parallel
from .checkpoint import ModelFiles



@dataclass(frozen=True, slots=True)
class _Group:
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
def rank_of(directory: Path, parallel: Parallel, rank: int) -> Iterator[ModelConfig]:
    """SGLang's process-wide configuration, for as long as the block lasts, that of rank `rank` (tensor-parallel rank
    fastest) of an instance of the model in `directory`. Yields the model's configuration. Not thread-safe."""
    size = parallel.tp * parallel.pp
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below {size}")
    if parallel.ep > parallel.tp or parallel.tp % parallel.ep:
        raise ConfigError(f"SGLang's expert parallelism divides its tensor parallelism: ep={parallel.ep}, tp={parallel.tp}")
    before = runtime_context.snapshot_context()
    runtime_context.reset_context()
    try:
        arguments = ServerArgs(
            model_path=str(directory), tp_size=parallel.tp, pp_size=parallel.pp, ep_size=parallel.ep, device=_device(),
            skip_tokenizer_init=True,
        )  # fmt: skip
        runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
        known, now = runtime_context._parallel_fields(), runtime_context.get_parallel()
        groups = {
            "world_group": _Group(size, rank),
            "pp_group": _Group(parallel.pp, now.pp_rank),
            "tp_group": _Group(parallel.tp, now.tp_rank),
            "attn_tp_group": _Group(now.attn_tp_size, now.attn_tp_rank),
            "attn_cp_group": _Group(1, 0),
            "moe_ep_group": _Group(now.moe_ep_size, now.moe_ep_rank),
            "moe_tp_group": _Group(now.moe_tp_size, now.moe_tp_rank),
            "moe_dp_group": _Group(1, 0),
            "shared_experts_tp_group": _Group(parallel.tp, now.tp_rank),
        }
        now.override_permanently(**{name: group for name, group in groups.items() if name in known})
        config = ModelConfig.from_server_args(arguments)
        if arguments.device == "cpu":
            config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), parallel.tp)
        yield config
    finally:
        runtime_context.restore_context(before)


def build(config: ModelConfig, device: str = "meta") -> nn.Module:
    """The model of the rank that `rank_of` is, its parameters not yet written. Raises LayoutError for what SGLang can't
    build here."""
    load = LoadConfig()
    quantization = loader._get_quantization_config(config, load)
    with set_default_torch_dtype(config.dtype), torch.device(device):
        return loader._initialize_model(config, load, quantization)


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """What SGLang does with a checkpoint's tensors, up to its post-processing."""
    loader.DefaultModelLoader.load_weights_only(model, weights, torch.device(_device()))


def postprocess(model: nn.Module) -> None:
    loader.DefaultModelLoader.postprocess_weights(model, torch.device(_device()))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
