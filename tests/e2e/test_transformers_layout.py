"""The layout of every rank, against the engine's own load of the same checkpoint: all bytes, all state, the same tokens.

Real processes with a gloo group. Parameters are filled by executing the layout's pieces naively, with NumPy.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerload.model.catalog import Parallel
from peerload.model.layout import Layout

distributed = pytest.importorskip("transformers.distributed")

PROMPT = [17, 42, 300, 5, 88]
NEW_TOKENS = 8


def row_bytes(checkpoint: Any) -> dict[str, np.ndarray]:
    """Each tensor's bytes, [*shape, itemsize], out of the files."""
    files = [np.memmap(path, np.uint8, mode="r") for path in checkpoint.files.path]
    found = {}
    for tensor in checkpoint.tensors:
        begin = int(checkpoint.data_offset[tensor.file]) + tensor.offset
        itemsize = int(checkpoint.catalog.itemsize[checkpoint.catalog.row[tensor.spec.name]])
        nbytes = int(np.prod(tensor.spec.shape)) * itemsize
        found[tensor.spec.name] = files[tensor.file][begin : begin + nbytes].reshape(*tensor.spec.shape, itemsize)
    return found


def fill(layout: Layout, buffers: list[np.ndarray], rows: dict[str, np.ndarray]) -> None:
    """Every piece by itself, in checkpoint coordinates. A tied name's pieces come from the name it shares bytes with."""
    for i in range(len(layout.pieces)):
        spec, box = layout.tensor_of(i), layout.box_of(i)
        source = rows[layout.aliases.get(spec.name, spec.name)][box.slices()]
        stride = layout.pieces.stride[i, layout.catalog.width - len(spec.shape) :].tolist()
        memory = buffers[int(layout.pieces.buffer[i])][int(layout.pieces.offset[i]) :]
        np.lib.stride_tricks.as_strided(memory, source.shape, (*stride, 1))[...] = source


