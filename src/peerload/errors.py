"""What can go wrong, whose fault it is, and what to do next.

    PeerloadError                 exit 1
    |-- ConfigError               exit 2   the operator's words make no sense
    |-- ManifestError             exit 2   a layout or binding contradicts itself; the field is named
    |-- LayoutError               exit 3   an engine's parameters can't be described; the parameter is named
    |-- PlanError                 exit 3   no plan exists; holes and refusals are named, nothing was written
    |-- SourceError               exit 4   one source failed; the rest of the plan can go elsewhere
    |   |-- SourceUnreachable              it could not be connected to
    |   |-- SourceLost                     it went away while being read
    |   `-- SourceStale                    it holds other weights than it announced
    |-- SourcesExhausted          exit 4   no source left, and no fallback
    |-- CommitError               exit 4   another rank of this instance failed, so none serves
    |-- DeadlineExceeded          exit 4   the operator's time is up
    |-- VerifyError               exit 5   bytes arrived that are not the seed's bytes
    |-- HostError                 exit 1   this host forbids or lacks something
    `-- CoordinatorError          exit 1   the coordinator can't be reached or refuses

Every error says in `str(error)` what happened; `next_step`, when there is one, says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class PeerloadError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code: ClassVar[int] = 1
    #: True when the target's buffers may hold a mixture of old and new bytes.
    dirty: ClassVar[bool] = False

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

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
