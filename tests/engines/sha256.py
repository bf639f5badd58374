"""What a model holds, as digests that two processes can compare."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from peerload.tracing.reachable import reachable_tensors


def sha256_of_tensors(model: nn.Module) -> dict[str, str]:
    """By dotted path, of every tensor the model holds, buffers and plain attributes included."""
    return {path: _sha256(t) for path, t in reachable_tensors(model).items()}


def _sha256(tensor: torch.Tensor) -> str:
    shape = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    if tensor.is_meta:  # a head that a classifier doesn't use
        return shape.decode()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(shape + flat.numpy().tobytes()).hexdigest()
