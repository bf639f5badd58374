"""Layouts of vLLM's models: what the trace of its loaders says, element by element, is what a real load does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: ./dev engines makes an environment for it")

import torch
import transformers
from formats import compressed, deepseek_v32
from vllm.distributed import parallel_state
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from peerload.engines.checkpoint import ModelFiles
from peerload.engines.twin import warn_once
from peerload.engines.versions import TESTED
from peerload.engines.vllm.offline import VERSION, build, load_weights, probe_layout, rank_of, trace_layout
from peerload.errors import ConfigError, LayoutError
from peerload.model.catalog import Catalog, Parallel
from peerload.testing.families import FAMILIES, Family, write_family
from peerload.tracing.coverage import dropped
from peerload.tracing.probe.agree import agree
from peerload.tracing.probe.run import changes, groups_of
from peerload.tracing.trace import Traced, trace_loader

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
if VERSION == "vllm 0.24.0":  # it keeps groups, those of a fused layer in one place, and zeros of experts in the scales' dtype
    SKIPPED = {}
    CASTS["qwen3-moe-gptq"] = (r"\.experts\..*\.qzeros$", "F16")
    COMPUTED["llama-gptq"] = (r"\.(qkv|gate_up)_proj\.g_idx$", r"_proj\.g_idx are loaded into one place")
    COMPUTED["qwen3-moe-gptq"] = (r"\.(qkv_proj\.|w13_)g_idx$", r"_proj\.g_idx are loaded into one place")
#: Those that only rank 0 keeps, if experts are split by columns; the others hold zeros in their place.
RANK_0_ONLY = {"gpt-oss": r"\.down_proj_bias$"}
#: What can't be followed, and a part of what we say: vLLM selects the experts by an index tensor, on the checkpoint's device.
REFUSED = {"llama4-ep": r"item\(\) cannot be called on meta tensors"}

#: What a release's GPU wheel can't do where there is no GPU, and in which words: its CUDA library has these operations only.
WITHOUT_A_GPU = {
    "vllm 0.33.0": {"gpt2": "no attribute 'gelu_new'"},
    "vllm 0.24.0": {
        "gpt2": "no attribute 'gelu_new'",
        "gemma2": "no attribute 'gelu_tanh_and_mul'",
        "gemma3": "no attribute 'gelu_tanh_and_mul'",
        "deepseek-v2": "MLA is not supported on CPU",
        "deepseek-v3": "MLA is not supported on CPU",
        "gpt-oss": r"KeyError: 'layers\.0\.mlp\.experts\.w2_weight'",  # with or without one, unless it is MXFP4
    },
}.get(VERSION, {})

#: A GPU wheel that is laid over the environment shows that its loaders are followed; the sizes are the business of the others.
OVERLAID = any(f"vllm {tested.version}" == VERSION for tested in TESTED["vllm"] if tested.overlay)
SPLITS = [Parallel(2)] if OVERLAID else [Parallel(1), Parallel(2), Parallel(4)]
EXPERT_SPLITS = [Parallel(2, ep=2)] if OVERLAID else [Parallel(2, ep=2), Parallel(4, ep=4)]
CASES = [
    pytest.param(family, parallel, id=f"{family}-{parallel}")
    for family in FAMILIES.values()
    for parallel in (*SPLITS, *(EXPERT_SPLITS if family.experts else ()))
]


def written(directory: Path, family: Family) -> Path:
    """A directory of the family: no weights, but for GPTQ, where vLLM 0.24 looks into the files for what is quantized. Leaves
    the test out if this vLLM can't load the family here, and is sure of that."""
    write_family(directory, family, weights=family.quantization == "gptq")
    if family.name in WITHOUT_A_GPU:
        with pytest.raises(LayoutError, match=WITHOUT_A_GPU[family.name]) as refused:
            trace_layout(directory, catalog=family.catalog)
        pytest.skip(f"{family} on {VERSION}: {refused.value.message}")
    return directory


