"""What the coordinator costs at DeepSeek-V3's size: eight ranks (TP8, EP8) of per-expert tensors, then replicas.

The physical limit: a cold target receives the compressed catalog and layouts once, and decompresses and checks every
piece. Then what it costs that many ranks wait in a vote, as a share of one core: a coordinator in a process of its own, ranks in
four others. Ends in one JSON line; seconds unless the name says otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..deadline import Deadline
from ..errors import PeerloadError
from ..manifest import Binding, Endpoint, Layout, ModelKey, Offer, Parallel, SourceId
from ..rpc import codec
from ..rpc.client import CoordinatorClient
from ..rpc.server import serve
from ..testing import layouts

T = TypeVar("T")
MODEL = ModelKey("deepseek-ai/DeepSeek-V3")
SMALL = 500
WAITING = (600, 1200)
#: Long enough for every rank to ask again, whatever its first call did, seconds.
WATCHED_S = 25.0
COORDINATOR = "from peerload.rpc.server import serve; c = serve('127.0.0.1:0', 'memory'); print(c.address, flush=True); c.wait()"


def best(work: Callable[[], T], times: int = 3) -> tuple[float, T]:
    """The fastest of several runs, and its result."""
    seconds = []
    for _ in range(times):
        began_s = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds), result


def _announce(seed: CoordinatorClient, offers: list[Offer]) -> None:
    for rank in offers:
        seed.announce(rank, MODEL)


def offer(layout: Layout, instance: str, rank: int) -> Offer:
    digests = np.random.default_rng(rank).integers(0, 1 << 63, len(layout.pieces), np.uint64)
    address = np.arange(1, len(layout.buffer_names) + 1) << 30
    return Offer(layout, Binding(SourceId(instance, rank, "g1"), address, (Endpoint("local", b"x" * 64),), digests))


def served(store: str, ranks: list[Layout]) -> dict[str, object]:
    """Through a real server and client of this process."""
    out: dict[str, object] = {}
    with serve("127.0.0.1:0", store) as coordinator, CoordinatorClient(coordinator.address) as seed:
        for instance in ("first", "replica"):
            offers = [offer(layout, instance, rank) for rank, layout in enumerate(ranks)]
            out[f"announce_8_ranks_{instance}"], _ = best(partial(_announce, seed, offers), 1)
        with CoordinatorClient(coordinator.address) as target:
            out["discover_16_ranks_cold"], found = best(lambda: target.discover(MODEL), 1)
            assert sum(len(o.layout.pieces) for o in found) == 2 * sum(len(r.pieces) for r in ranks)
            out["discover_16_ranks_warm"], _ = best(lambda: target.discover(MODEL))
        tiny = layouts.layout(layouts.tiny_llama(), Parallel(), 0)
        small = [offer(tiny, f"i{n}", 0) for n in range(SMALL)]
        seconds, leases = best(lambda: [seed.announce(o, ModelKey("tiny")) for o in small], 1)
        out["announcements_per_s"] = round(SMALL / seconds)
        seconds, _ = best(lambda: [seed.renew(lease) for lease in leases], 1)
        out["renewals_per_s"] = round(SMALL / seconds)
    return out


def wait_in_votes(url: str, first: int, ranks: int) -> None:
    """A process of ranks that each wait for one that doesn't come."""

    def wait(client: CoordinatorClient, rank: int) -> None:
        with suppress(PeerloadError):  # the coordinator has ended
            client.agree(f"group {rank}", 0, 0, 2, bytes(20_000), Deadline.after(600))

    with ExitStack() as stack:
        clients = [stack.enter_context(CoordinatorClient(url)) for _ in range(ranks)]
        for number, client in enumerate(clients):
            threading.Thread(target=wait, args=(client, first + number), daemon=True).start()
        print("they wait", flush=True)
        sys.stdin.read()
        os._exit(0)


def cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def waiting(ranks: int) -> dict[str, object]:
    with ExitStack() as stack:

        def started(*words: str) -> tuple[subprocess.Popen[str], str]:
            process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, process.stdout.readline().strip()

        coordinator, url = started("-c", COORDINATOR)
        for part in range(4):
            started(__file__, url, str(part * ranks // 4), str(ranks // 4))
        client = stack.enter_context(CoordinatorClient(url))
        while len(client.status().open_rounds) < ranks:
            time.sleep(0.5)
        seed = offer(layouts.layout(layouts.tiny_llama(), Parallel(), 0), "i", 0)
        lease, slowest_s = client.announce(seed, MODEL), 0.0
        began_s, began_cpu_s = time.monotonic(), cpu_s(coordinator.pid)
        while (passed_s := time.monotonic() - began_s) < WATCHED_S:
            seconds, _ = best(lambda: client.renew(lease), 1)
            slowest_s = max(slowest_s, seconds)
            time.sleep(0.2)
        share = (cpu_s(coordinator.pid) - began_cpu_s) / passed_s
        return {f"waiting_{ranks}_core_share": share, f"waiting_{ranks}_slowest_renewal": slowest_s}


def main() -> None:
    if len(sys.argv) == 4:
        wait_in_votes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    ranks = [layouts.layout(layouts.deepseek_v3(), Parallel(tp=8, ep=8), rank) for rank in range(8)]
    catalog = ranks[0].catalog
    out: dict[str, object] = {"tensors": len(catalog), "pieces": sum(len(r.pieces) for r in ranks)}

    out["encode_catalog"], catalog_blob = best(lambda: codec.encode_catalog(catalog))
    out["encode_layouts"], blobs = best(lambda: [codec.encode_layout(r, catalog_blob.digest) for r in ranks])
    out["pack"], packed = best(lambda: [codec.pack(blob) for blob in (catalog_blob, *blobs)])
    out["packed_bytes"], out["bytes"] = sum(len(p.packed) for p in packed), sum(p.nbytes for p in packed)
    out["unpack"], _ = best(lambda: [codec.unpack(p) for p in packed])
    out["decode_catalog"], decoded = best(lambda: codec.decode_catalog(catalog_blob.data))
    out["decode_layouts"], _ = best(lambda: [codec.decode_layout(blob.data, lambda _: decoded) for blob in blobs])

    with tempfile.TemporaryDirectory() as folder:
        for store in ("memory", f"sqlite:{Path(folder) / 'bench.db'}"):
            name = store.partition(":")[0]
            out |= {f"{name}_{key}": value for key, value in served(store, ranks).items()}
    for count in WAITING:
        out |= waiting(count)
    for key, value in out.items():
        sys.stdout.write(f"{key:32} {value:.4f}\n" if isinstance(value, float) else f"{key:32} {value}\n")
    sys.stdout.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}) + "\n")


if __name__ == "__main__":
    main()
