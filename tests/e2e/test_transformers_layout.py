"""The layout of every rank, against the engine's own load of the same checkpoint: all bytes, all state, the same tokens.

Real processes with a gloo group. Parameters are filled by executing the layout's pieces naively, with NumPy.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerload.manifest import Layout, Parallel

pytest.importorskip("transformers")

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


def rank_job(directory: Path, tp: int, rank: int, port: int) -> dict[str, Any]:
    """What one rank finds; runs in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    from peerload.engines.checkpoint import Checkpoint
    from peerload.engines.transformers import greedy, open_model, parameters_of, stock_model

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(directory)
    found: dict[str, Any] = {"differs": []}
    try:
        opened = open_model(directory, checkpoint.catalog, Parallel(tp), rank=rank)
        layout = opened.layout
        nbytes = layout.buffer_nbytes.tolist()
        buffers = [np.frombuffer(opened.arena.view(a, n), np.uint8) for a, n in zip(opened.address.tolist(), nbytes, strict=True)]
        found["untouched"] = all(not buffer.any() for buffer in buffers)
        fill(layout, buffers, row_bytes(checkpoint))
        stock = stock_model(directory, Parallel(tp))
        ours, theirs = parameters_of(opened.model), parameters_of(stock)
        found["names"] = ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            mine, tensor = ours[name].detach(), tensor.detach()
            same = (mine.shape, mine.stride(), mine.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
            if not same or not torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8)):
                found["differs"].append(name)
        found["compared"] = sum(t.nbytes for t in theirs.values())
        tied = [{n for n, p in m.named_parameters(remove_duplicate=False) if p is m.lm_head.weight} for m in (opened.model, stock)]
        found["tied"] = tied[0] == tied[1]
        placements = [{n: getattr(p, "placements", ()) for n, p in m.named_parameters()} for m in (opened.model, stock)]
        found["placements"] = placements[0] == placements[1]
        found["modes"] = opened.model.training is stock.training is False
        a, b = (m.generation_config.to_dict() for m in (opened.model, stock))
        found["generation"] = a == b
        found["requires_grad"] = [p.requires_grad for p in opened.model.parameters()] == [p.requires_grad for p in stock.parameters()]
        found["tokens"] = greedy(opened.model, PROMPT, NEW_TOKENS), greedy(stock, PROMPT, NEW_TOKENS)
        found["layout"] = pickle.dumps(layout)
    except BaseException:
        found["error"] = traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return found


def run_ranks(directory: Path, tp: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(tp, multiprocessing.get_context("spawn")) as pool:
        return [f.result(timeout=120) for f in [pool.submit(rank_job, directory, tp, rank, port) for rank in range(tp)]]


def same_layout(a: Layout, b: Layout) -> bool:
    columns = ("tensor", "start", "stop", "buffer", "offset", "stride")
    return (
        a.catalog == b.catalog
        and (a.buffer_names, a.buffer_nbytes.tolist(), dict(a.aliases)) == (b.buffer_names, b.buffer_nbytes.tolist(), dict(b.aliases))
        and all(np.array_equal(getattr(a.pieces, c), getattr(b.pieces, c)) for c in columns)
    )


CASES = [
    ("llama", 1, {}), ("llama", 2, {}), ("llama", 3, {}), ("llama", 4, {}),
    ("qwen3_moe", 1, {}), ("qwen3_moe", 2, {}), ("mixtral", 1, {}), ("mixtral", 2, {}),
    ("qwen2", 2, {"tie_word_embeddings": True}),
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize(("family", "tp", "changes"), CASES, ids=lambda v: str(v) if not isinstance(v, dict) else "tied" if v else "")
def test_opened_and_filled_equals_the_stock_load(tmp_path: Path, family: Any, tp: int, changes: dict[str, Any]) -> None:
    from peerload.engines.transformers import layout_for
    from peerload.testing.checkpoints import make_checkpoint

    directory = make_checkpoint(tmp_path / family, family, **changes)
    for rank, found in enumerate(run_ranks(directory, tp)):
        assert "error" not in found, found["error"]
        assert found["differs"] == []
        assert found["compared"] > 100_000
        facts = ("untouched", "names", "tied", "placements", "modes", "generation", "requires_grad")
        assert {fact: found[fact] for fact in facts} == dict.fromkeys(facts, True)
        ours, stock = found["tokens"]
        assert ours == stock
        assert len(ours) == NEW_TOKENS
        layout = pickle.loads(found["layout"])
        layout.prove_cover()
        assert same_layout(layout, layout_for(directory, Parallel(tp), rank))
