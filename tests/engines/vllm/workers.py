"""What tests ask of a vLLM worker, in its own process (`worker_extension_cls`)."""

from __future__ import annotations

import os

import vllm._custom_ops
from sha256 import sha256_of_tensors

from peerload.engines.vllm.plugin import Extension

if os.environ.get("KEEP_WEIGHTS"):
    # vLLM's CPU backend packs linear weights for oneDNN, out of sight, and frees them. Without, they stay to be looked at.
    vllm._custom_ops._supports_onednn = False


class Looks(Extension):
    """Mixed into vLLM's worker, as our own extension of it is."""

    def sha256_of_tensors(self) -> dict[str, str]:
        return sha256_of_tensors(self.model_runner.model)  # type: ignore[attr-defined]

    def load_nothing(self) -> None:
        """As whoever changes the weights of a running model begins."""
        self.model_runner.model.load_weights(iter(()))  # type: ignore[attr-defined]
