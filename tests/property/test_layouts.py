"""The generators against the meaning of the words they are written in, and the planner on all of their layouts."""

from __future__ import annotations

import numpy as np
import pytest

from peerload.model.catalog import Parallel
from peerload.testing.layouts import Storing, layout, layouts, tiny_deepseek, tiny_llama, tiny_qwen3_moe
from peerload.testing.machine import load_exactly, numbers, on_disk, running
from peerload.testing.oracle import scattered, shards

TP = (1, 2, 3, 4, 6, 8, 16)

MODELS = {
    "bf16, 8 of 16 heads are kv": tiny_llama(),
    "2 kv heads, tied, biases": tiny_llama(heads=6, kv_heads=2, tied=True, bias=True),
    "1 kv head": tiny_llama(heads=4, kv_heads=1),
    "uneven heads": tiny_llama(heads=9, kv_heads=3),
    "fp8 per tensor": tiny_llama(Storing("fp8_tensor", vocabulary=4)),
    "fp8 per channel, transposed": tiny_llama(Storing("fp8_channel", vocabulary=4, transposed=True)),
    "fp8 blocks of 5": tiny_llama(Storing("fp8_block", block=5, vocabulary=4)),
    "moe, w13": tiny_qwen3_moe(Storing("fp8_block", block=4, vocabulary=4)),
    "moe, an own buffer per expert": tiny_qwen3_moe(Storing("fp8_block", block=4, vocabulary=4, fused_experts=False)),
    "moe, 3-D in the checkpoint": tiny_qwen3_moe(stacked=True),
    "mla": tiny_deepseek(Storing("fp8_block", block=4, vocabulary=4)),
}
#: How seeds may hold what targets hold differently.
OTHER_FORM = {
    "fp8 per channel, transposed": tiny_llama(Storing("fp8_channel", vocabulary=4)),
    "moe, w13": MODELS["moe, an own buffer per expert"],
    "mla": tiny_deepseek(Storing("fp8_block", block=4, vocabulary=8, fused_experts=False, transposed=True)),
}
ARRANGEMENTS = (Parallel(4, 2), Parallel(4, ep=4), Parallel(6, 2, 3), Parallel(8, ep=2), Parallel(2, 3), Parallel(8, ep=8))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("parallel", [*map(Parallel, TP), *ARRANGEMENTS], ids=str)
def test_a_generated_layout_says_where_the_bytes_of_the_model_lie(kind: str, parallel: Parallel) -> None:
    model = MODELS[kind]
    for rank, made in enumerate(layouts(model, parallel)):
        made.prove_cover()
        meant, placed = shards(model, numbers(model), parallel, rank), scattered(made, numbers(model))
        assert placed.keys() == meant.keys()
        for name in meant:
            np.testing.assert_array_equal(placed[name], meant[name], err_msg=f"{name} of rank {rank}")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("to", TP)
@pytest.mark.parametrize("source", TP)
def test_every_pair_of_tensor_parallel_sizes(kind: str, source: int, to: int) -> None:
    model, parallel = MODELS[kind], Parallel(to)
    seeds = running(OTHER_FORM.get(kind, model), Parallel(source))
    for rank in {source // 2 % to, to - 1}:
        load_exactly(layout(model, parallel, rank), shards(model, numbers(model), parallel, rank), [seeds])


@pytest.mark.parametrize("kind", ["moe, w13", "moe, 3-D in the checkpoint", "mla", "2 kv heads, tied, biases"])
@pytest.mark.parametrize("to", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("source", ARRANGEMENTS, ids=str)
def test_pairs_of_expert_and_pipeline_parallel_arrangements(kind: str, source: Parallel, to: Parallel) -> None:
    model = MODELS[kind]
    seeds = running(OTHER_FORM.get(kind, model), source)
    for rank in {source.tp // 2 % to.tp, to.tp * to.pp - 1}:
        load_exactly(layout(model, to, rank), shards(model, numbers(model), to, rank), [seeds])


@pytest.mark.parametrize("kind", MODELS)
def test_files_are_a_seed_like_any_other(kind: str) -> None:
    model, to = MODELS[kind], Parallel(3)
    for rank in range(3):
        load_exactly(layout(model, to, rank), shards(model, numbers(model), to, rank), [on_disk(model)])


@pytest.mark.parametrize("kind", MODELS)
def test_seeds_of_different_layouts_together(kind: str) -> None:
    model, to = MODELS[kind], Parallel(6)
    seeds = [running(model, Parallel(2), "two"), running(model, Parallel(4), "four"), running(model, Parallel(2, 2), "staged")]
    for rank in range(6):
        load_exactly(layout(model, to, rank), shards(model, numbers(model), to, rank), seeds)
