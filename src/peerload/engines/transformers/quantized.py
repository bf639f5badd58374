"""Quantized checkpoints in transformers: which of its quantizers leave the weights as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ...errors import LayoutError
from ..checkpoint import ModelFiles


class _KeptQuantized(FineGrainedFP8HfQuantizer):
    """As on an accelerator that has kernels for FP8: elsewhere transformers computes BF16 weights while it loads."""

    def validate_environment(self, *_: object, **__: object) -> None:
        self.quantization_config.dequantize = False


@contextmanager
def kept(keep: bool = True) -> Iterator[None]:
    """Within the block (and if `keep`) transformers holds FP8 weights and their scales as the checkpoint has them, whatever
    this host can compute with. Not thread-safe."""
    before = {name: AUTO_QUANTIZER_MAPPING[name] for name in ("fp8", "mxfp8")}
    if keep:
        AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(before, _KeptQuantized))
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(before)


def method_of(files: ModelFiles) -> str:
    """The quantization that config.json names, "" for none."""
    found = files.config.get("quantization_config")
    return str(found.get("quant_method", "unnamed")) if isinstance(found, dict) and found else ""


def quantizer_of(files: ModelFiles) -> HfQuantizer | None:
    """The quantizer that transformers has for these files, None for a model that isn't quantized. Raises LayoutError, naming the
    quantizer, when transformers has none or lacks what it needs on this host."""
    method = method_of(files)
    if not method:
        return None
    settings: Any = files.config["quantization_config"]
    try:
        made: HfQuantizer = AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(dict(settings)), pre_quantized=True)
        made.validate_environment(device_map=None)  # type: ignore[no-untyped-call]
    except (ImportError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise LayoutError(
            f"config.json: quantization_config: quantizer {method} can't be used here: {error}",
            next_step="install what it needs, or load this model with an engine that has it",
        ) from error
    return made


def holds_quantized(model: nn.Module) -> bool:
    """Does this model keep FP8 weights, rather than having been dequantized?"""
    return any(isinstance(module, FP8Linear | FP8Experts) for module in model.modules())
