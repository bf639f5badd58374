"""Which transformers class a config.json means, and which tensors a checkpoint of it has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...errors import ConfigError
from ...model.catalog import Catalog, TensorSpec
from ...tracing.dtypes import DTYPE_NAMES
from ..checkpoint import ModelFiles
from .quantized import kept, quantizer_of

#: What transformers raises for configurations that make no sense to it, and for what it can't do.
FAILURES: Final = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    OSError,
)
#: A model is built layer by layer even where it has no memory. More layers or experts than this, and than the checkpoint has
#: tensors, are refused before; and so is any other number of things beyond _MOST.
_MOST_LAYERS: Final = 4096
_MOST: Final = 1 << 20


def config_of(files: ModelFiles, tensors: int = 0) -> PreTrainedConfig:
    """`tensors`: how many the checkpoint has, if that is known. Raises ConfigError for a model_type that this transformers
    doesn't know, and for values that it refuses."""
    values = files.config
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"config.json: model_type {kind!r} is unknown to transformers {transformers.__version__}",
            next_step="install a transformers that has it; models that bring their own code are not supported",
        )
    _refuse_absurd(values, max(tensors, _MOST_LAYERS))
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except FAILURES as error:
        raise ConfigError(f"config.json: transformers {transformers.__version__} refuses it: {told(error)}") from error


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class named first in `architectures`, else the causal language model of this config. Raises ConfigError."""
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"config.json: architectures is {named!r:.100}, must be a list of names")
    for name in named:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        raise ConfigError(f"config.json: architectures names {name}, which transformers {transformers.__version__} lacks")
    try:
        chosen: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ConfigError(f"config.json: {config.model_type} has no causal language model in transformers") from error
    kind: type[PreTrainedModel] = chosen
    return kind


def built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on `meta`. Raises ConfigError when there is none of this config."""
    try:
        config.dtype = config.dtype or torch.float32
        with torch.device("meta"):
            model: PreTrainedModel = kind._from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
    except FAILURES as error:
        raise ConfigError(f"config.json: {kind.__name__} can't be built of it: {told(error)}") from error
    return model


def told(error: BaseException) -> str:
    """An engine's error in one line."""
    words = " ".join(str(error).split())
    return words if isinstance(error, StrictDataclassError) else f"{type(error).__name__}: {words}"


def _refuse_absurd(values: dict[str, object], most_layers: int) -> None:
    """Raise ConfigError for a number of layers, experts or anything else that no model has, at any depth of the config."""
    rest: list[object] = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        if not isinstance(value, dict):
            continue
        for name, number in value.items():
            most = most_layers if "layer" in name or "expert" in name else _MOST
            if not isinstance(number, int | float):
                rest.append(number)
            elif name.startswith(("num_", "n_")) and number > most:
                raise ConfigError(f"config.json: {name} is {number!s:.30}, at most {most} are possible here")


def catalog_of(files: ModelFiles) -> Catalog:
    """The tensors that a checkpoint of this model has: names, dtypes and shapes as transformers would save them, its own
    weight conversions undone (experts one by one, not stacked) and tied names left out; by name. Needs no weights. Raises
    ConfigError."""
    config = config_of(files)
    kind = class_of(config)
    with quiet(), kept():
        quantizer = quantizer_of(files)
        model = built(kind, config)
        if quantizer is not None:
            quantizer.preprocess_model(model, dtype=config.dtype, device_map=None, checkpoint_files=None)
            conversions: Any = get_model_conversion_mapping(model, hf_quantizer=quantizer, add_legacy=False)
            model._weight_conversions = conversions
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
