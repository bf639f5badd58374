"""Measure this host. Each benchmark states the limit first, and ends in one line of JSON; with --json only that is printed.
Without a name, list them.

Examples:
  peerload bench transport
  peerload bench --json plan
  peerload bench digest -- --gib 0.5 --rounds 3
  peerload bench plan -- --help

"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from ..console import Console
from ..errors import ConfigError, PeerloadError

PACKAGE = "peerload.bench"
BENCHES = {
    "transport": "how fast transports move bytes between two processes, as a share of memcpy",
    "digest": "how fast digests are, as a share of memcpy",
    "plan": "planning and lowering for one target rank, up to Kimi-K2's size: seconds and memory",
    "load": "a whole load out of a peer's memory, against the engine's own load from disk",
    "cuda": "GPU memory between processes as a share of the driver's own copy, and digests on a GPU",
    "coordinator": "announcing, discovering and renewing at DeepSeek-V3's size",
}
WRONG_WORDS = 2  # argparse's exit status for arguments it doesn't know


def configure(parser: argparse.ArgumentParser) -> None:
    names = "\n".join(f"{name:12} {text}" for name, text in BENCHES.items())
    parser.add_argument("name", nargs="?", metavar="NAME", choices=list(BENCHES), help=f"one of: {', '.join(BENCHES)}")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="passed on to the benchmark")
    parser.description = f"{parser.description}Benchmarks:\n{names}"


def run(args: argparse.Namespace, console: Console) -> int:
    if args.name is None:
        console.document({"benchmarks": BENCHES})
        console.table("benchmarks", ("name", "what it measures"), list(BENCHES.items()))
        return 0
    module = f"{PACKAGE}.{args.name}"
    command = [sys.executable, "-m", module, *args.arguments]
    if not console.json:
        return _judged(args.name, subprocess.run(command, check=False).returncode)
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            for line in filter(str.strip, running.stdout):
                if last:
                    console.say(last.rstrip())
                last = line
        except KeyboardInterrupt:
            running.terminate()
            raise
    _judged(args.name, running.returncode)
    try:
        document = json.loads(last)
    except json.JSONDecodeError as error:
        raise PeerloadError(f"{module} did not end in a line of JSON: {last.strip()[:200]!r}") from error
    console.document(document)
    return 0


def _judged(name: str, status: int) -> int:
    """Zero; a benchmark that failed raises."""
    if status == WRONG_WORDS:
        raise ConfigError(f"benchmark {name} refuses its arguments", next_step=f"peerload bench {name} -- --help")
    if status != 0:
        raise PeerloadError(f"benchmark {name} ended with status {status}; see above")
    return 0
