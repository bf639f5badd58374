"""The one configuration, the same everywhere: `--config FILE|JSON`, an engine's loader extra config, or keyword arguments.

This module is the only reader of the environment: `PEERLOAD_CONFIG` holds a JSON document or the path of one,
`XDG_CACHE_HOME` says where files go that can be made again, and `XDG_STATE_HOME` where those go that should last.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError

#: The longest that any setting may ask to wait, seconds: a day. The coordinator keeps decisions longer (`directory.DECISION_S`).
LONGEST_S: Final = 86400.0
#: The most bytes, or threads, that any setting may ask for.
MOST: Final = 1 << 50


def _setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting there is. `docs/config.md` is generated from this class."""

    url: str = _setting("127.0.0.1:7070", "coordinator, HOST:PORT")
    model_name: str = _setting("", "name of the model at the coordinator; empty: the Hub's name, or the directory's")
    revision: str = _setting("", "revision of the model; seeds of another revision are never read")
    source: bool = _setting(True, "may this process become a seed once it holds the weights")
    transport: str = _setting(
        "auto",
        "how bytes move; auto: cuda_ipc for weights on a GPU, local for others, both within one host. nixl reaches CPU "
        "memory of other hosts and needs `interface`",
        ("auto", "local", "nixl", "cuda_ipc"),
    )
    interface: str = _setting(
        "",
        "network interface that transport nixl uses, such as eth0 (passed to UCX as UCX_NET_DEVICES). Every process that can "
        "reach it there can read and overwrite the weights in this process's memory, and whoever announces a seed can end the "
        "processes that read it: name one that only trusted machines reach",
    )
    registration: str = _setting(
        "per-allocation",
        "granularity of registered memory: one region for each tensor, for each allocation, or for all (not "
        "possible when the engine allocates each weight separately)",
        ("per-tensor", "per-allocation", "arena"),
    )
    match: str = _setting(
        "any",
        "which seeds may feed this process: any layout, or only those of the same TP, PP and EP sizes",
        ("any", "same-parallelism"),
    )
    verify: str = _setting(
        "on",
        "on: compare digests of what arrived with what the seeds announced, and leave out a seed that announces none. A "
        "digest proves that bytes are the seed's, not that the seed is honest. off: weights are committed unproven; seeds need "
        "not hash theirs. What is left is the fence, which shows a change of weights that the seed knows of. Bytes that are "
        "damaged on the way or in memory, and weights that are written over unannounced, are not noticed. JSON's true and false "
        "mean the same",
        ("on", "off"),
    )
    fallback: str = _setting("disk", "when no seed can supply a tensor: read the checkpoint from disk, or fail", ("disk", "fail"))
    wait_s: float = _setting(
        0.0,
        "seconds to wait for seeds that are not there yet before falling back, at most 86400. Ends sooner when those that "
        "are there hold all that seeds will ever give",
    )
    deadline_s: float = _setting(600.0, "seconds the whole load may take, the waiting included; at most 86400, a day")
    stall_s: float = _setting(5.0, "seconds without progress after which a source is given up like a dead one")
    staging_bytes: int = _setting(256 << 20, "upper bound of temporary memory, bytes")
    retain_bytes: int = _setting(
        256 << 20,
        "memory of each rank, bytes, in which a seed keeps copies of small tensors as they were loaded, where its "
        "engine's post-processing rewrites them. On a GPU it is GPU memory, and is missing from the engine's KV cache",
    )
    attach: bool = _setting(
        True,
        "on one host, map a seed's frozen memory copy-on-write instead of copying it; seeds freeze theirs. Off: no memory "
        "is shared between instances",
    )
    threads: int = _setting(0, "threads that move and hash bytes; 0: one for each core this process may use")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            if setting.name == "verify" and isinstance(value, bool):
                value = "on" if value else "off"
                object.__setattr__(self, setting.name, value)
            wanted = type(setting.default)
            if wanted is float and type(value) is int:
                object.__setattr__(self, setting.name, float(max(-1, min(value, MOST))))
            elif type(value) is not wanted:
                raise ConfigError(f"{setting.name} is {value!r}, must be of type {wanted.__name__}")
            if choices and value not in choices:
                raise ConfigError(f"{setting.name} is {value!r}, must be one of {', '.join(choices)}")
        for name in ("wait_s", "deadline_s", "stall_s", "staging_bytes", "retain_bytes", "threads"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name} is {value}, must not be negative")
            most = LONGEST_S if isinstance(value, float) else MOST
            if not value <= most:  # nor is NaN
                raise ConfigError(f"{name} is more than {most:g}, or no number at all")

    @property
    def verifies(self) -> bool:
        """Whether targets compare digests, and seeds announce them."""
        return self.verify != "off"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Raises ConfigError for a key that doesn't exist, listing those that do."""
        unknown = sorted(values.keys() - KEYS.keys())
        if unknown:
            raise ConfigError(f"unknown configuration key {unknown[0]!r}; known keys: {', '.join(KEYS)}")
        return cls(**values)

    @classmethod
    def load(cls, source: str = "", /, **overrides: Any) -> Config:
        """From a JSON document or the path of one (default: $PEERLOAD_CONFIG, else the defaults); keyword arguments
        that are not None win."""
        text = source if source else os.environ.get("PEERLOAD_CONFIG", "")
        if text and not text.lstrip().startswith("{"):
            path = Path(text)
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"configuration file {path}: {error.strerror}") from error
            except ValueError as error:  # no text, or no name that a file can have
                raise ConfigError(f"configuration file {str(path)!r:.200}: {error}") from error
        try:
            values = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError("the configuration must be one JSON object")
        return cls.from_mapping({**values, **{k: v for k, v in overrides.items() if v is not None}})

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


KEYS: Final = {f.name: f for f in dataclasses.fields(Config)}


def state_folder() -> Path:
    """Where the coordinator's store lies unless told otherwise (https://specifications.freedesktop.org/basedir-spec)."""
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".local" / "state") / "peerload"


def cache_folder() -> Path:
    """Where layouts are kept that offline commands have derived (https://specifications.freedesktop.org/basedir-spec)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "peerload" / "layouts"
