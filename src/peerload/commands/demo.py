"""Show the main job on this machine, with nothing but its CPU: a coordinator, a seed instance that loads a Llama checkpoint
from disk and offers its memory, and a target instance of another TP size that loads itself out of it, verifies every byte,
commits and generates. The same target is then loaded from disk by the engine itself, and bytes and tokens are compared.

Examples:
  peerload demo
  peerload demo --seed-tp 4 --target-tp 2
  peerload demo --model /models/my-llama --transport nixl --interface lo

"""

from __future__ import annotations

import argparse
import dataclasses

from ..console import Console
from ..demo.events import RankLoaded
from ..errors import ConfigError, VerifyError
from .options import add_config, config_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed-tp", type=int, default=2, metavar="N", help="tensor-parallel size of the seed (default: %(default)s)"
    )
    parser.add_argument(
        "--target-tp", type=int, default=4, metavar="N", help="tensor-parallel size of the target (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default="", metavar="DIR", help="your own model directory (default: a 340 MB Llama made on the spot)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="tokens to generate for each prompt (default: %(default)s)"
    )
    add_config(parser, "transport", "interface", "registration", "attach", "verify", "match")


def run(args: argparse.Namespace, console: Console) -> int:
    from ..demo.run import tell
    from ..demo.table import show

    if min(args.seed_tp, args.target_tp, args.new_tokens) < 1:
        raise ConfigError("--seed-tp, --target-tp and --new-tokens must be at least 1")
    story = tell(console, args.seed_tp, args.target_tp, args.model, config_of(args), args.new_tokens)
    console.document(
        {
            "ok": story.equal,
            "model": story.model,
            "model_bytes": story.model_nbytes,
            "seed_tp": story.seed_tp,
            "target_tp": story.target_tp,
            "memcpy_gb_per_s": round(story.memcpy_gb_per_s, 2),
            "fresh_gb_per_s": round(story.fresh_gb_per_s, 2),
            "tokens_equal": story.tokens_equal,
            "differing": story.differing,
            "disk_load_s": round(story.disk_s, 3),
            "wall_s": round(story.wall_s, 1),
            "tokens": story.tokens,
            "ranks": [_rank(event) for event in story.target],
        }
    )
    show(console, story)
    if not story.equal:
        what = ", ".join(story.differing[:5]) or "tokens"
        raise VerifyError(f"the target differs from the disk baseline: {what}")
    return 0


def _rank(event: RankLoaded) -> dict[str, object]:
    assert event.receipt is not None, "the target loads through peerload"
    return {**dataclasses.asdict(event), "receipt": event.receipt.to_dict(), "extra_nbytes": event.extra_nbytes}
