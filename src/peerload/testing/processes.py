"""Processes that are spoken to: started, asked, listened to within a deadline, stopped, and gone at the end of a block.

    with Child("peerload.testing.instances:serve_life", life) as child:
        child.hear()
        child.ask("change")

In the child, `main` gets the arguments and then its end of the connection:

    def serve_life(life: Life, link: Connection) -> None:
        link.send("ready")
        for order in orders(link):
            link.send(f"did {order}")
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

#: What a child hears when it should end.
END: Final = "end"
#: How much of a log an error shows, lines.
TAIL_LINES: Final = 30


class ChildDied(RuntimeError):
    """A child ended instead of saying something. `exit_code` is negative for a signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Child:
    """A process that runs a function and can be spoken to. It starts at once; leaving the block ends it, politely first."""

    def __init__(
        self,
        main: str,
        *arguments: object,
        name: str = "",
        python: str = "",
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        grace_s: float = 15.0,
    ) -> None:
        """main: "module:function". It is named, not imported: what only the child needs (an engine) stays out of this process.

        python: another interpreter, which runs with `environment` in a process group of its own; its signals go to the whole
        group. Otherwise the child is forked from a server that has imported the module of `main` once.
        log: a file for everything the child prints; a temporary one if not given. grace_s: how long a polite end may take."""
        self.name, self._grace_s = name or main, grace_s
        self._log, self._keeps_log = (log, True) if log else (_temporary_log(), False)
        self._log.write_bytes(b"")  # there is something to read, whenever the child dies
        self._link, theirs = Pipe()
        with theirs:
            if python:
                self._process: _Forked | _Executed = _Executed(python, environment, theirs, self._log)
                self._link.send((main, arguments))
            else:
                self._process = _Forked(main, arguments, theirs, self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None and not isinstance(error, ChildDied) and (tail := self.tail()):
                error.add_note(f"{self.name} printed:\n{tail}")
        finally:
            self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._link.closed and self._process.wait(0) is None

    @property
    def log(self) -> str:
        """What the child has printed so far."""
        return self._log.read_text(errors="replace")

    def tail(self) -> str:
        """The last lines of it."""
        return "\n".join(self.log.splitlines()[-TAIL_LINES:])

    def silence(self, seconds: float) -> str:
        """What an error says about it."""
        return f"{self.name} (pid {self.pid}) says nothing for {seconds:.0f} s\n{self.tail()}"

    def tell(self, order: object) -> None:
        """Raises BrokenPipeError when nobody listens any more."""
        self._link.send(order)

    def hear(self, timeout_s: float = 60.0) -> Any:  # noqa: ANN401 - whatever `main` sends
        """What the child says next. Raises ChildDied or TimeoutError; both say how its log ends."""
        if not wait([self._link, self._process.sentinel], timeout_s):
            raise TimeoutError(self.silence(timeout_s))
        with suppress(EOFError, ConnectionResetError):
            if self._link.poll():  # also when it is dead by now: what it said before comes first
                return self._link.recv()
        code = self._process.wait(self._grace_s)
        if code is None:
            raise TimeoutError(f"{self.name} (pid {self.pid}) hung up and lives on\n{self.tail()}")
        raise ChildDied(f"{self.name} ended with exit code {code}\n{self.tail()}", code)

    def begun(self, timeout_s: float = 60.0) -> Any:  # noqa: ANN401 - as `hear`
        """What the child says first. A child that fails to is closed: for `__enter__`, whose block then never ends it."""
        try:
            return self.hear(timeout_s)
        except BaseException:
            self.close()
            raise

    def ask(self, order: object, timeout_s: float = 60.0) -> Any:  # noqa: ANN401 - as `hear`
        """The child's answer to `order`."""
        self.tell(order)
        return self.hear(timeout_s)

    def stop(self) -> None:
        """SIGSTOP: it lives and does nothing, until `go_on`."""
        self._process.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash would, and wait until it is gone."""
        if self.is_alive:
            self._process.signal(signal.SIGKILL)
            self._process.wait(None)

    def close(self, grace_s: float | None = None) -> None:
        """Ask it to end, wait for that, then kill it. May be called again. grace_s: another than its own."""
        if self._link.closed:
            return
        if self.is_alive:
            self.go_on()
            with suppress(OSError):
                self._link.send(END)
            self._process.wait(self._grace_s if grace_s is None else grace_s)
            self.kill()
        self._link.close()
        self._process.close()
        if not self._keeps_log:
            self._log.unlink()


def close_all(children: Sequence[Child]) -> None:
    """End several at once: their grace runs at the same time."""
    for child in children:
        with suppress(OSError):  # one that died or was closed
            child.tell(END)
    until_s = time.monotonic() + max((child._grace_s for child in children), default=0.0)
    with ExitStack() as stack:  # all are closed, whatever one of them raises
        for child in reversed(children):
            stack.callback(lambda child: child.close(max(0.0, until_s - time.monotonic())), child)


def speaking(children: Sequence[Child], timeout_s: float) -> list[Child]:
    """The children whose `hear` returns or raises at once. Empty when all say nothing for `timeout_s`."""
    sentinels: dict[object, Child] = {child._link: child for child in children}
    sentinels |= {child._process.sentinel: child for child in children}
    ready = {id(sentinels[one]) for one in wait([*sentinels], timeout_s)}  # type: ignore[list-item]
    return [child for child in children if id(child) in ready]


def hear_all(children: Sequence[Child], timeout_s: float = 60.0) -> list[Any]:
    """What each of them says next. Raises as `hear` does, as soon as one dies or all that are left say nothing."""
    said: dict[Child, Any] = {}
    while left := [child for child in children if child not in said]:
        ready = speaking(left, timeout_s)
        if not ready:
            raise TimeoutError("\n".join(child.silence(timeout_s) for child in left))
        said |= {child: child.hear() for child in ready}
    return [said[child] for child in children]


def orders(link: Connection) -> Iterator[Any]:
    """For the child: what the parent says, until it says that this is the end or is gone."""
    while True:
        try:
            order = link.recv()
        except (EOFError, ConnectionResetError):
            return
        if order == END:
            return
        yield order


def wait_for_end(link: Connection) -> None:
    """For a child that takes no orders: until the parent ends it or is gone."""
    for _ in orders(link):
        pass


class _Forked:
    """A process forked from a server that has imported what it needs."""

    def __init__(self, main: str, arguments: Sequence[object], link: Connection, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, main.partition(":")[0]])  # the first start decides, which costs time at most
        self._process: BaseProcess = context.Process(target=_run, args=(main, arguments, link, str(log)), daemon=True)
        self._process.start()
        assert self._process.pid is not None, "the process has been started"
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def wait(self, timeout_s: float | None) -> int | None:
        """Its exit code; None when it still lives."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # its server has reaped it already
            os.kill(self.pid, number)

    def close(self) -> None:
        self._process.close()


class _Executed:
    """A process of another interpreter, and those it starts."""

    def __init__(self, python: str, environment: Mapping[str, str] | None, link: Connection, log: Path) -> None:
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [python, "-m", __name__, str(link.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[link.fileno()],
                start_new_session=True,
            )
        self.pid, self.sentinel = self._process.pid, os.pidfd_open(self._process.pid)

    def wait(self, timeout_s: float | None) -> int | None:
        """Its exit code; None when it still lives."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)  # those it has started may live on
        os.close(self.sentinel)


def _temporary_log() -> Path:
    descriptor, path = tempfile.mkstemp(prefix="peerload-", suffix=".log")
    os.close(descriptor)
    return Path(path)


def _run(main: str, arguments: Sequence[object], link: Connection, log: str) -> None:
    """In a forked child: output goes to the log, Ctrl-C is left to the parent."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _named(main)(*arguments, link)


def _named(main: str) -> Callable[..., object]:
    function: Callable[..., object] = pkgutil.resolve_name(main)
    return function


def _execute(descriptor: int) -> None:
    """In another interpreter."""
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as link:
        main, arguments = link.recv()
        _named(main)(*arguments, link)


if __name__ == "__main__":
    _execute(int(sys.argv[1]))
