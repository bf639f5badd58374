"""What tests ask of a SGLang scheduler, in its own process: a plug-in of SGLang, beside peerload's."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from peerload.tracing.reachable import reachable_tensors


def register() -> None:
    scheduler = sys.modules.get("sglang.srt.managers.scheduler")
    if scheduler is not None:
        scheduler.Scheduler.write_sha256 = write_sha256


def write_sha256(self: object, directory: str) -> None:
    """rank-R.json in `directory`: by dotted path, of every tensor the model holds, buffers and plain attributes included."""
    worker = self.tp_worker  # type: ignore[attr-defined]
    model: nn.Module = worker.model_runner.model
    found = {path: _sha256(t) for path, t in reachable_tensors(model).items()}
    (Path(directory) / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


def _sha256(tensor: torch.Tensor) -> str:
    shape = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(shape + flat.numpy().tobytes()).hexdigest()
