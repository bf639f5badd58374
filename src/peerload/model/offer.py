"""Who holds which box of which logical tensor, at which byte: the values that everything else speaks in.

Two halves with different lifetimes. A `Layout` says where boxes of logical tensors lie in a rank's buffers; a thousand
replicas share one. A `Binding` says where one process has put those buffers and how to reach them; it lives as long as
a lease. Together they are an `Offer`.

Thousands are objects, millions are arrays: tensors, buffers and pieces are columns. Arrays are read-only int64; a row's
box is padded on the left to the catalog's `width` dimensions with `[0, 1)` and stride 0.
Pure: standard library and NumPy only.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError
from .boxes import IntArray
from .catalog import _refuse_unprintable, frozen
from .layout import Layout


@dataclass(frozen=True, slots=True, order=True)
class SourceId:
    """One rank of one instance in one life. `generation` changes when the process restarts or its weights change. A seed's has
    32 hex digits, of which the last 8 count the changes: all ranks of an instance change their weights together, so only ranks
    with the same number hold parts of the same weights."""

    instance: str
    rank: int
    generation: str

    def __post_init__(self) -> None:
        _refuse_unprintable("source.instance", self.instance)
        _refuse_unprintable("source.generation", self.generation)

    @classmethod
    def new(cls, instance: str, rank: int, changes: int) -> SourceId:
        return cls(instance, rank, f"{uuid.uuid4().hex[:24]}{changes % (1 << 32):08x}")

    @property
    def changes(self) -> int:
        """How often the weights had changed since the seed began; 0 where the generation isn't a seed's."""
        seeds = len(self.generation) == 32 and set(self.generation) <= set("0123456789abcdef")
        return int(self.generation[24:], 16) if seeds else 0

    def __str__(self) -> str:
        return f"{self.instance}/rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How one transport reaches a process; `description` is the transport's own and opaque to everyone else."""

    transport: str
    description: bytes


#: The digest of `integrity/digest.py`, as announcements and measurements name it. Whatever changes a digest's value changes this.
ALGORITHM: Final = "m61-1"

#: What a fence holds: the generation, as bytes.
FENCE_NBYTES: Final = 16


def fence(generation: str) -> bytes:
    """The 16 bytes a seed keeps in its memory while the weights of `generation` (32 hex digits) are there."""
    return bytes.fromhex(generation)


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """Where one process has put the buffers of its layout, and how to reach it.

    address: [buffers], each buffer's first byte in the process's address space.
    digests: [pieces] uint64 of `digest.py`; None when the seed was told not to compute them, or computed them by an algorithm
    that this release doesn't know.
    algorithm: which one the seed computes digests by, ALGORITHM when it computes none.
    fence_address: 16 bytes that hold the generation as long as the buffers hold its weights; 0 when there is none.
    host: identifies the machine (boot id), so that same-host transports know when they apply.
    """

    source: SourceId
    address: IntArray
    endpoints: tuple[Endpoint, ...]
    digests: npt.NDArray[np.uint64] | None = None
    fence_address: int = 0
    host: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    algorithm: str = ALGORITHM

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", frozen(self.address))
        if (self.address < 0).any():
            raise ManifestError(f"binding.address[{int(np.argmax(self.address < 0))}]", "is negative")


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A layout that somebody holds: everything a planner needs to know about one source rank."""

    layout: Layout
    binding: Binding

    def __post_init__(self) -> None:
        if len(self.binding.address) != len(self.layout.buffer_names):
            raise ManifestError(
                "binding.address", f"has {len(self.binding.address)} rows for {len(self.layout.buffer_names)} buffers"
            )
        digests = self.binding.digests
        if digests is not None and len(digests) != len(self.layout.pieces):
            raise ManifestError("binding.digests", f"has {len(digests)} rows for {len(self.layout.pieces)} pieces")

    @property
    def source(self) -> SourceId:
        return self.binding.source
