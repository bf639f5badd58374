"""What a transport is: a way to read another process's registered memory into ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..batch import Batch
from ..deadline import Deadline


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


@dataclass(frozen=True, slots=True)
class Limits:
    """What lowering must respect and may exploit.

    strided: takes copies with counts and steps as they are; otherwise every run becomes an operation.
    operation_nbytes: what one operation costs, as the bytes that could have moved in the same time.
    max_operations: runs in one batch (0: no limit).
    max_batch_nbytes: bytes in one batch; also the grain at which work is redone after a lost source.
    same_host: reaches only processes of this host.
    pins: hands registered pages to a device, which would go on using them after they were replaced by others.
    """

    strided: bool
    operation_nbytes: int
    max_operations: int = 0
    max_batch_nbytes: int = 64 << 20
    same_host: bool = False
    pins: bool = False


class Mappable(Protocol):
    """Destination memory in which whole pages may be replaced by a peer's (`peerload.memory.Arena`). Thread-safe."""

    def unshare(self) -> Region:
        """From now on its own descriptor doesn't stand for its bytes; returns the region without one."""

    def attach(self, address: int, nbytes: int, fd: int, offset: int) -> bool:
        """Map whole pages of a file that nobody can change copy-on-write over our own; False where they stay as they are."""


class Transport(Protocol):
    """One per process and kind. Thread-safe after `register`. Destinations and sources lie in registered regions."""

    name: str
    limits: Limits

    def register(self, regions: Sequence[Region]) -> None:
        """Make regions readable by peers and usable as destinations. Raises HostError when the host refuses."""

    def describe(self) -> bytes:
        """What a peer needs to connect, valid until the next `register`."""

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        """Reach the peer that `describe`d itself; returns a handle for `read`. `source` names it in errors.
        Raises SourceUnreachable whatever is wrong with the description or the peer, also when it doesn't answer by `deadline`."""

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Move all of `batch` or raise: SourceLost (the peer is gone, refuses, makes no progress, or has not described the
        memory; an unknown part was written), PlanError (destinations outside our regions; nothing was written),
        DeadlineExceeded. Never returns with a byte missing, and whether it returns or raises, nothing of it is written later."""

    def close(self) -> None:
        """Deregister everything and disconnect. Safe to call twice."""
