"""Layouts of SGLang's models: what the trace of its loaders says, element by element, is what a real load does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed here: ./dev engines makes an environment for it")

from sglang.srt import runtime_context

from peerload.engines.sglang.offline import VERSION, build, load_weights, probe_layout, rank_of, trace_layout
from peerload.errors import ConfigError, LayoutError
from peerload.model.catalog import Parallel
from peerload.testing.families import FAMILIES, Family, write_family
from peerload.tracing.coverage import dropped, require_covered
from peerload.tracing.probe.agree import agree
from peerload.tracing.trace import trace_loader

#: What SGLang insists on, beyond what the family's configuration says.
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIG: dict[str, dict[str, object]] = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "deepseek-v2": {"rope_scaling": _YARN},  # its rotary embedding knows no other on a CPU
    "deepseek-v3": {"rope_scaling": _YARN},
    "qwen3-next": {"full_attention_interval": 2},
    "olmoe": {"num_key_value_heads": 8},  # as published: SGLang knows no OLMoE with fewer heads for keys than for queries
}
#: What it doesn't build or load on a CPU, and a part of what we say then.
REFUSED = {
    "falcon": "no SGlang implementation",
    "qwen3-moe-w8a8": "implemented only for NPU",
    "gpt-oss-ep": "must match|doesn't match",
}
#: What its loader skips without a word: a parameter it leaves unwritten, and a checkpoint tensor that was meant for it.
DROPPED = {
    "llama-fp8-block": ("model.layers.0.self_attn.qkv_proj.weight_scale_inv", "model.layers.0.self_attn.q_proj.weight_scale_inv"),
    "llama-kv2-fp8-block": ("model.layers.1.mlp.down_proj.weight_scale_inv", "model.layers.1.mlp.down_proj.weight_scale_inv"),
    "llama4": ("model.layers.0.feed_forward.experts.w13_weight", "model.layers.0.feed_forward.experts.gate_up_proj"),
    "qwen3-moe-awq": ("model.layers.0.mlp.experts.w2_weight", "model.layers.0.mlp.experts.0.down_proj.qweight"),
}
#: Models that keep tensors made of parameters outside of them (absorbed MLA weights), and make them again when asked.
HIDDEN = {"deepseek-v2", "deepseek-v3"}
SPLITS = [Parallel(1), Parallel(2), Parallel(4)]
EXPERT_SPLITS = [Parallel(2, ep=2), Parallel(4, ep=2), Parallel(4, ep=4)]
CASES = [
    pytest.param(name, parallel, id=f"{name}-{parallel}")
    for name, found in FAMILIES.items()
    for parallel in (*SPLITS, *(EXPERT_SPLITS if found.experts else ()))
]


def family(name: str) -> Family:
    found = FAMILIES[name]
    config = {**found.config, **CONFIG.get(name, {})}
    tensors = found.tensors
    if name == "olmoe":
        keys = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
        tensors = tuple(t._replace(shape=(256, *t.shape[1:])) if t.name.endswith(keys) else t for t in tensors)
    return replace(found, config=config, tensors=tensors)


@pytest.mark.parametrize(("name", "parallel"), CASES)
def test_the_trace_says_what_the_load_does(
    tmp_path: Path, name: str, parallel: Parallel, record_property: Callable[[str, object], None]
) -> None:
    model = family(name)
    directory = write_family(tmp_path, model, weights=False)
    refused = REFUSED.get(f"{name}-ep" if parallel.ep > 1 else name) or REFUSED.get(name)
    for rank in sorted({0, parallel.tp - 1}):
        if refused:
            with pytest.raises(LayoutError, match=refused):
                trace_layout(directory, parallel, rank, model.catalog)
            with pytest.raises(LayoutError, match=refused):
                probe_layout(directory, parallel, rank, model.catalog)
            continue
        traced = trace_layout(directory, parallel, rank, model.catalog)
        differences = agree(traced.layout, probe_layout(directory, parallel, rank, model.catalog))
        assert [d for d in differences if d.partition(":")[0] not in traced.hidden] == []
        assert bool(traced.hidden) == (name in HIDDEN)
    record_property(
        "cell",
        {
            "engine": "sglang",
            "family": model.architecture,
            "quantization": model.quantization,
            "tp": parallel.tp,
            "ep": parallel.ep,
            "result": f"refused: {refused}" if refused else "dropped" if name in DROPPED else "trace == probe",
        },
    )


@pytest.mark.parametrize("name", FAMILIES.keys() - REFUSED.keys())
def test_what_a_loader_drops_is_named(tmp_path: Path, name: str) -> None:
    """Every case that is known, and no other."""
    model = family(name)
    with rank_of(write_family(tmp_path, model, weights=False), Parallel(), 0) as config:
        twin = build(config)
        traced = trace_loader(twin, partial(load_weights, twin), model.catalog, parallel=Parallel(), rank=0, engine=VERSION)
    if name not in DROPPED:
        assert dropped(traced, twin) == {}
        return
    parameter, tensor = DROPPED[name]
    assert tensor in dropped(traced, twin)[parameter]
    with pytest.raises(LayoutError, match=r"loader doesn't write it, and skips model\.layers\.0"):
        require_covered(traced, twin, VERSION)


def test_pipeline_stages_hold_their_layers_only(tmp_path: Path) -> None:
    model = family("llama")
    directory = write_family(tmp_path, model, weights=False)
    held = []
    for rank in range(4):
        traced = trace_layout(directory, Parallel(tp=2, pp=2), rank, model.catalog)
        assert agree(traced.layout, probe_layout(directory, Parallel(tp=2, pp=2), rank, model.catalog)) == []
        held.append({name.split(".")[2] for name in traced.layout.buffer_names if ".layers." in name})
    assert held == [{"0"}, {"0"}, {"1"}, {"1"}]


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    model = family("qwen3-moe")
    directory = write_family(tmp_path, model, weights=False)
    before = runtime_context.snapshot_context()
    trace_layout(directory, Parallel(tp=2), 1, model.catalog)
    with pytest.raises(LayoutError):
        trace_layout(write_family(tmp_path / "falcon", family("falcon"), weights=False), catalog=family("falcon").catalog)
    after = runtime_context.snapshot_context()
    assert (after["_server_args"], after["__parallel__"]) == (before["_server_args"], before["__parallel__"])


@pytest.mark.parametrize(
    ("parallel", "rank", "problem"),
    [(Parallel(2), 2, "rank 2 is not below 2"), (Parallel(2, ep=4), 0, "divides its tensor parallelism")],
)
def test_a_split_that_does_not_exist_is_refused(tmp_path: Path, parallel: Parallel, rank: int, problem: str) -> None:
    model = family("llama")
    with pytest.raises(ConfigError, match=problem):
        trace_layout(write_family(tmp_path, model, weights=False), parallel, rank, model.catalog)
