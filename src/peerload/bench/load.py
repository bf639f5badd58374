"""A whole load: 1 GiB of Llama into four ranks, out of a TP2 seed's memory and by the engine's own load from page cache
(--cold: from disk).

    peerload bench load -- [--layers 9] [--rounds 5] [--seed-tp 2] [--target-tp 4] [--no-attach] [--no-verify] [--cold]

Both kinds of instance are real processes of the same engine, in turn, A B A B. Counted is everything from the start of
building the model until every page of every parameter can be read (`whole_s`, the slowest rank): construction, discovery,
planning, registration, transfer, digests and agreement on the one side, mapping, reading and slicing files on the other.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from ..config import Config
from ..console import Console
from ..demo.events import Generated, RankLoaded, RankSpec
from ..demo.instance import DemoInstance
from ..demo.run import START_S, coordinator
from ..memory.speed import memcpy_gb_per_s
from ..receipt import Receipt

#: Common ones, about 1 GiB with 9 layers: every shard is a whole number of pages, as in the models people serve.
DIMENSIONS: Final[dict[str, int]] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 16384,
}


def _forget(directory: Path) -> None:
    """Have the kernel drop what it has cached of a checkpoint's files."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    from ..testing.checkpoints import make_checkpoint

    console = Console()
    figures: dict[Literal["peer", "disk"], list[float]] = {"peer": [], "disk": []}
    receipts: list[Receipt] = []
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerload-bench-")))
        directory = make_checkpoint(room / "llama", "llama", "demo", num_hidden_layers=args.layers, **DIMENSIONS)
        nbytes = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
        limit = memcpy_gb_per_s()
        console.say(f"{nbytes / 2**30:.2f} GiB; limit: memcpy {limit:.1f} GB/s")
        config = Config(
            url=stack.enter_context(coordinator(room)),
            model_name="bench",
            transport=args.transport,
            interface=args.interface,
            verify="off" if args.no_verify else "on",
            attach=not args.no_attach,
        )
        spec = RankSpec(role="peer", instance="seed", rank=0, size=args.seed_tp, model_dir=str(directory), config=config)
        seed = stack.enter_context(DemoInstance(spec, room))
        seed.wait_for(Generated, START_S)
        target = replace(spec, size=args.target_tp, config=config.replace(source=False, fallback="fail"))
        for number in range(args.rounds + 1):
            for role, seconds in figures.items():
                if args.cold and role == "disk":
                    _forget(directory)
                with DemoInstance(replace(target, role=role, instance=f"{role}{number}"), room) as instance:
                    events = instance.wait_for(RankLoaded, START_S)
                whole_s = max(e.whole_s for e in events)
                if number > 0:  # the first of each warms up
                    seconds.append(whole_s)
                    receipts += [e.receipt for e in events if e.receipt is not None]
                console.say(f"{role}: {whole_s:.3f} s")
    told = {"model_bytes": nbytes, "memcpy_gb_per_s": round(limit, 2)}
    print(json.dumps({"bench": "load"} | told | _summary(args, figures["peer"], figures["disk"], receipts)))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed-tp", type=int, default=2)
    parser.add_argument("--target-tp", type=int, default=4)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--interface", default="", help="for transport nixl")
    parser.add_argument("--no-attach", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--cold", action="store_true", help="the engine's load finds nothing in the page cache")
    return parser.parse_args(argv)


def _summary(
    args: argparse.Namespace, ours: Sequence[float], theirs: Sequence[float], receipts: Sequence[Receipt]
) -> dict[str, object]:
    """Medians over the rounds; `ours` and `theirs` are seconds of the slowest rank."""
    phases = sorted({p for r in receipts for p in r.seconds})
    return {
        "seed_tp": args.seed_tp,
        "target_tp": args.target_tp,
        "attached_bytes": sum(r.attached_nbytes for r in receipts) // args.rounds,
        "peerload_s": round(statistics.median(ours), 4),
        "engine_disk_s": round(statistics.median(theirs), 4),
        "times_faster": round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3),
        "phases_s": {p: round(statistics.median(r.seconds.get(p, 0.0) for r in receipts), 4) for p in phases},
        "verify": not args.no_verify,
        "attach": not args.no_attach,
        "cold": args.cold,
    }


if __name__ == "__main__":
    sys.exit(main())
