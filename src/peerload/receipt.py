"""What every load ends in. The same object feeds the log line, the table, and the benchmark's JSON.

Pure: standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Read(NamedTuple):
    """What came from one source: bytes that landed, and the operations (contiguous runs) it took."""

    nbytes: int
    operations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One rank's load.

    sources: by name, as in `instance/rank 1`, or the path of a checkpoint.
    instance: the same for all ranks of the instance together.
    needed_nbytes: what the layout wants; wire_nbytes: what was moved for it, rereads and staging overhead included.
    attached_nbytes: the part of wire_nbytes that is mapped out of a peer's memory on this host: shared with it, not moved.
    seconds: by phase (discover, plan, register, transfer, verify, commit), phases of zero length left out; wall_s: all of it.
    How each byte received is proven: verified_nbytes by the digests that seeds announced; checkpoint_nbytes were read from this
    host's own checkpoint and no digest covers them; unverified_nbytes by nothing, since `verify` was off, or since this rank
    holds only a part of what a digest covers and pulled alone. Together they are needed_nbytes.
    reread_nbytes: received wrong, or unproven from a source that was then lost, and read again.
    left: logical tensors that nobody held and that the engine has to derive from the checkpoint itself.
    digest: sum, modulo 2^61 - 1, of the digests of the `digest_tensors` logical tensors that the ranks of this instance hold
    whole between them: equal for equal weights whatever the parallel layout.
    digests: of each piece of the layout that was received and hashed whole, by its row. A seed of these weights passes them on.
    """

    model: str
    rank: int
    sources: Mapping[str, Read] = field(default_factory=dict)
    instance: Mapping[str, Read] = field(default_factory=dict)
    needed_nbytes: int
    wire_nbytes: int
    operations: int
    attached_nbytes: int = 0
    seconds: Mapping[str, float]
    wall_s: float
    verify: bool = True
    verified_nbytes: int = 0
    checkpoint_nbytes: int = 0
    unverified_nbytes: int = 0
    reread_nbytes: int = 0
    staging_nbytes: int = 0
    digest: int = 0
    digest_tensors: int = 0
    left: tuple[str, ...] = ()
    digests: Mapping[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"receipt.{item.name} is {value}, must not be negative")

    @property
    def transfer_gb_per_s(self) -> float:
        """10^9 bytes on the wire for each second of the transfer phase; 0 when nothing was moved."""
        seconds = self.seconds.get("transfer", 0.0)
        return self.wire_nbytes / seconds / 1e9 if seconds else 0.0

    @property
    def overhead(self) -> float:
        """Bytes on the wire for each byte needed; 1.0 is exact."""
        return self.wire_nbytes / self.needed_nbytes if self.needed_nbytes else 1.0

    @property
    def proof(self) -> str:
        """What the bytes are proven by, in words."""
        parts = []
        if self.checkpoint_nbytes:
            parts.append(f"{readable(self.checkpoint_nbytes)} read from this host's own checkpoint")
        if self.unverified_nbytes:
            why = "a rank alone holds only parts of what the seeds' digests cover" if self.verify else "verify is off"
            parts.append(f"{readable(self.unverified_nbytes)} not proven ({why})")
        if not parts:
            return "all verified by the seeds' digests"
        return ", ".join([f"{readable(self.verified_nbytes)} verified by the seeds' digests", *parts])

    def to_dict(self) -> dict[str, object]:
        """For JSON; `digest` in hexadecimal, without the `digests` of pieces."""
        fields: dict[str, object] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "digests"}
        for read in ("sources", "instance"):
            fields[read] = {name: r._asdict() for name, r in getattr(self, read).items()}
        fields["seconds"] = {phase: round(seconds, 6) for phase, seconds in self.seconds.items()}
        fields["digest"] = f"{self.digest:016x}"
        fields["transfer_gb_per_s"] = round(self.transfer_gb_per_s, 3)
        fields["overhead"] = round(self.overhead, 6)
        return fields

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in self.seconds.items())
        rate = f"{self.transfer_gb_per_s:.2f} GB/s, {self.operations} operations, {self.overhead:.3f}x the bytes"
        return (
            f"{self.model} rank {self.rank}: {self.needed_nbytes} bytes in {self.wall_s:.3f} s "
            f"from {len(self.sources)} sources ({rate}; {phases}), {self.proof}"
        )


def readable(nbytes: int) -> str:
    """For people, in powers of ten as rates are: "14.96 GB", "2 kB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
