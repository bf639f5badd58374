"""Which transformers class a config.json means, and which tensors a checkpoint of it has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ConfigError
from ..layout.trace import DTYPE_NAMES
from ..manifest import Catalog, TensorSpec
from .checkpoint import ModelFiles
from .quantized import kept, quantizer_of


def config_of(files: ModelFiles) -> PreTrainedConfig:
    """Raises ConfigError for a model_type that this transformers doesn't know."""
    values = files.config
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"config.json: model_type {kind!r} is unknown to transformers {transformers.__version__}",
            next_step="install a transformers that has it; models that bring their own code are not supported",
        )
    return CONFIG_MAPPING[kind].from_dict(values)


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class named first in `architectures`, else the causal language model of this config. Raises ConfigError."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        raise ConfigError(f"config.json: architectures names {name}, which transformers {transformers.__version__} lacks")
    try:
        chosen: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ConfigError(f"config.json: {config.model_type} has no causal language model in transformers") from error
    return chosen


def catalog_of(files: ModelFiles) -> Catalog:
    """The tensors that a checkpoint of this model has: names, dtypes and shapes as transformers would save them, its own
    weight conversions undone (experts one by one, not stacked) and tied names left out; by name. Needs no weights."""
    config = config_of(files)
    kind = class_of(config)
    with quiet(), kept():
        config.dtype = config.dtype or torch.float32
        quantizer = quantizer_of(files)
        with torch.device("meta"):
            model = kind._from_config(config, dtype=config.dtype)
        if quantizer is not None:
            quantizer.preprocess_model(model, dtype=config.dtype, device_map=None, checkpoint_files=None)
            model._weight_conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer, add_legacy=False)
        state: dict[str, torch.Tensor] = model.state_dict()
        dropped = {*model.get_expanded_tied_weights_keys(all_submodels=True), *(model._keys_to_ignore_on_save or ())}
        state = revert_weight_conversion(model, {name: t for name, t in state.items() if name not in dropped})
    return Catalog.of(TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in sorted(state.items()))


def generation_config(files: ModelFiles) -> GenerationConfig:
    """What `from_pretrained` would make of the model's directory."""
    with TemporaryDirectory() as directory:
        files.write(Path(directory))
        if "generation_config.json" in files.contents:
            return GenerationConfig.from_pretrained(directory)
        return GenerationConfig.from_pretrained(directory, config_file_name="config.json", _from_model_config=True)


@contextmanager
def quiet(verbosity: int = logging.ERROR) -> Iterator[None]:
    """No progress bars of transformers, and its log at `verbosity`; restored afterwards."""
    log: Any = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(max(verbosity, before))
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
