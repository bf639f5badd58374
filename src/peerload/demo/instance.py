"""An instance of the demo: one process for each rank of a tensor-parallel engine, started, heard and stopped together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..errors import PeerloadError
from ..testing.processes import Child, ChildDied, close_all, speaking
from .events import Event, Failed, RankSpec

Kind = TypeVar("Kind", bound=Event)


class RankFailed(PeerloadError):
    """A rank's process reported an error or died. `exit_code` is that of its own error."""

    def __init__(self, message: str, exit_code: int, *, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.__dict__["exit_code"] = exit_code


class DemoInstance:
    """All ranks of one instance. Use it with `with`: leaving stops every process, politely first."""

    def __init__(self, spec: RankSpec, directory: Path, on_event: Callable[[int, Event], None] = lambda *_: None) -> None:
        """`spec` is that of rank 0; `directory` receives logs and the rendezvous file."""
        self._spec, self._directory, self._on_event = spec, directory, on_event
        self.ranks: list[Child] = []

    def __enter__(self) -> DemoInstance:
        name = self._spec.instance
        rendezvous = tempfile.mktemp(prefix=f"{name}-", suffix=".rendezvous", dir=self._directory)  # noqa: S306 - torch makes it
        for rank in range(self._spec.size):
            spec = replace(self._spec, rank=rank, rendezvous=rendezvous)
            log = self._directory / f"{name}-rank{rank}.log"
            self.ranks.append(Child("peerload.demo.rank:run_rank", spec, name=f"{name}: rank {rank}", log=log))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for(self, kind: type[Kind], timeout_s: float) -> list[Kind]:
        """The next event of this kind of every rank, by rank; others go to `on_event`. Raises RankFailed when a rank
        reports an error or dies first, naming its log."""
        found: dict[Child, Kind] = {}
        until = time.monotonic() + timeout_s
        while silent := [rank for rank in self.ranks if rank not in found]:
            ready = speaking(silent, max(0.0, until - time.monotonic()))
            if not ready:
                names = ", ".join(rank.name for rank in silent)
                raise RankFailed(f"no {kind.__name__} within {timeout_s:.0f} s from {names}", 4, next_step=self._logs())
            for rank in ready:
                event = self._event(rank)
                if isinstance(event, kind):
                    found[rank] = event
                else:
                    self._on_event(self.ranks.index(rank), event)
        return [found[rank] for rank in self.ranks]

    def _event(self, rank: Child) -> Event:
        """What this rank says next. Raises RankFailed when that is the end of it."""
        try:
            event: Event = rank.hear()
        except ChildDied as died:
            raise RankFailed(str(died), 1, next_step=self._logs()) from died
        if isinstance(event, Failed):
            raise RankFailed(f"{rank.name}: {event.message}", event.exit_code, next_step=self._logs())
        return event

    def _logs(self) -> str:
        return f"read the logs in {self._directory}"

    def close(self) -> None:
        close_all(self.ranks)
