"""SGLang's default loader, with the weights of this rank from peers: what `--load-format peerload` stands for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import get_moe_ep_group, get_pp_group, get_tp_group, get_world_group
from sglang.srt.model_loader.loader import DefaultModelLoader, post_load_weights
from sglang.version import __version__
from torch import Tensor, nn

from ...config import Config
from ...errors import LayoutError
from ...model.catalog import Parallel
from ..checkpoint import found_or_downloaded
from ..worker import Identity, NotFollowed, Worker, free_given_up

log = logging.getLogger(__name__)

ENGINE: Final = f"sglang {__version__}"


class Loader(DefaultModelLoader):
    """Made by SGLang for each model it loads, and for each update of weights from disk, which it then does as ever."""

    def __init__(self, load_config: LoadConfig) -> None:
        told = load_config.model_loader_extra_config or {}
        self._config = Config.from_mapping(told) if told else Config.load()
        super().__init__(dataclasses.replace(load_config, load_format=LoadFormat.AUTO, model_loader_extra_config={}))
        self._loading: tuple[ModelConfig, Identity] | None = None
        self._worker: Worker | None = None

    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> nn.Module:
        """Build, load, post-process, then serve others until `close`. A draft model comes from disk: it is small, and no part
        of what the instance is known by."""
        if not model_config.is_draft_model:
            who = identity(self._config)
            try:
                who.launch.require_coordinator(self._config)
                self._loading = model_config, who
                return super().load_model(model_config=model_config, device_config=device_config)
            except NotFollowed as error:
                reason = error.message  # the error holds on to the model
            finally:
                self._loading = None
            free_given_up()
            log.warning("peerload: %s; SGLang loads it from disk, and this instance is no seed of it", reason)
        return super().load_model(model_config=model_config, device_config=device_config)

    def load_weights_and_postprocess(
        self, model: nn.Module, weights: Iterable[tuple[str, Tensor]], target_device: torch.device
    ) -> None:
        if self._loading is None:
            super().load_weights_and_postprocess(model, weights, target_device)
            return

        def sglang_loader(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
            if list(getattr(model, "secondary_weights", ())):
                raise LayoutError(f"{type(model).__name__}: it loads from several checkpoints")
            self.load_weights_only(model, weights, target_device)

        config, who = self._loading
        worker = Worker(
            who,
            self._config,
            lambda: self._directory(config),
            engine_loader=sglang_loader,
            finish=finishing(model),
            known_as=config.model_path,
        )
        worker.load(model)
        self.postprocess_weights(model, target_device)
        worker.serve(model)
        self._worker = worker

    def close(self, why: str) -> None:
        """End the seed, if there is one. Safe to call twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            log.info("peerload: %s: this rank is no seed any more", why)
            worker.close()

    def _directory(self, model_config: ModelConfig) -> Path:
        def download() -> str:
            return self._prepare_weights(model_config.model_path, model_config.revision, fall_back_to_pt=False)[0]

        return found_or_downloaded(model_config.model_path, self._config, download)


def finishing(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """What `model`, of which nothing has been loaded yet, computes out of its parameters at the end of its own loading (absorbed
    MLA weights), for when the bytes are there; None if it has no such step.

    SGLang keeps the memory of what it computed before, and writes into it; where a trace has put a tensor without memory,
    what was there first is put back."""
    if not hasattr(model, "post_load_weights"):
        return None
    before = [(module, dict(vars(module))) for module in model.modules()]

    def finish(model: nn.Module) -> None:
        for module, attributes in before:
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(module, name, attributes.get(name))
        post_load_weights(model)

    return finish


def identity(config: Config) -> Identity:
    """Which rank of which instance this process is. A collective call."""
    parallel = Parallel(get_tp_group().world_size, get_pp_group().world_size, get_moe_ep_group().world_size)
    return Identity.agreed(ENGINE, config, get_world_group(), parallel)
