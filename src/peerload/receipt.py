"""What every load ends in. The same object feeds the log line, the table, and the benchmark's JSON.

Pure: standard library only.
"""

from __future__ import annotations

import dataclasses
import json
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
    verified_nbytes + unverified_nbytes: the bytes received, proven by a seed's announcement or not.
    reread_nbytes: received wrong, and read again.
    left: logical tensors that nobody held and that the engine has to derive from the checkpoint itself.
    digest: sum, modulo 2^61 - 1, of the digests of the `digest_tensors` logical tensors that the ranks of this instance hold
    whole between them: equal for equal weights whatever the parallel layout.
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
    verified_nbytes: int = 0
    unverified_nbytes: int = 0
    reread_nbytes: int = 0
    staging_nbytes: int = 0
    digest: int = 0
    digest_tensors: int = 0
    left: tuple[str, ...] = ()

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

    def to_dict(self) -> dict[str, object]:
        """For JSON; `digest` in hexadecimal."""
        fields: dict[str, object] = dataclasses.asdict(self)
        for read in ("sources", "instance"):
            fields[read] = {name: r._asdict() for name, r in getattr(self, read).items()}
        fields["seconds"] = {phase: round(seconds, 6) for phase, seconds in self.seconds.items()}
        fields["digest"] = f"{self.digest:016x}"
        fields["transfer_gb_per_s"] = round(self.transfer_gb_per_s, 3)
        fields["overhead"] = round(self.overhead, 6)
        return fields

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in self.seconds.items())
        proof = "all verified" if not self.unverified_nbytes else f"{self.unverified_nbytes} bytes unverified"
        rate = f"{self.transfer_gb_per_s:.2f} GB/s, {self.operations} operations, {self.overhead:.3f}x the bytes"
        return (
            f"{self.model} rank {self.rank}: {self.needed_nbytes} bytes in {self.wall_s:.3f} s "
            f"from {len(self.sources)} sources ({rate}; {phases}), {proof}"
        )


def readable(nbytes: int) -> str:
    """For people, in powers of ten as rates are: "14.96 GB", "2 kB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
