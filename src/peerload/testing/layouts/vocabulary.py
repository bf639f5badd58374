"""Words to say how a serving engine cuts a model: splits of logical tensors, parts of parameters, stacks of layers.

Ranks: the world rank of an instance is `pp_rank * tp + tp_rank`. Expert groups lie inside the tensor-parallel group, as
vLLM and SGLang lay them out: with `ep` groups, group `tp_rank // (tp // ep)` holds a run of whole experts and cuts each of
them `tp // ep` ways; `ep == tp` means whole experts, `ep == 1` means every expert cut over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from peerload.model.catalog import TensorSpec


def chunk(extent: int, rank: int, size: int) -> tuple[int, int]:
    """The half-open range of rank's chunk, as torch.chunk cuts: ceil(extent / size) each, the last ones shorter or empty."""
    each = -(-extent // size)
    return min(rank * each, extent), min((rank + 1) * each, extent)


@dataclass(frozen=True, slots=True)
class Split(ABC):
    """Which half-open range of `extent` indices along `axis` a rank holds; the other axes are whole."""

    axis: int = 0

    @abstractmethod
    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]: ...

    def allocated(self, extent: int, rank: int, size: int) -> int:
        """Indices the rank keeps room for: those past its range are a zero constant."""
        start, stop = self.range(extent, rank, size)
        return stop - start


@dataclass(frozen=True, slots=True)
class Replicated(Split):
    """Replicated."""

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:  # noqa: ARG002 - one signature for all splits
        return 0, extent


WHOLE = Replicated()


@dataclass(frozen=True, slots=True)
class Chunked(Split):
    """Column parallel (axis 0) or row parallel (axis 1): chunks of whole units (a head's rows, for instance)."""

    unit: int = 1

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:
        start, stop = chunk(-(-extent // self.unit), rank, size)
        return min(start * self.unit, extent), min(stop * self.unit, extent)


@dataclass(frozen=True, slots=True)
class Heads(Split):
    """Key and value heads: cut by heads, or each head on several ranks when there are more ranks than heads."""

    heads: int = 1

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:
        unit = extent // self.heads
        if size <= self.heads:
            start, stop = chunk(self.heads, rank, size)
        else:
            start = rank * self.heads // size
            stop = start + 1
        return start * unit, stop * unit


@dataclass(frozen=True, slots=True)
class Blocks(Split):
    """Block scales: the blocks that a rank's range of the weight touches. A block that two ranks share is held by both."""

    weight: Split = WHOLE
    weight_extent: int = 1
    block: int = 128

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:  # noqa: ARG002 - one signature for all splits
        start, stop = self.weight.range(self.weight_extent, rank, size)
        return (start // self.block, -(-stop // self.block)) if start < stop else (0, 0)


@dataclass(frozen=True, slots=True)
class Padded(Split):
    """A vocabulary padded to a multiple of `multiple * size` and cut evenly; rows past the end are a constant."""

    multiple: int = 64

    def allocated(self, extent: int, rank: int, size: int) -> int:  # noqa: ARG002 - one signature for all splits
        return -(-extent // (self.multiple * size)) * self.multiple

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:
        rows = self.allocated(extent, rank, size)
        return min(rank * rows, extent), min((rank + 1) * rows, extent)


@dataclass(frozen=True, slots=True)
class FirstRank(Split):
    """Held by rank 0 of the group, a zero constant elsewhere (the bias of a row-parallel layer in gpt-oss)."""

    def range(self, extent: int, rank: int, size: int) -> tuple[int, int]:  # noqa: ARG002 - one signature for all splits
        return (0, extent) if rank == 0 else (0, 0)

    def allocated(self, extent: int, rank: int, size: int) -> int:  # noqa: ARG002 - one signature for all splits
        return extent


@dataclass(frozen=True, slots=True)
class Part:
    """One logical tensor's share of a parameter.

    tensor: its name inside the layer; `{e}` stands for the expert. shape: of one expert, if the parameter has experts.
    region: the range along the split's axis that this part takes from (a checkpoint's own fused tensor); whole if None.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    split: Split = WHOLE
    region: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter, which is one buffer: its parts stacked along their first dimension, all experts of the rank outside.

    experts: how many there are, 0 for none. `{e}` in the name means one buffer per expert instead of one for all; `{e}` in
    a part's tensor means one logical tensor per expert, else the tensor is `[experts, *shape]`.
    transposed: the last two dimensions lie in memory the other way around.
    """

    name: str
    parts: tuple[Part, ...]
    experts: int = 0
    transposed: bool = False

    def tensors(self) -> list[TensorSpec]:
        """The logical tensors, in no particular order; a tensor that several parts share comes several times."""
        specs: list[TensorSpec] = []
        for part in self.parts:
            if "{e}" in part.tensor:
                specs += [TensorSpec(part.tensor.format(e=e), part.dtype, part.shape) for e in range(self.experts)]
            else:
                shape = (self.experts, *part.shape) if self.experts else part.shape
                specs.append(TensorSpec(part.tensor, part.dtype, shape))
        return specs


@dataclass(frozen=True, slots=True)
class Stack:
    """`count` equal layers named `{prefix}.{first}` onwards; with an empty prefix the parameters stand once, unprefixed."""

    params: tuple[Param, ...]
    prefix: str = ""
    first: int = 0
    count: int = 1

    def names(self) -> list[str]:
        """The layers' name prefixes, dot included."""
        return [f"{self.prefix}.{self.first + i}." for i in range(self.count)] if self.prefix else [""]


@dataclass(frozen=True, slots=True)
class Model:
    """What an engine serves. `before` stands on the first pipeline stage, `after` on the last, layers in between.

    aliases: (tied name, name whose bytes it shares). Both are in the catalog, and pieces of both describe the same bytes.
    `tied` parameters are those the last stage keeps when it isn't the first, because the tie can't reach across stages.
    """

    name: str
    before: tuple[Param, ...]
    layers: tuple[Stack, ...]
    after: tuple[Param, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    tied: tuple[Param, ...] = ()

    def stacks(self) -> tuple[Stack, ...]:
        return (Stack(self.before), *self.layers, Stack(self.after))
