"""`--load-format peerload`: vLLM's own model, loader and post-processing, with the bytes from peers."""

from __future__ import annotations

import atexit
import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import vllm
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ...config import Config
from ...errors import ConfigError, LayoutError
from ...model.catalog import Parallel
from ..checkpoint import found_or_downloaded
from ..recipes import RECIPES
from ..worker import Identity, NotFollowed, Worker, free_given_up

log = logging.getLogger(__name__)

#: vLLM's weight transfers that hand what they receive to the model's `load_weights`; the others write into parameters.
_TELLING = ("nccl", "ipc")


class PeerloadLoader(BaseModelLoader):
    """One for each model that a vLLM worker loads (a draft model has its own)."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        told = load_config.model_loader_extra_config or {}
        if not isinstance(told, dict):
            raise ConfigError(f"model_loader_extra_config is a {type(told).__name__}, must be one JSON object")
        self._config = Config.from_mapping(told) if told else Config.load()
        self._disk = DefaultModelLoader(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._identity: Identity | None = None
        self._worker: Worker | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        self._disk.download_model(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """For vLLM's `reload_weights`."""
        return self._disk.get_all_weights(model_config, model)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Build, load, post-process, then serve others until the process ends or the weights change. A draft model comes from
        disk: it is small, and not every rank has it."""
        if model_config is not vllm_config.model_config or getattr(model_config, "runner", "") == "draft":
            return self._disk.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        registry = vllm_config.compilation_config
        layers, moe = registry.static_forward_context, registry.static_all_moe_layers
        before = dict(layers), list(moe)
        try:
            self._identity = identity(vllm_config, self._config)
            self._identity.launch.require_coordinator(self._config)
            model = self._from_peers(vllm_config, model_config, prefix)
        except NotFollowed as error:
            reason = error.message  # the error holds on to the model
        else:
            assert self._worker is not None, "load_model calls load_weights"
            if moving := _moving(vllm_config):
                log.warning("peerload: no seed: vLLM moves weights about under %s", moving)
            elif self._worker.serve(model):
                _end_when_changed(model, self._worker)
            return model
        free_given_up()
        log.warning("peerload: %s; vLLM loads it from disk, and this instance is no seed of it", reason)
        layers.clear()  # of the model that is given up
        layers.update(before[0])
        moe[:] = before[1]
        return self._disk.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def _from_peers(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> nn.Module:
        """Built, loaded, post-processed, and as it should be."""
        try:
            model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        except BaseException as error:
            if self._worker is not None:
                self._worker.give_up(error)
            raise
        assert self._worker is not None, "load_model calls load_weights"
        self._worker.settle(model)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        if self._identity is None:  # vLLM loads new weights into a model that is there
            self._disk.load_weights(model, model_config)
            return
        traced = False

        def checked_loader(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> object:
            nonlocal traced
            if not traced:
                refuse_unfollowable(model)
            loaded = model.load_weights(weights)  # type: ignore[operator]
            if not traced and model_config.quantization is None and loaded is not None:
                self._disk.track_weights_loading(model, loaded)  # vLLM's own check that no parameter was forgotten
            traced = True
            return loaded

        self._worker = Worker(
            self._identity,
            self._config,
            lambda: self._directory(model_config),
            engine_loader=checked_loader,
            known_as=model_config.model,
            recipes=RECIPES,
        )
        atexit.register(self._worker.close)  # a loader hears nothing of its worker's end
        self._worker.load(model)

    def _directory(self, model_config: ModelConfig) -> Path:
        def download() -> str:
            return self._disk._prepare_weights(model_config.model, None, model_config.revision, True, None)[0]

        return found_or_downloaded(model_config.model, self._config, download)


def identity(whole: VllmConfig, config: Config) -> Identity:
    """This worker among all that share its world. A collective call."""
    sizes = whole.parallel_config
    tp, pp = sizes.tensor_parallel_size, sizes.pipeline_parallel_size
    ep = tp * sizes.data_parallel_size if sizes.enable_expert_parallel else 1
    parallel = Parallel(tp=tp, pp=pp, ep=ep)
    return Identity.agreed(f"vllm {vllm.__version__}", config, get_world_group(), parallel)


def _moving(whole: VllmConfig) -> str:
    """The option under which vLLM writes into parameters, or moves them, and no call tells of it; "" if there is none."""
    for part in (whole.parallel_config, whole.model_config):
        for word in ("enable_eplb", "enable_sleep_mode"):
            if getattr(part, word, False):
                return word
    transfer = getattr(getattr(whole, "weight_transfer_config", None), "backend", "")
    return f"weight transfer over {transfer}" if transfer and transfer not in _TELLING else ""


def _end_when_changed(model: nn.Module, worker: Worker) -> None:
    """Whoever loads other weights into `model` (reload, RLHF's weight transfer) calls its `load_weights`: the seed ends first.
    Who writes into parameters in another way calls `plugin.withdraw`."""
    original = model.load_weights

    def withdraw() -> None:
        log.info("peerload: the weights are about to change: this rank is no seed any more")
        worker.close()
        model.load_weights = original
        del model.peerload_withdraw

    def changed(*args: object, **kwargs: object) -> object:
        withdraw()
        return original(*args, **kwargs)  # type: ignore[operator]

    model.load_weights, model.peerload_withdraw = changed, withdraw  # type: ignore[assignment]


def refuse_unfollowable(model: nn.Module) -> None:
    """Raise LayoutError for what vLLM makes while loading in a way that no trace sees."""
    if any(getattr(getattr(m, "quant_method", None), "uses_meta_device", False) for m in model.modules()):
        raise LayoutError(
            f"{type(model).__name__}: it is quantized while it is loaded, its weights aren't the checkpoint's",
            next_step="vLLM loads it from disk; a checkpoint that is stored quantized can come from peers",
        )
    if list(getattr(model, "secondary_weights", ())):
        raise LayoutError(f"{type(model).__name__}: it loads from several checkpoints")
