"""Declared layouts: cuts against torch's own distribution of tensors, whole ranks against the trace of the engine's load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

from peerload.engines.checkpoint import ModelFiles
from peerload.engines.transformers.declared import Cut, Share, cuts_of, shares
from peerload.engines.transformers.live import live_model
from peerload.engines.transformers.open import open_model
from peerload.errors import LayoutError
from peerload.model.catalog import Parallel
from peerload.model.layout import Layout
from peerload.testing.families import FAMILIES, Family


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    """Be that rank of a group of which nobody else exists."""
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def local_part(whole: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    """What a rank holds, put together from shares alone."""
    held = shares(whole.shape, cuts)
    size = [max((s.local[d] + s.shape[d] for s in held), default=0) for d in range(whole.dim())]
    out = torch.full(size, -1)
    for share in held:
        there, here = (tuple(slice(a, a + n) for a, n in zip(at, share.shape, strict=True)) for at in (share.local, share.start))
        assert (out[there] == -1).all(), "a share on top of another"
        out[there] = whole[here]
    assert (out >= 0).all(), "a hole between shares"
    return out


def torch_part(whole: torch.Tensor, placements: Sequence[Placement], mesh: Sequence[int], at: Sequence[int]) -> torch.Tensor:
    """The same by torch: each placement splits what the one before has left."""
    for placement, parts, index in zip(placements, mesh, at, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            whole = placement._split_tensor(whole, parts, with_padding=False)[0][index]
    return whole


placement = st.one_of(
    st.just(Replicate()),
    st.builds(Shard, st.integers(0, 1)),
    st.builds(lambda dim, groups: _StridedShard(dim, split_factor=groups), st.integers(0, 1), st.integers(1, 3)),
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cuts_are_what_torch_splits(data: st.DataObject) -> None:
    """Any placements over any mesh, uneven and empty parts included."""
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    placements = [data.draw(placement) for _ in mesh]
    at = [data.draw(st.integers(0, parts - 1)) for parts in mesh]
    shape = (data.draw(st.integers(1, 13)), data.draw(st.integers(1, 13)))
    whole = torch.arange(shape[0] * shape[1]).reshape(shape)
    cuts = [
        Cut(p.dim, parts, index, int(getattr(p, "split_factor", 1)))
        for p, parts, index in zip(placements, mesh, at, strict=True)
        if not isinstance(p, Replicate)
    ]
    ours, theirs = local_part(whole, cuts), torch_part(whole, placements, mesh, at)
    assert ours.numel() == theirs.numel()
    if theirs.numel():
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", range(6))
def test_cuts_of_a_dtensor(rank: int) -> None:
    """Read off real DTensors of a mesh of 3 x 2, by their names for dimensions (negative ones too)."""
    whole = torch.arange(7 * 10).reshape(7, 10)
    cases: list[list[Placement]] = [[Shard(0), Shard(1)], [Shard(-1), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]]
    with rank_of(rank, 6):
        mesh = init_device_mesh("cpu", (3, 2))
        for placements in cases:
            local = torch_part(
                whole, [Shard(p.dim % 2) if isinstance(p, Shard) else p for p in placements], (3, 2), divmod(rank, 2)
            )
            tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
            ours = local_part(whole, cuts_of("weight", tensor))
            assert ours.numel() == local.numel()
            assert not local.numel() or torch.equal(ours, local)
        partial = DTensor.from_local(whole, mesh, [Partial(), Replicate()], run_check=False)
        with pytest.raises(LayoutError, match=r"^weight: placement P\(sum\)"):
            cuts_of("weight", partial)


def test_an_example_by_hand() -> None:
    """FSDP over TP, both on rows: rank (1, 0) of 2 x 2 has the second half of the first half."""
    assert shares((8, 4), [Cut(0, 2, 1, groups=2), Cut(0, 2, 0)]) == [Share((2, 0), (0, 0), (2, 4))]
    assert shares((5,), [Cut(0, 4, 3)]) == []
    assert cuts_of("plain", torch.zeros(3)) == ()


def elements(layout: Layout) -> dict[str, list[int]]:
    """Which checkpoint element each element of each buffer holds (-1: a constant), tensors being numbered through."""
    sizes = [int(np.prod(shape)) for shape in layout.catalog.shapes]
    first, found = np.cumsum([0, *sizes]), {}
    item: dict[int, int] = {}
    for row in layout.written.tolist():
        item[int(layout.pieces.buffer[row])] = int(layout.catalog.itemsize[layout.pieces.tensor[row]])
    for buffer, name in enumerate(layout.buffer_names):
        found[name] = np.full(int(layout.buffer_nbytes[buffer]) // item[buffer], -1)
    for row in layout.written.tolist():
        spec, box, buffer = layout.tensor_of(row), layout.box_of(row), int(layout.pieces.buffer[row])
        tensor = int(layout.pieces.tensor[row])
        numbers = (first[tensor] + np.arange(sizes[tensor])).reshape(spec.shape)[box.slices()]
        strides = layout.pieces.stride[row, layout.catalog.width - len(spec.shape) :] // item[buffer] * 8
        memory = found[layout.buffer_names[buffer]][int(layout.pieces.offset[row]) // item[buffer] :]
        np.lib.stride_tricks.as_strided(memory, numbers.shape, strides.tolist())[...] = numbers
    return {name: memory.tolist() for name, memory in found.items()}


def files_of(family: Family) -> ModelFiles:
    return ModelFiles({"config.json": json.dumps(dict(family.config)).encode()})


#: What transformers has a plan for.
DENSE = ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt-neox", "llama4", "llama-fp8-block"]
SPARSE = [
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "olmoe",
    "qwen3-next",
    "deepseek-v2",
    "deepseek-v3",
    "glm4-moe",
    "gpt-oss",
    "qwen3-moe-fp8-block",
]
UNSPLIT = ["gpt2", "opt", "falcon"]
CASES = [(name, Parallel(tp)) for name in [*DENSE, *SPARSE] for tp in (2, 4)] + [(name, Parallel()) for name in UNSPLIT]
if hasattr(DistributedConfig, "ep_size"):
    CASES += [(name, Parallel(2, ep=2)) for name in SPARSE]


@pytest.mark.parametrize(("name", "parallel"), CASES, ids=str)
def test_declared_is_traced(name: str, parallel: Parallel) -> None:
    """The placements of a model that the engine itself has split say the same as the trace of its load, for every rank."""
    family = FAMILIES[name]
    files = files_of(family)
    for rank in range(parallel.tp):
        with rank_of(rank, parallel.tp):
            opened = open_model(files, family.catalog, parallel, rank=rank, keep=True)
            live = live_model(opened.model, files, family.catalog, rank=rank)
            where = dict(zip(live.layout.buffer_names, live.address.tolist(), strict=True))
        assert (live.layout.parallel, live.layout.rank) == (parallel, rank)
        assert elements(live.layout) == elements(opened.layout)
        cast = {name for name, at in zip(opened.layout.buffer_names, opened.address.tolist(), strict=True) if where[name] != at}
        assert len(cast) == len(live.shadows) == len(opened.shadows)
        assert not cast or name == "deepseek-v3"
        assert live.layout.aliases == opened.layout.aliases
