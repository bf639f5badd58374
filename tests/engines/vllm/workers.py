"""What tests ask of a vLLM worker, in its own process (`worker_extension_cls`)."""

from __future__ import annotations

import hashlib
import os

import torch
import vllm._custom_ops
from torch import nn

from peerload.engines.vllm.plugin import Extension
from peerload.tracing.reachable import reachable_tensors

if os.environ.get("KEEP_WEIGHTS"):
    # vLLM's CPU backend packs linear weights for oneDNN, out of sight, and frees them. Without, they stay to be looked at.
    vllm._custom_ops._supports_onednn = False


class Looks(Extension):
    """Mixed into vLLM's worker, as our own extension of it is."""

    def sha256_of_tensors(self) -> dict[str, str]:
        """By dotted path, of every tensor the model holds, buffers and plain attributes included."""
        model: nn.Module = self.model_runner.model  # type: ignore[attr-defined]
        return {path: _sha256(t) for path, t in reachable_tensors(model).items()}

    def load_nothing(self) -> None:
        """As whoever changes the weights of a running model begins."""
        self.model_runner.model.load_weights(iter(()))  # type: ignore[attr-defined]


def _sha256(tensor: torch.Tensor) -> str:
    shape = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    if tensor.is_meta:  # a head that a classifier doesn't use
        return shape.decode()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(shape + flat.numpy().tobytes()).hexdigest()
