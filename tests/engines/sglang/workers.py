"""What tests ask of a SGLang scheduler, in its own process: a plug-in of SGLang, beside peerload's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sha256 import sha256_of_tensors
from torch import nn


def register() -> None:
    scheduler = sys.modules.get("sglang.srt.managers.scheduler")
    if scheduler is not None:
        scheduler.Scheduler.write_sha256 = write_sha256


def write_sha256(self: object, directory: str) -> None:
    """`sha256_of_tensors` of the model, as rank-R.json in `directory`."""
    worker = self.tp_worker  # type: ignore[attr-defined]
    model: nn.Module = worker.model_runner.model
    (Path(directory) / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(sha256_of_tensors(model)))
