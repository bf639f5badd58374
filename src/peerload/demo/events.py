"""What a rank's process is told, and what it says to the process that started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..config import Config
from ..receipt import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank's process is told. `role`: "peer" loads through peerload and becomes a seed, "disk" is the engine's
    own load from disk. `rendezvous`: a file for torch.distributed to meet at, the same for all ranks."""

    role: Literal["peer", "disk"]
    instance: str
    rank: int
    size: int
    model_dir: str
    config: Config
    rendezvous: str = ""
    prompts: tuple[str, ...] = ()
    new_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes that have arrived, of all that this rank wants."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoaded:
    """The weights are there. engine_s: building the model without weights (the engine's own load: all of it). whole_s: from the
    start of building until every page can be read. receipt: None after the engine's own load.

    rss_before, rss_peak: resident bytes before the load and at most during it. held_nbytes: the rank's own weights."""

    engine_s: float
    whole_s: float
    receipt: Receipt | None = None
    rss_before: int = 0
    rss_peak: int = 0
    held_nbytes: int = 0

    @property
    def extra_nbytes(self) -> int:
        """How far the peak lay above what was resident before and the weights themselves."""
        return max(0, self.rss_peak - self.rss_before - self.held_nbytes)


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy continuations of the prompts, and SHA-256 of this rank's bytes of every parameter and buffer."""

    tokens: list[list[int]]
    text: list[str]
    checksums: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank gave up. exit_code: of its error."""

    message: str
    exit_code: int


Event = Progress | RankLoaded | Generated | Failed
