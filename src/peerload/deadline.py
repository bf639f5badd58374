"""A point in time by which something must have happened. Every wait in the package takes one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at_s` is a reading of `clock`, seconds (by default `time.monotonic`)."""

    at_s: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @classmethod
    def after(cls, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        return cls(clock() + timeout_s, clock)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - self.clock())

    def check(self, doing: str) -> None:
        """Raise DeadlineExceeded, naming what was being done, when the time is up."""
        if self.clock() >= self.at_s:
            raise DeadlineExceeded(
                f"the deadline passed while {doing}", next_step="raise deadline_s, or look at the peers named above"
            )

    def within(self, timeout_s: float) -> Deadline:
        """The earlier of this deadline and `timeout_s` seconds from now."""
        return Deadline(min(self.at_s, self.clock() + timeout_s), self.clock)
