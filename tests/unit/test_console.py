"""What peers say is printed and logged without control characters."""

from __future__ import annotations

import io
import logging

import pytest

from peerload.cli import _Formatter
from peerload.console import Console
from peerload.errors import CommitError, ManifestError, PlanError, Refusal, printable
from peerload.manifest import ModelKey, SourceId

EVIL = "m\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp\u2028\ud800[bold]x[/bold]"
HARMLESS = r"m\x1b[2J\x1b]0;owned\x07\x0d\u009b31m\u202egnp\u2028\ud800[bold]x[/bold]"


def test_printable() -> None:
    assert printable(EVIL) == HARMLESS
    assert printable("na\u00efve \u6f22\u5b57 \U0001f600\ttab\nline") == "na\u00efve \u6f22\u5b57 \U0001f600\ttab\nline"


def test_errors_are_printable() -> None:
    error = PlanError(EVIL, refusals=(Refusal(EVIL, EVIL),), next_step=EVIL)
    assert str(error).startswith(HARMLESS)
    assert not set("\x1b\r\x07\x9b\u202e\ud800") & set(f"{error} {error.message} {error.next_step} {error.args}")


def test_names_have_no_control_characters() -> None:
    for name in (EVIL, "two\nlines", "a\ttab"):
        for make in (
            lambda n: ModelKey(n),
            lambda n: ModelKey("m", n),
            lambda n: SourceId(n, 0, "a"),
            lambda n: SourceId("i", 0, n),
        ):
            with pytest.raises(ManifestError, match="has a control character"):
                make(name)


def test_nothing_a_peer_says_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say(EVIL)
    console.text(EVIL)
    console.table(EVIL, (EVIL,), [(EVIL,), ("two\nlines",)], caption=EVIL)
    console.fail(CommitError(f"rank 1 aborted: {EVIL}\npeerload: all is well", next_step=EVIL))
    out, err = capsys.readouterr()
    assert not set("\x1b\r\x07\x9b\u202e\u2028") & set(out + err)
    assert HARMLESS in out
    assert r"two\nlines" in out
    assert "\n  peerload: all is well\n" in err


def test_a_log_record_begins_where_it_seems_to() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("%(levelname)s %(message)s"))
    handler.handle(logging.makeLogRecord({"msg": "left out %s", "args": (f"{EVIL}\nINFO all is well",), "levelname": "WARNING"}))
    assert stream.getvalue() == f"WARNING left out {HARMLESS}\n  INFO all is well\n"
