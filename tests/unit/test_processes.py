"""The one way to start and speak to a process: forked, and as another interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from peerload.testing.processes import TAIL_LINES, Child, ChildDied, close_all, hear_all, orders, wait_for_end

ECHO = f"{__name__}:echo"


def echo(link: Connection) -> None:
    """Answer every order; some are special."""
    link.send("ready")
    for order in orders(link):
        if order == "fail":
            print("\n".join(f"line {i}" for i in range(100)), flush=True)
            raise RuntimeError("it had to fail")
        if order == "where":
            link.send((os.getpid(), os.environ.get("MARK")))
        else:
            link.send(f"did {order}")


def stubborn(link: Connection) -> None:
    """Never ends by itself."""
    link.send("ready")
    time.sleep(600)


@pytest.fixture(params=["forked", "executed"])
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    other = {"python": sys.executable, "environment": {**os.environ, "PYTHONPATH": path, "MARK": "other"}}
    with Child(ECHO, name="the echo", **(other if request.param == "executed" else {})) as running:
        assert running.hear() == "ready"
        yield running


def test_it_answers_what_it_is_asked(child: Child) -> None:
    assert [child.ask("one"), child.ask("two")] == ["did one", "did two"]
    pid, _ = child.ask("where")
    assert pid == child.pid != os.getpid()


def test_another_interpreter_has_an_environment_and_a_group_of_its_own(child: Child) -> None:
    _, mark = child.ask("where")
    assert (mark == "other") == (os.getpgid(child.pid) == child.pid)


def test_a_death_is_an_error_with_the_end_of_its_log(child: Child) -> None:
    with pytest.raises(ChildDied, match="the echo ended with exit code 1") as died:
        child.ask("fail")
    text = str(died.value)
    assert text.endswith("RuntimeError: it had to fail")
    assert "line 99" in text
    assert "line 0\n" not in text
    assert len(text.splitlines()) == TAIL_LINES + 1
    assert "line 0\n" in child.log
    assert not child.is_alive


def test_a_kill_is_a_death_by_signal(child: Child) -> None:
    child.kill()
    assert not child.is_alive
    with pytest.raises(ChildDied) as died:
        child.hear()
    assert died.value.exit_code == -signal.SIGKILL
    child.kill()


def test_while_it_is_stopped_it_says_nothing(child: Child) -> None:
    child.stop()
    child.tell("one")
    with pytest.raises(TimeoutError, match=rf"the echo \(pid {child.pid}\) says nothing"):
        child.hear(0.3)
    assert child.is_alive
    child.go_on()
    assert child.hear() == "did one"


def test_a_stopped_child_can_be_closed(child: Child) -> None:
    child.stop()
    child.close()
    assert not child.is_alive
    child.close()


def test_a_child_that_does_not_end_is_killed() -> None:
    with Child(f"{__name__}:stubborn", grace_s=0.2) as running:
        running.hear()
        pid = running.pid
    assert not Path(f"/proc/{pid}").exists()


def test_several_are_heard_and_closed_together() -> None:
    children = [Child(ECHO) for _ in range(3)]
    assert hear_all(children) == ["ready"] * 3
    close_all(children)
    assert [child.is_alive for child in children] == [False] * 3


def test_what_it_printed_is_kept_where_asked_and_else_removed(tmp_path: Path) -> None:
    with Child(ECHO, log=tmp_path / "log") as kept, Child(ECHO) as other:
        hear_all([kept, other])
        with pytest.raises(ChildDied):
            kept.ask("fail")
        temporary = other._log
    assert "it had to fail" in (tmp_path / "log").read_text()
    assert not temporary.exists()


def test_an_error_of_the_block_says_what_the_child_printed() -> None:
    def block() -> None:
        with Child(ECHO, name="the echo") as running:
            running.hear()
            with suppress(ChildDied):
                running.ask("fail")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        block()
    (note,) = caught.value.__notes__
    assert note.startswith("the echo printed:\n")
    assert note.endswith("it had to fail")


def test_the_grace_of_several_runs_at_the_same_time() -> None:
    children = [Child(f"{__name__}:stubborn", grace_s=2.0) for _ in range(3)]
    hear_all(children)
    begun_s = time.monotonic()
    close_all(children)
    assert time.monotonic() - begun_s < 5


def test_children_that_end_while_they_are_closed_are_closed() -> None:
    for _ in range(40):
        children = [Child(ECHO) for _ in range(4)]
        hear_all(children)
        close_all(children)
        assert not any(child.is_alive for child in children)


def parent(link: Connection) -> None:
    """Starts a process that outlives it."""
    link.send(subprocess.Popen(["sleep", "600"]).pid)
    wait_for_end(link)


def test_what_a_killed_child_has_started_ends_with_the_block() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with Child(f"{__name__}:parent", python=sys.executable, environment=environment) as child:
        started = child.hear()
        child_only = os.pidfd_open(child.pid)
        signal.pidfd_send_signal(child_only, signal.SIGKILL)
        os.close(child_only)
        with pytest.raises(ChildDied):
            child.hear()
    until_s = time.monotonic() + 5
    while lives(started):
        assert time.monotonic() < until_s
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """One that has ended and that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_that_never_gets_to_its_log_is_said_to_have_died(tmp_path: Path) -> None:
    with Child("no_such_module:main", log=tmp_path / "child.log") as child, pytest.raises(ChildDied):
        child.hear()
