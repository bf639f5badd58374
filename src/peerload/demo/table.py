"""The demo's last page: what each rank of the target received, and how it compares."""

from __future__ import annotations

from ..console import Console
from .run import Story

PHASES = ("discover", "plan", "register", "transfer", "verify", "commit")


def show(console: Console, story: Story) -> None:
    receipts = story.receipts()
    rows: list[tuple[object, ...]] = []
    for receipt, event in zip(receipts, story.target, strict=True):
        seconds, rate = receipt["seconds"], float(str(receipt["transfer_gb_per_s"]))
        assert isinstance(seconds, dict), "a receipt has seconds by phase"
        grown = int(str(event["rss_peak"])) - int(str(event["rss_before"])) - int(str(event["held_nbytes"]))
        rows.append((
            str(receipt["rank"]), _mb(receipt["needed_nbytes"]), _mb(receipt["wire_nbytes"]), f"{float(str(receipt['overhead'])):.3f}x",
            f"{receipt['operations']:,}", *(f"{1000 * seconds.get(phase, 0.0):.0f}" for phase in PHASES), f"{rate:.1f}",
            f"{rate / story.memcpy_gb_per_s:.0%}", f"{100 * int(str(receipt['verified_nbytes'])) / int(str(receipt['needed_nbytes'])):.0f} %",
            f"{max(0, grown) / 1e6:.0f}",
        ))  # fmt: skip
    wire = sum(int(str(r["wire_nbytes"])) for r in receipts)
    slowest_s = max(float(r["seconds"]["transfer"]) for r in receipts)  # type: ignore[index]
    console.table(
        f"target TP{story.target_tp} out of seed TP{story.seed_tp}: {story.model}, {story.model_nbytes / 1e6:.0f} MB",
        (
            "rank",
            "needed MB",
            "wire MB",
            "wire/needed",
            "operations",
            *(f"{p} ms" for p in PHASES),
            "GB/s",
            "of memcpy",
            "verified",
            "extra MB",
        ),
        rows,
        caption="extra MB: peak memory during the load beyond the rank's own weights",
    )
    wall_s = max(float(str(r["wall_s"])) for r in receipts)
    together = wire / slowest_s / 1e9
    console.text(
        f"all ranks together: {wire / 1e6:.0f} MB in {slowest_s:.3f} s, {together:.1f} GB/s, {together / story.memcpy_gb_per_s:.0%} of this machine's memcpy ({story.memcpy_gb_per_s:.1f} GB/s)"
    )
    console.text(
        f"whole load, discover to commit: {wall_s:.2f} s; the engine's own load from disk: {story.disk_s:.2f} s (page cache hot)"
    )
    console.text(f"generated: {story.text[0]!r}")
    yes = {True: "yes", False: "NO"}
    console.text(f"bytes equal to the disk baseline on every rank:  {yes[not story.differing]}")
    console.text(f"tokens equal to the disk baseline:               {yes[story.tokens_equal]}")


def _mb(nbytes: object) -> str:
    return f"{int(str(nbytes)) / 1e6:.1f}"
