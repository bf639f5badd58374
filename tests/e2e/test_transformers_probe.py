"""transformers: the layout by trace and the layout by probe are the same, element by element, for every family it can load."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

pytest.importorskip("transformers.distributed")

from transformers.distributed import DistributedConfig

from peerload.engines.checkpoint import ModelFiles
from peerload.engines.transformers.open import layout_for
from peerload.engines.transformers.probe import probe_layout
from peerload.model.catalog import Parallel
from peerload.testing.families import FAMILIES
from peerload.tracing.probe.agree import agree

pytestmark = pytest.mark.e2e
HAS_EP = hasattr(DistributedConfig, "ep_size")
#: What transformers can't load here, because a package is missing or it has other names for their tensors.
REFUSED = ("fp8-tensor", "fp8-channel", "w8a8", "gptq", "awq")
NO_PLAN = ("gpt2", "opt", "falcon")
CASES = [
    (name, parallel)
    for name, family in FAMILIES.items()
    if family.quantization not in REFUSED
    for parallel in (Parallel(), Parallel(2), Parallel(4), Parallel(2, ep=2))
    if (parallel.ep == 1 or (HAS_EP and family.experts and name != "llama4")) and (parallel.tp == 1 or name not in NO_PLAN)
]


@pytest.mark.parametrize(("name", "parallel"), CASES, ids=str)
def test_trace_is_probe(name: str, parallel: Parallel, record_property: Callable[[str, object], None]) -> None:
    family = FAMILIES[name]
    files = ModelFiles({"config.json": json.dumps(dict(family.config), default=dict).encode()})
    rank = parallel.tp - 1
    layout = layout_for(files, parallel, rank, family.catalog, kept_casts=True)
    layout.prove_cover()
    assert agree(layout, probe_layout(files, parallel, rank, family.catalog)) == []
    record_property(
        "cell",
        {
            "engine": "transformers",
            "family": family.architecture,
            "quantization": family.quantization,
            "tp": parallel.tp,
            "ep": parallel.ep,
            "result": "trace == probe",
        },
    )
