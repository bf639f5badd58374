"""SGLang's default loader, with the weights of this rank from peers: what `--load-format peerload` stands for."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import get_pp_group, get_tp_group, get_world_group
from sglang.srt.distributed.parallel_state import get_moe_expert_parallel_world_size
from sglang.srt.model_loader.loader import DefaultModelLoader, post_load_weights
from sglang.version import __version__
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError
from ..manifest import Parallel
from .worker import Identity, Worker

log = logging.getLogger(__name__)

ENGINE: Final = f"sglang {__version__}"


class Loader(DefaultModelLoader):
    """Made by SGLang for each model it loads, and for each update of weights from disk, which it then does as ever."""

    def __init__(self, load_config: LoadConfig) -> None:
        extra = load_config.model_loader_extra_config or {}
        self._config = Config.load(json.dumps(extra) if extra else "")
        super().__init__(dataclasses.replace(load_config, load_format=LoadFormat.AUTO, model_loader_extra_config={}))
        self._loading: ModelConfig | None = None
        self._worker: Worker | None = None

    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> nn.Module:
        self._loading = model_config
        try:
            return super().load_model(model_config=model_config, device_config=device_config)
        finally:
            self._loading = None

    def load_weights_and_postprocess(
        self, model: nn.Module, weights: Iterable[tuple[str, Tensor]], target_device: torch.device
    ) -> None:
        model_config = self._loading
        if model_config is None or not self._eligible(model_config, model):
            super().load_weights_and_postprocess(model, weights, target_device)
            return
        worker = Worker(
            identity(), self._config, self._directory(model_config),
            load_weights=lambda m, tensors: self.load_weights_only(m, tensors, target_device),
            load_all=lambda m: self.load_weights_only(m, weights, target_device),
            finish=post_load_weights if hasattr(model, "post_load_weights") else None,
        )  # fmt: skip
        worker.load(model)
        self.postprocess_weights(model, target_device)
        worker.serve(model)
        self._worker = worker

    def close(self, why: str) -> None:
        """End the seed, if there is one. Safe to call twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            log.info("peerload: %s; this rank is no longer a seed", why)
            worker.close()

    def _eligible(self, model_config: ModelConfig, model: nn.Module) -> bool:
        """Whether peers are asked for this model at all: it is one checkpoint, and the one that the instance serves."""
        reasons = {
            "a draft model": model_config.is_draft_model,
            "weights from several checkpoints": bool(getattr(model, "secondary_weights", ())),
        }
        found = [reason for reason, applies in reasons.items() if applies]
        if found and self._config.fallback != "disk" and not model_config.is_draft_model:
            raise ConfigError(f"{model_config.model_path}: {found[0]} can't come from peers, and fallback is {self._config.fallback}")
        if found:
            log.warning("peerload: %s (%s) is loaded from disk", model_config.model_path, found[0])
        return not found

    def _directory(self, model_config: ModelConfig) -> Path:
        """The checkpoint, downloaded if it has to be."""
        if Path(model_config.model_path).is_dir():
            return Path(model_config.model_path)
        return Path(self._prepare_weights(model_config.model_path, model_config.revision, fall_back_to_pt=False)[0])


def identity() -> Identity:
    """Which rank of which instance this process is. Collective: all ranks of the instance call it."""
    world = get_world_group()
    launch = world.broadcast_object(uuid.uuid4().hex if world.rank_in_group == 0 else None)
    parallel = Parallel(get_tp_group().world_size, get_pp_group().world_size, get_moe_expert_parallel_world_size())
    instance = f"{socket.gethostname()}/sglang/{launch[:8]}"
    return Identity(ENGINE, instance, launch, parallel, world.rank_in_group, world.world_size)