@pytest.mark.parametrize(("family", "parallel"), CASES)
def test_the_trace_says_what_the_load_does(
    tmp_path: Path, family: Family, parallel: Parallel, record_property: Callable[[str, object], None]
) -> None:
    directory = written(tmp_path, family)
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
    record_property(
        "cell",
        {
            "engine": "vllm",
            "version": VERSION,
            "family": family.architecture,
            "quantization": family.quantization,
            "name": family.name,
            "tp": parallel.tp,
            "ep": parallel.ep,
            "result": f"refused: {refused}" if refused else "trace == probe",
        },
    )


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
    with rank_of(written(tmp_path, family), Parallel(), 0) as config:
        twin = build(config)
        traced = trace_loader(
            twin, lambda weights: load_weights(twin, weights), family.catalog, parallel=Parallel(), rank=0, engine=VERSION
        )
    lost = dropped(traced, twin)
    assert [(path, names) for path, names in lost.items() if not all(name.endswith("g_idx") for name in names)] == []
    assert all("g_idx" in path for path in lost)


ON_CUDA = [compressed(kind, word) for kind in ("llama", "qwen3_moe") for word in ("nvfp4", "nvfp4a16", "mxfp4", "w8a16", "w4a16")]


@pytest.mark.parametrize("family", [*ON_CUDA, deepseek_v32()], ids=str)
def test_formats_and_layers_that_only_a_gpu_serves(
    tmp_path: Path, family: Family, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU host lacks their kernels, not their loaders."""
    warn_once.cache_clear()
    directory = write_family(tmp_path, family, weights=False)
    for parallel in (Parallel(2), *([Parallel(2, ep=2)] if family.experts else [])):
        traced = trace_layout(directory, parallel, 1, catalog=family.catalog)
        covers = {name: d.covers for name, d in traced.derived.items() if " by vllm " in name}
        probed = probe_layout(directory, parallel, 1, catalog=family.catalog, groups=groups_of(covers.values()))
        assert agree(traced.layout, probed, covers) == []
        assert not traced.hidden
    if current_platform.is_cpu() and not family.name.endswith("w4a16"):
        assert any("this model is built as on a CUDA host: vllm" in message for message in caplog.messages)
    assert not hasattr(torch.ops._C, "cutlass_scaled_mm_supports_fp4") or not current_platform.is_cpu()


def test_what_cannot_be_built_anywhere_says_why(tmp_path: Path) -> None:
    """A GPU's answer counts only where there is one."""
    family = compressed("llama", "nvfp4")
    directory = write_family(tmp_path / "kv3", replace(family, config={**family.config, "num_key_value_heads": 3}), weights=False)
    line = r"AssertionError at vllm/model_executor/models/llama\.py:\d+ \(assert .*num_kv_heads % tp_size == 0\)$"
    with pytest.raises(LayoutError) as refused:
        trace_layout(directory, Parallel(2), 0, catalog=family.catalog)
    assert re.search(line, refused.value.message)
    assert "try another parallel layout" in refused.value.next_step


def small(kind: str, **more: object) -> dict[str, object]:
    """Arguments of a transformers configuration."""
    return {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        **more,
    } | ({} if kind == "falcon" else {"intermediate_size": 512, "num_key_value_heads": 4})


def saved(directory: Path, config: transformers.PreTrainedConfig, kind: type[transformers.PreTrainedModel]) -> Path:
    """Its checkpoint, as transformers writes it."""
    config.dtype, config.architectures = torch.bfloat16, [kind.__name__]
    kind(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


TEXT = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 4,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 56,
    "vision_output_dim": 128,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
}
#: Models that vLLM builds in memory only: their constructors ask for values, or mix devices.
IN_MEMORY = {
    "apertus": lambda: (transformers.ApertusConfig(**small("apertus")), transformers.ApertusForCausalLM),
    "bloom": lambda: (
        transformers.BloomConfig(vocab_size=512, hidden_size=256, n_layer=2, n_head=8),
        transformers.BloomForCausalLM,
    ),
    "falcon-alibi": lambda: (
        transformers.FalconConfig(**small("falcon", alibi=True, bias=True, multi_query=False, parallel_attn=False)),
        transformers.FalconForCausalLM,
    ),
    "gemma3n": lambda: (
        transformers.Gemma3nTextConfig(
            vocab_size=512,
            vocab_size_per_layer_input=480,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            hidden_size_per_layer_input=32,
            num_kv_shared_layers=2,
            laurel_rank=16,
            altup_num_inputs=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        transformers.Gemma3nForCausalLM,
    ),
    "llama4": lambda: (
        transformers.Llama4Config(text_config=TEXT, vision_config=VISION),
        transformers.Llama4ForConditionalGeneration,
    ),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_models_that_cannot_be_built_on_meta_are_built_in_memory(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "llama4":
        pytest.importorskip("torchvision", reason="vLLM's models of images need torchvision")
    warn_once.cache_clear()
    directory = saved(tmp_path, *IN_MEMORY[name]())
    caplog.clear()
    traced = trace_layout(directory, Parallel(2), 1)
    (message,) = [m for m in caplog.messages if "can't build this model without memory" in m]
    assert re.search(r"so it is built in [0-9.]+ MB of it \((RuntimeError|NotImplementedError): .* at vllm/", message)
    assert agree(traced.layout, probe_layout(directory, Parallel(2), 1)) == []


def test_pooling_models_are_probed(tmp_path: Path) -> None:
    """vLLM leaves the language model's head, which they don't have, on meta."""
    config = transformers.Qwen3Config(**small("qwen3"), num_labels=3, pad_token_id=0)
    directory = saved(tmp_path, config, transformers.Qwen3ForSequenceClassification)
    traced = trace_layout(directory, Parallel(2), 1)
    assert agree(traced.layout, probe_layout(directory, Parallel(2), 1)) == []
    assert "score.weight" in traced.layout.buffer_names


def test_experts_without_gates_are_built_as_on_a_cuda_host(tmp_path: Path) -> None:
    config = transformers.NemotronHConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=128,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        layers_block_type=["mamba", "moe", "attention"],
        chunk_size=16,
        max_position_embeddings=512,
    )
    directory = saved(tmp_path, config, transformers.NemotronHForCausalLM)
    for parallel in (Parallel(2), Parallel(2, ep=2)):
        traced = trace_layout(directory, parallel, 1)
        covers = {name: d.covers for name, d in traced.derived.items() if " by vllm " in name}
        assert agree(traced.layout, probe_layout(directory, parallel, 1, groups=groups_of(covers.values())), covers) == []
        assert {d.covers for d in traced.derived.values()} >= {("backbone.layers.0.mixer.A_log",)}


def test_a_loader_that_needs_values_says_where(tmp_path: Path) -> None:
    family = FAMILIES["llama4"]
    directory = write_family(tmp_path, family, weights=False)
    with pytest.raises(LayoutError) as refused:
        trace_layout(directory, Parallel(2, ep=2), 0, catalog=family.catalog)
    tensor, line = (
        r"feed_forward\.experts\.\w+_proj, .* asks for values",
        r"RuntimeError: .* at vllm/.*/llama4\.py:\d+ \(.*\.item\(\)",
    )
    assert re.search(f"{tensor}.*: {line}", refused.value.message)


def test_a_checkpoint_of_other_sizes_is_said(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    wrong = [
        t._replace(shape=(512, *t.shape[1:])) if "k_norm" in t.name or "0.input_layernorm" in t.name else t
        for t in family.tensors
    ]
    directory = write_family(tmp_path, family, weights=False)
    with pytest.raises(
        LayoutError, match=r"^model\.layers\.0\.input_layernorm\.weight.*: the engine's loader fails: .* at vllm/"
    ) as refused:
        trace_layout(directory, catalog=Catalog.of(wrong))
    assert "compare the checkpoint's tensors with its config.json" in refused.value.next_step


def test_a_collective_operation_is_refused_by_name(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    with rank_of(write_family(tmp_path, family, weights=False), Parallel(2), 0):
        group = parallel_state.get_tp_group()
        for collective in (
            lambda: torch.distributed.all_reduce(torch.ones(1), group=group.device_group),
            lambda: group.all_reduce(torch.ones(1)),
        ):
            with pytest.raises((RuntimeError, ValueError), match="ommunicat"):
                collective()


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
        directory = written(tmp_path / name, family)
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
