"""Layouts within the deadline, and how many ranks there may be."""

from __future__ import annotations

import itertools
import signal
import time

import pytest

from peerload.commands.options import parse_parallel
from peerload.commands.ranks import interrupted
from peerload.deadline import Deadline
from peerload.errors import ConfigError, DeadlineExceeded
from peerload.manifest import Parallel


def stubborn() -> None:
    """An engine that takes every error for one of its own, for a while."""
    for attempt in itertools.count():
        try:
            while True:
                time.sleep(0.001)
        except DeadlineExceeded as error:
            if attempt == 3:
                raise ValueError("no such layer") from error


def test_code_that_swallows_errors_is_left_at_the_deadline() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(DeadlineExceeded, match="the deadline passed while building"),
        interrupted(Deadline.after(0.05), "building"),
    ):
        stubborn()
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_errors_and_long_deadlines_pass() -> None:
    for seconds in (60.0, 1e300, float("inf")):
        with pytest.raises(KeyError, match="x"), interrupted(Deadline.after(seconds), "building"):
            raise KeyError("x")
        with interrupted(Deadline.after(seconds), "building"):
            pass


def test_code_that_ends_too_late_is_too_late() -> None:
    with pytest.raises(DeadlineExceeded), interrupted(Deadline.after(0.0), "building"):
        pass


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "tp=0", "tp=-1", "tp=\u00b2", "tp=" + "9" * 5000, "tp=1,tp=1", "dp=2", "tp=2,"]
)
def test_what_is_no_parallel_layout(text: str) -> None:
    with pytest.raises(ConfigError, match="is no parallel layout"):
        parse_parallel(text)


def test_absurd_sizes_are_refused() -> None:
    assert parse_parallel("tp=8,pp=128,ep=8") == Parallel(8, 128, 8)
    for text in ("tp=100000", "tp=64,pp=64", "ep=1025"):
        with pytest.raises(ConfigError, match="too many ranks, at most 1024 are possible"):
            parse_parallel(text)
