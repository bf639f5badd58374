"""The command line: argument parsing, exit codes and signals. What the commands do is in `commands/`."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType, ModuleType
from typing import NoReturn

from .console import Console, indented
from .errors import ConfigError, PeerloadError, printable

#: Name, one line of help; each has a module in `commands/` with `configure(parser)` and `run(args, console)`.
COMMANDS = {
    "demo": "show the main job on this machine: a TP4 instance loads itself out of a running TP2 instance",
    "coordinator": "run the metadata server that says who holds what",
    "seed": "serve a checkpoint's weights from memory, without an engine",
    "pull": "load what each rank of an instance needs out of running seeds, and write it as safetensors",
    "plan": "explain who would read what from whom, from a model's config alone",
    "layout": "say which checkpoint element each byte of an engine's parameters holds",
    "ls": "list models, instances and ranks known to the coordinator",
    "doctor": "say what this host can do, and what to install for more",
    "bench": "measure this host: memcpy, transports, digest, planner",
}

#: Packages of the extra `transformers`, which some commands need.
EXTRA = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub")

#: As shells say it: 128 and the number of SIGINT.
INTERRUPTED = 130

TOP = """\
example, on this machine and without a GPU:
  peerload demo

a replica of vLLM or SGLang that loads out of its peers, and then serves the next one:
  peerload coordinator --listen 0.0.0.0:7070
  vllm serve MODEL --load-format peerload --model-loader-extra-config '{"url": "coordinator:7070"}'
  python -m sglang.launch_server --model-path MODEL --load-format peerload \\
      --model-loader-extra-config '{"url": "coordinator:7070"}'

every setting is in docs/config.md of the sources, what was shown for which model in docs/engines.md

"""
EPILOG = """\
exit status: 0 done; 2 bad arguments or configuration; 3 no plan possible (the hole or refusal is named);
4 sources lost and no fallback left; 5 verification failed; 1 anything else.
"""


class _Interrupted(KeyboardInterrupt):
    """SIGTERM: the same clean way out as Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    """Words it doesn't know are told like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Formatter(logging.Formatter):
    """What peers say is logged too: no control characters, and no line that looks like a record of its own."""

    def format(self, record: logging.LogRecord) -> str:
        return indented(printable(super().format(record)))


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; only the chosen command's module is imported."""
    parser = _Parser(
        prog="peerload",
        epilog=TOP + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Load a model's weights out of the memory of running replicas, peer to peer, under any pair of layouts.",
    )
    parser.add_argument("--version", action="version", version=f"peerload {version('peerload')}")
    _add_common(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = _module(name) if name == chosen else None
        command = commands.add_parser(
            name,
            help=text,
            description=(module.__doc__ if module else text),
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            module.configure(command)
        _add_common(command, default=argparse.SUPPRESS)  # what stands before the command counts too
    return parser


def _add_common(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="print exactly one JSON document on standard output")
    parser.add_argument("--verbose", "-v", action="store_true", default=default, help="log what happens, to standard error")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".commands.{name}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((w for w in words if not w.startswith("-")), None)
    try:
        args = build_parser(chosen if chosen in COMMANDS else None).parse_args(words)
    except ConfigError as error:
        help_of = f"peerload {chosen} --help" if chosen in COMMANDS else "peerload --help"
        Console(json="--json" in words).fail(ConfigError(error.message, next_step=help_of))
        return error.exit_code
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    signal.signal(signal.SIGTERM, _on_sigterm)
    console = Console(json=args.json)
    try:
        status: int = _module(args.command).run(args, console)
    except PeerloadError as error:
        console.fail(error)
        return error.exit_code
    except KeyboardInterrupt:
        console.document({"error": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED})
        console.say("interrupted")
        return INTERRUPTED
    except Exception as error:
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in EXTRA:
            lacking = ConfigError(
                f"{args.command} needs {package}, which isn't here", next_step="pip install 'peerload[transformers]'"
            )
            console.fail(lacking)
            return lacking.exit_code
        logging.getLogger(__name__).critical("unexpected error", exc_info=True)
        console.fail(PeerloadError(f"{type(error).__name__}: {error}", next_step="this is a bug in peerload; please report it"))
        return 1
    return status


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise _Interrupted