def rank_job(cases: list[tuple[Path, Parallel]], rank: int, port: int) -> list[dict[str, Any]]:
    """What one rank finds for each checkpoint; runs in a process of its own."""
    size = str(cases[0][1].tp)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        return [compare(directory, parallel, rank) for directory, parallel in cases]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def compare(directory: Path, parallel: Parallel, rank: int) -> dict[str, Any]:
    import torch

    from peerload.engines.checkpoint import Checkpoint
    from peerload.engines.transformers.open import greedy, open_model, parameters_of, stock_model

    checkpoint = Checkpoint.open(directory)
    opened = open_model(directory, checkpoint.catalog, parallel, rank=rank)
    nbytes = opened.layout.buffer_nbytes.tolist()
    buffers = [np.frombuffer(opened.arena.view(a, n), np.uint8) for a, n in zip(opened.address.tolist(), nbytes, strict=True)]
    untouched = not any(buffer.any() for buffer in buffers)
    fill(opened.layout, buffers, row_bytes(checkpoint))
    stock = stock_model(directory, parallel)
    ours, theirs, differs = parameters_of(opened.model), parameters_of(stock), []
    for name in theirs:
        a, b = ours[name].detach(), theirs[name].detach()
        same = (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        if not same or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            differs.append(name)
    return {
        "untouched": untouched,
        "names": list(ours) == list(theirs),
        "differs": differs,
        "compared": sum(t.nbytes for t in theirs.values()),
        "state": (state(opened.model), state(stock)),
        "tokens": (greedy(opened.model, PROMPT, NEW_TOKENS), greedy(stock, PROMPT, NEW_TOKENS)),
        "layout": pickle.dumps(opened.layout),
    }


def state(model: Any) -> dict[str, Any]:
    """What a load leaves behind beside values."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "distributed_config")}
    named = dict(model.named_parameters(remove_duplicate=False))
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "tied": sorted(name for name, p in named.items() if p is model.lm_head.weight),
        "placements": {name: str(getattr(p, "placements", ())) for name, p in named.items()},
        "requires_grad": {name: p.requires_grad for name, p in named.items()},
        "generation": model.generation_config.to_dict(),
        "config": config,
    }


def run_ranks(cases: list[tuple[Path, Parallel]]) -> list[list[dict[str, Any]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tp = cases[0][1].tp
    with ProcessPoolExecutor(tp, multiprocessing.get_context("spawn")) as pool:
        return [f.result(timeout=200) for f in [pool.submit(rank_job, cases, rank, port) for rank in range(tp)]]


def same_layout(a: Layout, b: Layout) -> bool:
    columns = ("tensor", "start", "stop", "buffer", "offset", "stride")
    return (
        a.catalog == b.catalog
        and (a.buffer_names, a.aliases, a.parallel, a.rank) == (b.buffer_names, b.aliases, b.parallel, b.rank)
        and a.buffer_nbytes.tolist() == b.buffer_nbytes.tolist()
        and all(np.array_equal(getattr(a.pieces, c), getattr(b.pieces, c)) for c in columns)
    )


TIED = {"tie_word_embeddings": True}
TP1, TP2, TP3, TP4 = map(Parallel, (1, 2, 3, 4))
newer = pytest.mark.skipif(not hasattr(distributed.DistributedConfig, "ep_size"), reason="this transformers has no ep_size")
CASES = [
    pytest.param([("llama", {}, TP1), ("qwen3_moe", {}, TP1), ("mixtral", {}, TP1), ("qwen2", TIED, TP1)], id="tp1"),
    pytest.param([("llama", {}, TP2), ("qwen3_moe", {}, TP2), ("mixtral", {}, TP2), ("qwen3", TIED, TP2)], id="tp2"),
    pytest.param([("llama", {}, TP3)], id="tp3"),
    pytest.param([("llama", {}, TP4)], id="tp4"),
    pytest.param([("qwen3_moe", {}, Parallel(2, ep=2)), ("llama", {"vocab_size": 499}, TP2)], id="newer", marks=newer),
]


@pytest.mark.e2e
@pytest.mark.parametrize("models", CASES)
def test_opened_and_filled_equals_the_stock_load(tmp_path: Path, models: list[tuple[Any, dict[str, Any], Parallel]]) -> None:
    from peerload.engines.transformers.open import layout_for
    from peerload.testing.checkpoints import make_checkpoint

    cases = [(make_checkpoint(tmp_path / str(i), f, **changes), p) for i, (f, changes, p) in enumerate(models)]
    for directory, _ in cases[1::2]:
        (directory / "generation_config.json").unlink()  # many models have none
    for rank, results in enumerate(run_ranks(cases)):
        for (directory, parallel), found in zip(cases, results, strict=True):
            assert found["differs"] == []
            assert found["compared"] > 100_000
            assert found["untouched"]
            assert found["names"]
            assert found["state"][0] == found["state"][1]
            ours, stock = found["tokens"]
            assert ours == stock
            assert len(ours) == NEW_TOKENS
            layout = pickle.loads(found["layout"])
            layout.prove_cover()
            assert same_layout(layout, layout_for(directory, parallel, rank))


def resident_nbytes() -> int:
    """Anonymous and shared memory that this process has touched."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[row].split()[0]) << 10 for row in ("RssAnon", "RssShmem"))


def growth_on_opening(warm: Path, directory: Path) -> tuple[int, int]:
    """(bytes of the model's parameters, bytes touched by opening it) in a process that has opened another one before."""
    from peerload.engines.checkpoint import Checkpoint
    from peerload.engines.transformers.open import open_model

    open_model(warm, Checkpoint.open(warm).catalog)
    before = resident_nbytes()
    opened = open_model(directory, Checkpoint.open(directory).catalog)
    return int(opened.layout.buffer_nbytes.sum()), resident_nbytes() - before


@pytest.mark.e2e
def test_opening_touches_no_weight_memory(tmp_path: Path) -> None:
    """Neither the parameters nor the stacks that experts pass through on their way."""
    from peerload.testing.checkpoints import make_checkpoint

    small = make_checkpoint(tmp_path / "small", "qwen3_moe")
    big = make_checkpoint(tmp_path / "big", "qwen3_moe", hidden_size=512, moe_intermediate_size=1024, vocab_size=20000)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        held, touched = pool.submit(growth_on_opening, small, big).result(timeout=120)
    assert held > 80 << 20
    assert touched < 8 << 20
