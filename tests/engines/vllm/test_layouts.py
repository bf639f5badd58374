"""Layouts of vLLM's models: what the trace of its loaders says, element by element, is what a real load does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: ./dev engines makes an environment for it")

from vllm.distributed import parallel_state
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.models.registry import ModelRegistry

from peerload.engines.checkpoint import ModelFiles
from peerload.engines.vllm import VERSION, build, load_weights, probe_layout, rank_of, trace_layout
from peerload.errors import ConfigError, LayoutError
from peerload.layout.agree import agree
from peerload.layout.coverage import dropped
from peerload.layout.loader import Traced, trace_loader
from peerload.layout.probe import changes
from peerload.manifest import Parallel
from peerload.testing.families import FAMILIES, Family, write_family

#: Checkpoint tensors that vLLM keeps in another dtype, and as what.
CASTS = {
    "qwen3-next": (r"\.A_log$", "F32"),
    "deepseek-v3": (r"\.e_score_correction_bias$", "F32"),
    "glm4-moe": (r"\.mlp\.gate\.weight$", "F32"),
    **{f"{model}-{word}": (r"\.weight_scale$", "F32") for model in ("llama", "qwen3-moe") for word in ("fp8-channel", "w8a8")},
}
#: Parameters whose values vLLM's loader makes, and how.
COMPUTED = {"qwen3-moe-fp8-tensor": (r"\.w13_input_scale$", r"(gate|up)_proj\.input_scale are loaded into one place")}
#: Checkpoint tensors that no rank keeps: without an order of activations, GPTQ's kernels don't ask for groups.
SKIPPED = {"llama-gptq": r"\.g_idx$", "qwen3-moe-gptq": r"\.g_idx$"}
#: Those that only rank 0 keeps, if experts are split by columns; the others hold zeros in their place.
RANK_0_ONLY = {"gpt-oss": r"\.down_proj_bias$"}
#: What can't be followed, and a part of what we say: vLLM selects the experts by an index tensor, on the checkpoint's device.
REFUSED = {"llama4-ep": r"item\(\) cannot be called on meta tensors"}

SPLITS = [Parallel(1), Parallel(2), Parallel(4)]
EXPERT_SPLITS = [Parallel(2, ep=2), Parallel(4, ep=4)]
CASES = [
    pytest.param(family, parallel, id=f"{family}-{parallel}")
    for family in FAMILIES.values()
    for parallel in (*SPLITS, *(EXPERT_SPLITS if family.experts else ()))
]


@pytest.mark.parametrize(("family", "parallel"), CASES)
def test_the_trace_says_what_the_load_does(
    tmp_path: Path, family: Family, parallel: Parallel, record_property: Callable[[str, object], None]
) -> None:
    directory = write_family(tmp_path, family, weights=False)
    refused = REFUSED.get(f"{family}-ep" if parallel.ep > 1 else family.name)
    held: list[Traced] = []
    for rank in range(parallel.tp):
        if refused:
            with pytest.raises(LayoutError, match=refused):
                trace_layout(directory, parallel, rank, catalog=family.catalog)
            continue
        traced = trace_layout(directory, parallel, rank, catalog=family.catalog)
        assert agree(traced.layout, probe_layout(directory, parallel, rank, catalog=family.catalog)) == []
        assert traced.hidden == {}
        as_stated(family, traced, parallel, rank)
        held.append(traced)
    if not refused:
        whole(family, held)
    record_property("cell", {
        "engine": "vllm", "version": VERSION, "family": family.architecture, "quantization": family.quantization,
        "name": family.name, "tp": parallel.tp, "ep": parallel.ep,
        "result": f"refused: {refused}" if refused else "trace == probe",
    })  # fmt: skip


def as_stated(family: Family, traced: Traced, parallel: Parallel, rank: int) -> None:
    """Casts, computed values and skipped tensors are those of the tables above, no more and no fewer."""
    ignored, derived = set(traced.layout.ignored), dict(traced.derived)
    cast, dtype = CASTS.get(family.name, ("", ""))
    casts = {f"{t.name} as {dtype}" for t in family.tensors if cast and re.search(cast, t.name) and t.name not in ignored}
    assert casts == {name for name in derived if " by vllm " not in name}
    parameter, reason = COMPUTED.get(family.name, ("", ""))
    computed = {name: d for name, d in derived.items() if name not in casts}
    assert bool(computed) == (family.name in COMPUTED)
    for name, found in computed.items():
        assert name == f"{found.parameter} by {VERSION} tp{parallel.tp} ep{parallel.ep} pp{parallel.pp} rank {rank}"
        assert re.search(parameter, found.parameter), name
        assert re.search(reason, found.reason), found.reason
    expected = {t.name for t in family.tensors if family.name in SKIPPED and re.search(SKIPPED[family.name], t.name)}
    if rank and parallel.ep == 1:
        expected |= {t.name for t in family.tensors if family.name in RANK_0_ONLY and re.search(RANK_0_ONLY[family.name], t.name)}
    if parallel.ep > 1:
        share = family.experts // parallel.ep
        expected |= {t.name for t in family.tensors if not _of_these(t.name, range(rank * share, (rank + 1) * share))}
    assert expected == ignored


def _of_these(name: str, experts: Iterable[int]) -> bool:
    """False for the tensor of another single expert."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return found is None or int(found[1]) in experts


