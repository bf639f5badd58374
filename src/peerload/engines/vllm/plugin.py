"""vLLM's plug-in (entry point `vllm.general_plugins`): makes `--load-format peerload` known.

    vllm serve MODEL --load-format peerload --model-loader-extra-config '{"url": "coordinator:7070"}'

The JSON is peerload's one configuration (`docs/config.md`); without it, `$PEERLOAD_CONFIG` is. Every instance is started in the
same way: it loads from running ones or from disk, then is a seed itself.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader


def withdraw(model: nn.Module) -> bool:
    """Offer the weights of `model` no more, if this process does. Call it on every rank before anything but `load_weights` writes
    into parameters of a running model. False if there was no seed."""
    end = getattr(model, "peerload_withdraw", None)
    if end is not None:
        end()
    return end is not None


class Extension:
    """For `--worker-extension-cls peerload.engines.vllm.plugin.Extension`, or as a base class of your own extension: then
    `collective_rpc("peerload_withdraw")` ends the seeds of all ranks."""

    def peerload_withdraw(self) -> bool:
        return withdraw(self.model_runner.model)  # type: ignore[attr-defined]


@cache
def register() -> None:
    """Called by vLLM in each of its processes, maybe several times. Costs nothing until the format is asked for."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Peerload(BaseModelLoader):
        def __new__(cls, load_config: LoadConfig) -> BaseModelLoader:
            from .loader import PeerloadLoader

            _join_log()
            return PeerloadLoader(load_config)

    register_model_loader("peerload")(Peerload)


def _join_log() -> None:
    """Our lines look like vLLM's and go where they go."""
    ours, theirs = logging.getLogger("peerload"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, False
        ours.setLevel(theirs.getEffectiveLevel())
