"""List what the coordinator knows: every rank of every instance of every model, its layout and what is left of its lease.

Example:
  peerload ls --url coordinator:7070

"""

from __future__ import annotations

import argparse

from ..console import Console
from ..coordinator.client import CoordinatorClient
from .options import add_config, config_of


def configure(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "url")


def run(args: argparse.Namespace, console: Console) -> int:
    with CoordinatorClient(config_of(args).url) as client:
        status = client.status()
    rows = [
        {
            "model": str(h.model),
            "instance": h.source.instance,
            "rank": h.source.rank,
            "parallel": str(h.parallel),
            "bytes": h.nbytes,
            "pieces": h.pieces,
            "transports": list(h.transports),
            "host": h.host,
            "generation": h.source.generation,
            "layout": h.layout,
            "lease_left_s": round(h.lease_left_s, 1),
            **h.attributes,
        }
        for h in status.holdings
    ]
    waiting = {str(key): list(missing) for key, missing in status.open_rounds.items()}
    console.document(
        {
            "version": status.version,
            "store": status.store,
            "uptime_s": round(status.uptime_s, 1),
            "blobs": status.blobs,
            "blob_bytes": status.blob_nbytes,
            "holdings": rows,
            "waiting_for_ranks": waiting,
        }
    )
    console.table(
        f"{len(rows)} ranks at coordinator {client.url}, up {status.uptime_s:.0f} s",
        ("model", "instance", "rank", "layout", "MB", "pieces", "transports", "lease s"),
        [
            (
                r["model"],
                r["instance"],
                r["rank"],
                r["parallel"],
                round(int(str(r["bytes"])) / 1e6),
                r["pieces"],
                ", ".join(h.transports),
                round(h.lease_left_s),
            )
            for r, h in zip(rows, status.holdings, strict=True)
        ],
    )
    for key, missing in waiting.items():
        console.text(f"{key} waits for ranks {missing}")
    return 0
