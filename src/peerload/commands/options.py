"""Options that several commands share: the keys of `Config`, each as a flag, and the configuration file."""

from __future__ import annotations

import argparse
import re
from typing import Final

from ..config import KEYS, Config
from ..errors import ConfigError
from ..manifest import Parallel

#: Ranks of one instance that a command lays out; a seed or a pull runs each on a thread.
MOST_RANKS: Final = 1024
_NUMBER: Final = re.compile("[0-9]{1,9}")


def add_config(parser: argparse.ArgumentParser, *names: str) -> None:
    """`--config` and a flag for each named key; a flag wins over the document."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", default="", metavar="JSON|FILE", help="one JSON document (default: $PEERLOAD_CONFIG)")
    for name in names:
        key = KEYS[name]
        flag, text = f"--{name.replace('_', '-')}", f"{key.metadata['help']} (default: {key.default})"
        if isinstance(key.default, bool):
            group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = type(key.default)
            group.add_argument(flag, dest=name, type=kind, choices=key.metadata["choices"] or None, default=None, help=text)


def config_of(args: argparse.Namespace, **changes: object) -> Config:
    """The configuration document with this command's flags, and then `changes`, laid over it."""
    flags = {name: getattr(args, name) for name in KEYS if getattr(args, name, None) is not None}
    return Config.load(args.config, **{**flags, **changes})


def add_parallel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallel layout")
    for name, text in (("tp", "tensor-parallel"), ("pp", "pipeline-parallel"), ("ep", "expert-parallel")):
        group.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{text} size (default: %(default)s)")


def parallel_of(args: argparse.Namespace) -> Parallel:
    if min(args.tp, args.pp, args.ep) < 1:
        raise ConfigError("--tp, --pp and --ep must be at least 1")
    return _bounded(Parallel(args.tp, args.pp, args.ep))


def parse_parallel(text: str) -> Parallel:
    """`tp=4,pp=2` as a parallel layout. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("tp", "pp", "ep") or not _NUMBER.fullmatch(value) or int(value) < 1 or name in sizes:
            raise ConfigError(f"{text!r} is no parallel layout", next_step="write it as in tp=4 or tp=8,ep=8")
        sizes[name] = int(value)
    return _bounded(Parallel(**sizes))


def _bounded(parallel: Parallel) -> Parallel:
    if parallel.tp * parallel.pp > MOST_RANKS or parallel.ep > MOST_RANKS:
        raise ConfigError(f"{parallel} has too many ranks, at most {MOST_RANKS} are possible")
    return parallel
