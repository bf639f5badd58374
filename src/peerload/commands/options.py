"""Options that several commands share: the keys of `Config`, each as a flag, and the configuration file."""

from __future__ import annotations

import argparse

from ..config import KEYS, Config


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