def whole(family: Family, ranks: list[Traced]) -> None:
    """Each element of the checkpoint lies on some rank, cast or as it is, or one computes with it."""
    used = {name for traced in ranks for made, d in traced.derived.items() if " by vllm " in made for name in d.covers}
    for spec in family.tensors:
        seen = np.zeros(spec.shape, np.bool_)
        for layout in (traced.layout for traced in ranks):
            rows = [row for name, row in layout.catalog.row.items() if name == spec.name or name.startswith(f"{spec.name} as ")]
            for piece in np.flatnonzero(np.isin(layout.pieces.tensor, rows)).tolist():
                box = layout.box_of(piece)
                seen[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
        assert seen.all() or spec.name in used or re.search(SKIPPED.get(family.name, "$."), spec.name), spec.name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_no_loader_drops_what_a_parameter_waits_for(tmp_path: Path, family: Family) -> None:
    """But for GPTQ's groups, which post-processing drops."""
    with rank_of(write_family(tmp_path, family, weights=False), Parallel(), 0) as config:
        twin = build(config)
        traced = trace_loader(
            twin, lambda weights: load_weights(twin, weights), family.catalog, parallel=Parallel(), rank=0, engine=VERSION
        )  # fmt: skip
    lost = dropped(traced, twin)
    assert [(path, names) for path, names in lost.items() if not all(name.endswith("g_idx") for name in names)] == []
    assert all("g_idx" in path for path in lost)


def test_pipeline_stages_hold_their_layers_only(tmp_path: Path) -> None:
    family, parallel = FAMILIES["llama"], Parallel(tp=2, pp=2)
    directory = write_family(tmp_path, family, weights=False)
    held = []
    for rank in range(4):
        traced = trace_layout(directory, parallel, rank, catalog=family.catalog)
        assert agree(traced.layout, probe_layout(directory, parallel, rank, catalog=family.catalog)) == []
        held.append({name.split(".")[2] for name in traced.layout.buffer_names if ".layers." in name})
    assert held == [{"0"}, {"0"}, {"1"}, {"1"}]


def test_packed_weights_agree_bit_by_bit(tmp_path: Path) -> None:
    """Four-bit numbers, eight of which are an element."""
    for name in ("llama-gptq", "llama-awq"):
        family = FAMILIES[name]
        directory = write_family(tmp_path / name, family, weights=False)
        traced = trace_layout(directory, Parallel(2), 1, catalog=family.catalog)
        assert agree(traced.layout, probe_layout(directory, Parallel(2), 1, catalog=family.catalog, bits=4)) == []


def test_post_processing_on_this_host(tmp_path: Path) -> None:
    """vLLM's CPU backend packs linear weights and frees them, and absorbs MLA's; norms and convolutions it leaves alone."""
    family = FAMILIES["deepseek-v3"]
    directory = write_family(tmp_path, family, weights=False)
    loaded, processed = (probe_layout(directory, Parallel(2), 1, catalog=family.catalog, processed=p) for p in (False, True))
    found = changes(loaded, processed)
    for norm in ("model.norm.weight", "model.layers.1.self_attn.q_a_layernorm.weight"):
        assert found[norm][0] == "unchanged"
    absorbed = {path for path, (kind, _) in found.items() if kind == "new" and path.endswith((".W_UV", ".W_UK_T"))}
    assert len(absorbed) == 4


def test_a_config_alone_needs_a_catalog(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    files = ModelFiles.of(write_family(tmp_path / "config", family, weights=False))
    with pytest.raises(ConfigError, match="doesn't say which tensors"):
        trace_layout(files)
    stored = trace_layout(write_family(tmp_path / "checkpoint", family), Parallel(2), 1)
    assert stored.layout.catalog == family.catalog
    assert stored.layout.buffer_names == trace_layout(files, Parallel(2), 1, catalog=family.catalog).layout.buffer_names


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    family = FAMILIES["qwen3-moe"]
    directory = write_family(tmp_path / "good", family, weights=False)
    trace_layout(directory, catalog=family.catalog)  # what is imported is imported
    before = _state()
    trace_layout(directory, Parallel(2, ep=2), 1, catalog=family.catalog)
    broken = write_family(tmp_path / "bad", family, weights=False)
    config = (broken / "config.json").read_text().replace('"num_attention_heads": 8', '"num_attention_heads": 7')
    (broken / "config.json").write_text(config)
    with pytest.raises(LayoutError, match=r"vllm [0-9.]+ .*this model at tp=2"):
        trace_layout(broken, Parallel(2), 0, catalog=family.catalog)
    assert _state() == before


def _state() -> tuple[object, ...]:
    groups = {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}
    return groups, dict(os.environ), dict(_ROPE_DICT), dict(ModelRegistry.models)


@pytest.mark.parametrize(
    ("parallel", "rank", "problem"),
    [(Parallel(2), 2, "rank 2 is not below 2"), (Parallel(4, ep=2), 0, "over all tensor-parallel ranks or none")],
)
def test_a_split_that_does_not_exist_is_refused(tmp_path: Path, parallel: Parallel, rank: int, problem: str) -> None:
    family = FAMILIES["llama"]
    with pytest.raises(ConfigError, match=problem):
        trace_layout(write_family(tmp_path, family, weights=False), parallel, rank, catalog=family.catalog)
