"""Whether a source of this host still lives and vouches: for transports that would go on reading a dead one's memory."""

from __future__ import annotations

import os
import select
from collections.abc import Collection
from typing import Final

from ..deadline import Deadline
from ..errors import SourceLost, SourceUnreachable
from .descriptions import Process
from .descriptors import Connection
from .process import boot_id, pid_namespace, start_time

#: What to do about a source that only its own host can read.
ELSEWHERE: Final = (
    "start a seed on this host or allow fallback=disk; weights in CPU memory can come from another host with transport nixl on "
    "both sides"
)


class Liveness:
    """A connection to the process that gave `told`. Raises SourceUnreachable with the reason, by `deadline` at the latest.

    files: descriptors of the `wanted` numbers that the source handed over; the caller's to close. pid: its process id here, 0 if
    it has none."""

    def __init__(self, told: Process, source: str, deadline: Deadline, wanted: Collection[int] = ()) -> None:
        self._source: Final = source
        self._process = -1
        self.files: dict[int, int] = {}
        if told.host != boot_id():
            raise SourceUnreachable(source, "is on another host", next_step=ELSEWHERE)
        try:
            self._connection = Connection(told.socket, told.token, deadline)
        except OSError as error:
            raise SourceUnreachable(
                source,
                f"its socket does not answer ({error.strerror or error})",
                next_step="both processes need the same network namespace (hostNetwork) unless the seed has ended",
            ) from error
        try:
            self.files = self._connection.receive(wanted)
            self._identify(told)
        except ProcessLookupError as error:
            self._give_up()
            raise SourceUnreachable(source, f"process {told.pid} has ended") from error
        except (OSError, ValueError) as error:
            self._give_up()
            raise SourceUnreachable(source, f"does not hand over its memory ({error})") from error
        except BaseException:
            self._give_up()
            raise

    def _identify(self, told: Process) -> None:
        """The kernel says who holds the socket; a description that names somebody else is an old one."""
        self.pid = self._connection.pid
        if self._connection.uid not in (os.geteuid(), 0) and os.geteuid() != 0:
            raise SourceUnreachable(self._source, f"belongs to another user ({self._connection.uid})")
        if told.pid_namespace == pid_namespace() and (self.pid != told.pid or start_time(self.pid) != told.start_time):
            raise SourceUnreachable(self._source, f"process {told.pid} is no longer the one that described itself")
        if self.pid:  # the connection alone is no proof of life: a forked child of the peer may hold it
            self._process = os.pidfd_open(self.pid)

    def check(self) -> None:
        """Raise SourceLost unless the source still vouches for its memory. Mapped memory outlives its owner; trust doesn't."""
        ended = select.poll()
        if self._process >= 0:
            ended.register(self._process, select.POLLIN)
        if ended.poll(0) or not self._connection.alive():
            raise SourceLost(self._source, "it closed its transport or died", next_step="plan the rest from other sources")

    def close(self) -> None:
        """Safe to call twice. Leaves `files` open."""
        self._connection.close()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _give_up(self) -> None:
        self.close()
        for fd in self.files.values():
            os.close(fd)
