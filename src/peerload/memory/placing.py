"""Memory of ours: arenas that peers can map, what to register of it, copies and fills within it.

torch is imported only by the functions that take or give tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import ConfigError, HostError
from ..model.boxes import IntArray
from .cuda.driver import Block, Device
from .region import Region

if TYPE_CHECKING:
    import torch
from .arena import Arena


@dataclass(frozen=True, slots=True)
class Placed:
    """`nbytes` from `address`, and the allocation (a whole block of its allocator) that they lie in."""

    address: int
    nbytes: int
    allocation: Region

    def __post_init__(self) -> None:
        block = self.allocation
        if self.nbytes < 0 or self.address < block.address or self.address + self.nbytes > block.address + block.nbytes:
            raise ValueError(f"{self.nbytes} bytes at {self.address:#x} lie outside {block}")


def placed(tensor: torch.Tensor, arenas: Sequence[Arena] = ()) -> Placed:
    """Where a tensor's elements lie: from its lowest byte to its highest, strides included. Its allocation is the arena it was
    made in, or else its storage; on a GPU the driver's block, which may hold other tensors. Owns nothing: keep the tensor."""
    device = tensor.device
    if device.type not in ("cpu", "cuda"):
        raise HostError(f"a tensor on {device} can't be registered", next_step="move it to the CPU or to a CUDA device")
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    address, nbytes = tensor.data_ptr(), reach * tensor.element_size()
    for arena in arenas:
        if arena.contains(address, nbytes):
            return Placed(address, nbytes, arena.region())
    storage = tensor.untyped_storage()
    own = Region(storage.data_ptr(), storage.nbytes(), str(device))
    if device.type == "cuda" and nbytes:
        block = _block(str(device), address)
        if block.contains(address, nbytes):  # not so where memory was mapped piece by piece (expandable segments)
            return Placed(address, nbytes, Region(block.address, block.nbytes, str(device)))
    return Placed(address, nbytes, own)


def _block(name: str, address: int) -> Block:
    device = Device(name)
    try:
        return device.block(address)
    finally:
        device.close()


def regions_within(block: Region, address: IntArray, nbytes: IntArray, registration: str) -> list[Region]:
    """`regions_for` buffers at `address` [n] of `nbytes` [n] that all lie in one allocation."""
    return regions_for([Placed(a, n, block) for a, n in zip(address.tolist(), nbytes.tolist(), strict=True)], registration)


def regions_for(buffers: Sequence[Placed], registration: str) -> list[Region]:
    """What to register so that all `buffers` are readable, in order of address.

    per-tensor: each buffer's own bytes; buffers that overlap (tied tensors, views) share one region.
    per-allocation: each whole block once. arena: the one block that holds them all; ConfigError if they lie in several.
    Regions of different allocations are never merged, however close they lie."""
    blocks = {(b.allocation.device, b.allocation.address): b.allocation for b in buffers if b.allocation.nbytes}
    if registration == "arena" and len(blocks) > 1:
        raise ConfigError(
            f"registration is 'arena', but the buffers lie in {len(blocks)} allocations",
            next_step="allocate them in one peerload.memory.Arena, or set registration to per-allocation",
        )
    if registration in ("per-allocation", "arena"):
        return [blocks[key] for key in sorted(blocks)]
    if registration != "per-tensor":
        raise ConfigError(f"registration is {registration!r}, must be one of per-tensor, per-allocation, arena")
    regions: list[Region] = []
    for b in sorted(buffers, key=lambda b: (b.allocation.device, b.allocation.address, b.address)):
        block, last = b.allocation, regions[-1] if regions else None
        if b.nbytes == 0:
            continue
        if last is not None and last.device == block.device and b.address < last.address + last.nbytes:
            end = max(last.address + last.nbytes, b.address + b.nbytes)
            regions[-1] = replace(last, nbytes=end - last.address)
            continue
        offset = block.fd_offset + b.address - block.address if block.fd >= 0 else 0
        regions.append(Region(b.address, b.nbytes, block.device, block.fd, offset))
    return regions
