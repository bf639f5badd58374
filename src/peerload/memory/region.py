"""What a transport is: a way to read another process's registered memory into ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Region:
    """Memory a transport may touch: `nbytes` from `address`, on `device` ("cpu" or "cuda:N").

    `fd` is an open memfd whose byte `fd_offset` is the region's first byte, when the memory is backed by one; else -1.
    The caller owns memory and descriptor and keeps both until the transport is closed."""

    address: int
    nbytes: int
    device: str = "cpu"
    fd: int = -1
    fd_offset: int = 0


class Mappable(Protocol):
    """Destination memory in which whole pages may be replaced by a peer's (`peerload.memory.Arena`). Thread-safe."""

    def unshare(self) -> Region:
        """From now on its own descriptor doesn't stand for its bytes; returns the region without one."""

    def attach(self, address: int, nbytes: int, fd: int, offset: int) -> bool:
        """Map whole pages of a file that nobody can change copy-on-write over our own; False where they stay as they are."""
