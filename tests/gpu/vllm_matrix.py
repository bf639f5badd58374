"""vLLM on GPUs: instances of TP 1 and 2 load from each other, and every tensor is compared with vLLM's own load.

    python tests/gpu/vllm_matrix.py --out DIR [--only NAME] [--large] [--tp 1]

Needs vLLM, with peerload installed, and two GPUs of one host; one GPU is enough for `--tp 1`. Instances share the GPUs, and those
of a round start together. One line of JSON for each case on standard output, a table at the end, logs of all instances in DIR.
Exit code 1: a case failed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engines"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engines" / "vllm"))

import torch
import vllm
from engine import Vllm
from safetensors.torch import save_file

from peerload.coordinator.server import Coordinator, serve
from peerload.testing.families import Family, Sizes, llama, qwen3_moe, write_family
from peerload.testing.processes import ChildDied
from peerload.tracing.dtypes import DTYPES

DENSE = Sizes(hidden=1024, inter=2048, heads=8, kv_heads=2, head=128, vocab=4000, layers=4)
SPARSE = Sizes(hidden=512, inter=1024, heads=4, kv_heads=2, head=128, vocab=4000, layers=2, experts=8, wide=512)
#: 7.5 GB in BF16: what an 8B model has in half of its layers.
LARGE = Sizes(hidden=4096, inter=14336, heads=32, kv_heads=8, head=128, vocab=32000, layers=16)
QUANTIZATIONS = ("bf16", "fp8-block", "fp8-channel", "fp8-tensor")
#: Enough for scales, which post-processing may rewrite; too little for a weight.
RETAIN_NBYTES = 1 << 20
RECEIVED = re.compile(r"peerload: ([0-9.]+ [kMG]?B) from (\S+)")


@dataclass
class Ran:
    """What an instance came to: sha256 by rank and tensor, tokens, log, seconds until it served."""

    sha256: list[dict[str, str]]
    tokens: list[list[int]]
    log: str
    seconds: float


def arguments(large: bool) -> dict[str, object]:
    return {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.12 if large else 0.03}


class Case:
    """One model: its own loads at TP 1 and 2, its seeds, and a target for each pair."""

    def __init__(self, family: Family, directory: Path, out: Path, stack: ExitStack, *, large: bool = False) -> None:
        self.family, self.directory, self.out, self._stack, self._large = family, directory, out, stack, large
        self.stock: dict[int, Ran] = {}
        self.coordinators: dict[int, Coordinator] = {}
        self.rows: list[dict[str, object]] = []

    def run_stock(self, tp: int) -> None:
        self.stock[tp] = self._run(f"stock-tp{tp}", tp, None)

    def start_seed(self, tp: int) -> None:
        coordinator = self.coordinators[tp] = self._stack.enter_context(serve("127.0.0.1:0"))
        config = {"url": coordinator.address, "retain_bytes": RETAIN_NBYTES}
        self._stack.enter_context(self._start(f"seed-tp{tp}", tp, config)).wait()

    def run_target(self, seed_tp: int, tp: int) -> None:
        row: dict[str, object] = {"engine": f"vllm {vllm.__version__}", "model": str(self.family), "seed_tp": seed_tp, "tp": tp}
        self.rows.append(row)
        try:
            config = {"url": self.coordinators[seed_tp].address, "source": False}
            ran = self._run(f"target-tp{seed_tp}-tp{tp}", tp, config)
        except (ChildDied, OSError, KeyError) as error:
            row["failed"] = repr(error)[-300:]
            return
        stock = self.stock[tp]
        wrong = [p for a, b in zip(ran.sha256, stock.sha256, strict=True) for p in b if a.get(p) != b[p]]
        row |= {
            "sources": RECEIVED.findall(ran.log),
            "tensors": sum(map(len, stock.sha256)),
            "wrong": wrong[:3],
            "tokens": ran.tokens == stock.tokens,
            "verified": "100.0 % of its bytes verified" in ran.log,
            "seconds": round(ran.seconds, 1),
            "stock_seconds": round(stock.seconds, 1),
            "lines": [line.partition("peerload: ")[2] for line in ran.log.splitlines() if "peerload: rank" in line],
        }

    def _run(self, name: str, tp: int, config: dict[str, object] | None) -> Ran:
        begun_s = time.monotonic()
        with self._start(name, tp, config) as running:
            running.wait()
            seconds = time.monotonic() - begun_s
            return Ran(running.sha256(), running.tokens(), running.log, seconds)

    def _start(self, name: str, tp: int, config: dict[str, object] | None) -> Vllm:
        log = self.out / f"{self.family}-{name}.log"
        return Vllm(self.directory, tp, config, gpu=True, log=log, **arguments(self._large))


def write_large(directory: Path, family: Family) -> None:
    """Random weights made on a GPU, in files of 2 GB."""
    write_family(directory, family, weights=False)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, dtype, shape in family.tensors:
        if sum(t.nbytes for t in shards[-1].values()) > 2 << 30:
            shards.append({})
        shards[-1][name] = (torch.randn(shape, device="cuda") * 0.02).to(DTYPES[dtype]).cpu()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(save_file, shards, [directory / name for name in names]))
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="a regular expression for the models")
    parser.add_argument("--large", action="store_true", help="a model of 7.5 GB, for rates")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes of seeds and targets (1 2)")
    options = parser.parse_args()
    families = [llama(f"llama-{q}", DENSE, quantization=q) for q in QUANTIZATIONS]
    families += [qwen3_moe(f"qwen3-moe-{q}", SPARSE, quantization=q) for q in QUANTIZATIONS]
    if options.large:
        families = [llama("llama-large", LARGE)]
    families = [f for f in families if re.search(options.only, f.name)]
    models = options.out / "models"
    models.mkdir(parents=True)
    with ExitStack() as stack:
        cases = []
        for family in families:
            if options.large:
                (models / family.name).mkdir()
                write_large(models / family.name, family)
            else:
                write_family(models / family.name, family)
            cases.append(Case(family, models / family.name, options.out, stack, large=options.large))
        pool = stack.enter_context(ThreadPoolExecutor(32))
        first = [pool.submit(run, tp) for case in cases for tp in options.tp for run in (case.run_stock, case.start_seed)]
        for future in first:
            if (error := future.exception()) is not None:
                sys.stdout.write(f"{str(error)[-1500:]}\n")
        sys.stdout.write("seeds and stock instances have run\n")
        sys.stdout.flush()
        list(
            pool.map(
                lambda job: job[0].run_target(*job[1]), [(case, pair) for case in cases for pair in product(options.tp, repeat=2)]
            )
        )
    rows = [row for case in cases for row in case.rows]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.write(f"{'model':24} {'pair':10} {'bytes':8} {'tokens':8} {'verified':9} sources\n")
    for row in rows:
        if "failed" in row:
            sys.stdout.write(f"{row['model']:24} {row['seed_tp']}->{row['tp']:<7} FAILED {row['failed']}\n")
            continue
        sys.stdout.write(
            f"{row['model']:24} {row['seed_tp']}->{row['tp']:<7} {'equal' if not row['wrong'] else 'WRONG':8} "
            f"{'equal' if row['tokens'] else 'differ':8} {row['verified']!s:9} {row['sources']}\n"
        )
    return int(any("failed" in row or row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
