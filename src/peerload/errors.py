"""What can go wrong, whose fault it is, and what to do next.

    PeerloadError                 exit 1
    |-- ConfigError               exit 2   the operator's words make no sense
    |-- ManifestError             exit 2   a layout or binding contradicts itself; the field is named
    |-- LayoutError               exit 3   an engine's parameters can't be described; the parameter is named
    |-- PlanError                 exit 3   no plan exists; holes and refusals are named, nothing was written
    |-- SourceError               exit 4   one source failed; the rest of the plan can go elsewhere
    |   |-- SourceUnreachable              it could not be connected to
    |   |-- SourceLost                     it went away while being read
    |   |   `-- SourceStalled              it stood still for too long, and may go on
    |   `-- SourceStale                    it holds other weights than it announced
    |-- SourcesExhausted          exit 4   no source left, and no fallback
    |-- CommitError               exit 4   another rank of this instance failed, so none serves
    |-- DeadlineExceeded          exit 4   the operator's time is up
    |-- VerifyError               exit 5   bytes arrived that are not the seed's bytes
    |-- HostError                 exit 1   this host forbids or lacks something
    `-- CoordinatorError          exit 1   the coordinator can't be reached or refuses
        |-- LeaseUnknown                   it holds no such lease (expired, or it restarted): announce again
        `-- LeaseSuperseded                a newer generation took this rank's place: stop offering

Every error says in `str(error)` what happened; `next_step`, when there is one, says what to do about it. Both are `printable`,
although names and reasons in them may be a peer's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

#: Control characters but for tab and newline, what changes the direction of text, other line ends, lone surrogates.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """The text, in which what a terminal or a log may take for a command stands as its number in hexadecimal."""
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\x80" else f"\\u{ord(found[0]):04x}", text)


def listed(rows: Sequence[object]) -> str:
    """The first ten, a line each, for a message; how many more there are."""
    more = f"\n  ... and {len(rows) - 10} more" if len(rows) > 10 else ""
    return "\n".join(f"  {row}" for row in rows[:10]) + more


def reason_of(error: BaseException) -> str:
    """Why something failed, in words for another process or a log line."""
    return error.message if isinstance(error, PeerloadError) else f"{type(error).__name__}: {error}"


class Hole(NamedTuple):
    """A wanted box that nobody can supply. `box` in global element coordinates, `rank` of the target."""

    tensor: str
    rank: int
    box: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} wants {self.tensor}{self.box}: {self.reason}"


class Refusal(NamedTuple):
    """An offer (or a part of one) that was not used, and why."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class PeerloadError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code: ClassVar[int] = 1
    #: True when the target's buffers may hold a mixture of old and new bytes.
    dirty: ClassVar[bool] = False

    def __init__(self, message: str, *, next_step: str = "") -> None:
        self.message = printable(message)
        self.next_step = printable(next_step)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}" if self.next_step else self.message


class ConfigError(PeerloadError):
    exit_code = 2


class ManifestError(PeerloadError):
    """`field` is the dotted path of the offending field, as in `layout.pieces[3].stop`."""

    exit_code = 2

    def __init__(self, field: str, problem: str, *, next_step: str = "") -> None:
        super().__init__(f"{field}: {problem}", next_step=next_step)
        self.field = field
        self.problem = problem


class LayoutError(PeerloadError):
    exit_code = 3


class PlanError(PeerloadError):
    exit_code = 3

    def __init__(
        self, message: str, *, holes: tuple[Hole, ...] = (), refusals: tuple[Refusal, ...] = (), next_step: str = ""
    ) -> None:
        lines = [message]
        for title, rows in (("hole", holes), ("refused", refusals)):
            lines += [f"  {title}: {row}" for row in rows[:5]]
            lines += [f"  ... and {len(rows) - 5} more" for _ in rows[5:6]]
        super().__init__("\n".join(lines), next_step=next_step)
        self.holes = holes
        self.refusals = refusals


class SourceError(PeerloadError):
    """`source` names the peer, as in `instance/rank 1`."""

    exit_code = 4
    dirty = True

    def __init__(self, source: str, problem: str, *, next_step: str = "") -> None:
        super().__init__(f"source {source}: {problem}", next_step=next_step)
        self.source = source
        self.problem = problem


class SourceUnreachable(SourceError):
    dirty = False


class SourceLost(SourceError):
    pass


class SourceStalled(SourceLost):
    pass


class SourceStale(SourceError):
    pass


class SourcesExhausted(PeerloadError):
    exit_code = 4
    dirty = True


class CommitError(PeerloadError):
    exit_code = 4
    dirty = True


class DeadlineExceeded(PeerloadError):
    exit_code = 4
    dirty = True


class VerifyError(PeerloadError):
    exit_code = 5
    dirty = True


class HostError(PeerloadError):
    pass


class CoordinatorError(PeerloadError):
    pass


class LeaseUnknown(CoordinatorError):
    pass


class LeaseSuperseded(CoordinatorError):
    pass
