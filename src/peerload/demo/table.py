"""The demo's last page: what each rank of the target received, and how it compares."""

from __future__ import annotations

from ..console import Console
from .run import Story

PHASES = ("discover", "plan", "register", "transfer", "verify", "commit")


def show(console: Console, story: Story) -> None:
    limit = story.memcpy_gb_per_s
    rows = [
        (
            receipt.rank,
            _mb(receipt.needed_nbytes),
            _mb(receipt.wire_nbytes),
            _mb(receipt.attached_nbytes),
            f"{receipt.overhead:.3f}x",
            receipt.operations,
            *(f"{1000 * receipt.seconds.get(phase, 0.0):.0f}" for phase in PHASES),
            f"{receipt.transfer_gb_per_s:.1f}",
            f"{receipt.transfer_gb_per_s / limit:.0%}",
            f"{receipt.verified_nbytes / receipt.needed_nbytes:.0%}",
            f"{event.extra_nbytes / 1e6:.0f}",
        )
        for receipt, event in zip(story.receipts, story.target, strict=True)
    ]
    columns = ("rank", "needed MB", "wire MB", "mapped MB", "wire/needed", "ops", *PHASES)
    console.table(
        f"target TP{story.target_tp} out of seed TP{story.seed_tp}: {story.model}, {story.model_nbytes / 1e6:.0f} MB",
        (*columns, "GB/s", "of memcpy", "verified", "extra MB"),
        rows,
        caption="mapped MB: part of wire MB; pages mapped from the seed instead of copied (--no-attach copies all)\n"
        "discover to commit: milliseconds; extra MB: peak memory of the load beyond the rank's own weights",
    )
    wire, slowest_s = sum(r.wire_nbytes for r in story.receipts), max(r.seconds.get("transfer", 0.0) for r in story.receipts)
    rate = wire / slowest_s / 1e9 if slowest_s else 0.0
    share = f"{rate / limit:.0%} of this machine's memcpy, {rate / story.fresh_gb_per_s:.0%} of what it copies into fresh memory"
    console.text(f"all ranks together:  {wire / 1e6:.0f} MB in {slowest_s:.3f} s, {rate:.1f} GB/s ({share})")
    whole_s = max(r.wall_s for r in story.receipts)
    built_s = max(event.engine_s for event in story.target)
    console.text(
        f"whole load:          {built_s:.2f} s to build the model without weights, {whole_s:.2f} s from discover to commit"
    )
    console.text(f"for comparison:      {story.disk_s:.2f} s for the engine's own load, building included, from a hot page cache")
    console.text(f"generated:           {story.text[0]!r}")
    answer = {True: "yes", False: "NO"}
    console.text(f"bytes equal to the disk baseline, on every rank:  {answer[not story.differing]}")
    console.text(f"tokens equal to the disk baseline:                {answer[story.tokens_equal]}")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"
