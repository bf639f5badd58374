"""An instance: one process for each rank of a tensor-parallel engine, started, listened to and stopped together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, TypeVar

from ..config import Config
from ..errors import PeerloadError
from .events import Event, Failed

Kind = TypeVar("Kind", bound=Event)


class RankFailed(PeerloadError):
    """A rank's process reported an error or died. `exit_code` is that of its own error."""

    def __init__(self, message: str, exit_code: int, *, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.__dict__["exit_code"] = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank's process is told. `role`: "peer" loads through peerload and becomes a seed, "disk" is the engine's
    own load from disk. `rendezvous`: a file for torch.distributed to meet at."""

    role: Literal["peer", "disk"]
    instance: str
    rank: int
    size: int
    model_dir: str
    config: Config
    rendezvous: str
    log_path: str
    prompts: tuple[str, ...] = ()
    new_tokens: int = 16


class Instance:
    """All ranks of one instance. Use it with `with`: leaving stops every process, politely first."""

    def __init__(self, spec: RankSpec, directory: Path, on_event: Callable[[int, Event], None] = lambda *_: None) -> None:
        """`spec` is that of rank 0; `directory` receives logs and the rendezvous file."""
        self.name, self.size, self._directory, self._on_event = spec.instance, spec.size, directory, on_event
        rendezvous = tempfile.mktemp(prefix=f"{spec.instance}-", suffix=".rendezvous", dir=directory)  # noqa: S306 - torch makes it
        self._specs = [
            replace(spec, rank=rank, rendezvous=rendezvous, log_path=str(directory / f"{spec.instance}-rank{rank}.log"))
            for rank in range(spec.size)
        ]
        self._links: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def __enter__(self) -> Instance:
        context = _context()
        for spec in self._specs:
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(spec, theirs), name=f"{self.name}-rank{spec.rank}", daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self.processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, kind: type[Kind], timeout_s: float) -> list[Kind]:
        """The next event of this kind of every rank, by rank; others go to `on_event`. Raises RankFailed when a rank
        reports an error or dies first, naming its log."""
        found: dict[int, Kind] = {}
        until = time.monotonic() + timeout_s
        while len(found) < self.size:
            silent = [rank for rank in range(self.size) if rank not in found]
            ready = wait([self._links[rank] for rank in silent], timeout=max(0.0, until - time.monotonic()))
            if not ready:
                ranks = ", ".join(map(str, silent))
                raise RankFailed(
                    f"{self.name}: no {kind.__name__} from rank {ranks} within {timeout_s:.0f} s", 4, next_step=self._logs()
                )
            for rank in silent:
                if self._links[rank] in ready:
                    event = self._receive(rank)
                    if isinstance(event, kind):
                        found[rank] = event
                    else:
                        self._on_event(rank, event)
        return [found[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> Event:
        """What this rank says next. Raises RankFailed when that is the end of it."""
        try:
            event: Event = self._links[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5)
            died = f"{self.name}: rank {rank} died with exit code {self.processes[rank].exitcode}\n{self._tail(rank)}"
            raise RankFailed(died, 1, next_step=self._logs()) from None
        if isinstance(event, Failed):
            raise RankFailed(f"{self.name}: rank {rank}: {event.message}", event.exit_code, next_step=self._logs())
        return event

    def _tail(self, rank: int) -> str:
        path = Path(self._specs[rank].log_path)
        return "\n".join(path.read_text(errors="replace").splitlines()[-15:]) if path.exists() else ""

    def _logs(self) -> str:
        return f"read the logs in {self._directory}"

    def tell(self, word: str) -> None:
        """Say a word to every rank that still listens."""
        for link in self._links:
            try:
                link.send(word)
            except (BrokenPipeError, OSError):
                continue

    def kill(self, rank: int) -> None:
        """SIGKILL, as a crash would."""
        pid = self.processes[rank].pid
        assert pid is not None, "the process has been started"
        os.kill(pid, signal.SIGKILL)

    def stop(self, grace_s: float = 15.0) -> None:
        self.tell("stop")
        until = time.monotonic() + grace_s
        for process in self.processes:
            process.join(max(0.1, until - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        for link in self._links:
            link.close()
        self._links.clear()


def _context() -> multiprocessing.context.ForkServerContext:
    """Ranks are forked from a server that has imported the engine once: importing it is most of a small start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peerload.demo.rank"])
    return context


def _main(spec: RankSpec, link: Connection) -> None:
    from .rank import run_rank

    run_rank(spec, link)
