"""`peerload coordinator`: its addresses and its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from coordinators import answer


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peerload", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["coordinator", "--listen", "nonsense"], "--listen 'nonsense' is no HOST:PORT"),
        (["coordinator", "--listen", ":7070"], "--listen ':7070' is no HOST:PORT"),
        (
            ["coordinator", "--listen", "127.0.0.1:999999"],
            "--listen '127.0.0.1:999999': the port must be a number from 0 to 65535",
        ),
        (["coordinator", "--listen", "127.0.0.1:x"], "--listen '127.0.0.1:x': the port must be a number from 0 to 65535"),
        (["ls", "--url", ""], "the coordinator's url '' is no HOST:PORT"),
        (["ls", "--url", "here"], "the coordinator's url 'here' is no HOST:PORT"),
        (["ls", "--url", "127.0.0.1:0"], "the coordinator's url '127.0.0.1:0': the port must be a number from 1 to 65535"),
    ],
)
def test_a_senseless_address_is_one_clear_line(words: list[str], said: str, tmp_path: Path) -> None:
    outcome = command(*words, XDG_STATE_HOME=str(tmp_path))
    assert outcome.returncode == 2
    first, *rest = outcome.stderr.splitlines()
    assert first == f"peerload: ConfigError: {said}"
    assert all(line.startswith("  next: ") for line in rest)
    assert len(rest) <= 1


@pytest.mark.parametrize(("listen", "why"), [("192.0.2.1:7070", "Cannot assign"), ("[::1::2]:7070", "")])
def test_an_address_that_is_not_ours_is_one_clear_line(listen: str, why: str, tmp_path: Path) -> None:
    outcome = command("coordinator", "--listen", listen, "--store", "memory")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(f"peerload: HostError: can't listen on {listen}: {why}")
    assert len(outcome.stderr.splitlines()) == 2


def test_the_command_keeps_its_store_in_a_file_unless_told_otherwise(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "peerload", "coordinator", "--listen", "127.0.0.1:0"]
    path = tmp_path / "state" / "peerload" / "coordinator.db"
    with subprocess.Popen(
        words,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        try:
            said = answer(running)
            assert f"store sqlite:{path}" in said
            assert path.exists()
        finally:
            running.kill()
    text = " ".join(command("coordinator", "--help").stdout.split())
    assert "memory forgets leases and votes" in text
    assert "~/.local/state" in text
