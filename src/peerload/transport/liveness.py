"""Whether a source of this host still lives and vouches: for transports that would go on reading a dead one's memory."""

from __future__ import annotations

import os
import select
from typing import Final, Protocol

from ..deadline import Deadline
from ..errors import SourceLost, SourceUnreachable
from .handover import PATIENCE_S, Connection
from .host import boot_id, pid_namespace, start_time


class Told(Protocol):
    """Which process described itself, and where its `Handover` listens."""

    @property
    def host(self) -> str: ...
    @property
    def pid_namespace(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    @property
    def socket(self) -> str: ...
    @property
    def token(self) -> str: ...


class Liveness:
    """A connection to the process that gave `told`. SourceUnreachable says why there is none."""

    def __init__(self, told: Told, source: str) -> None:
        self._source: Final = source
        self._process = -1
        if told.host != boot_id():
            raise SourceUnreachable(source, "is on another host", next_step="offer transport nixl on both sides")
        try:
            self._connection = Connection(told.socket, told.token, Deadline.after(PATIENCE_S))
        except OSError as error:
            raise SourceUnreachable(source, f"its socket does not answer ({error.strerror or error})") from error
        try:
            self._connection.receive()
            self._identify(told)
        except ProcessLookupError as error:
            self.close()
            raise SourceUnreachable(source, f"process {told.pid} has ended") from error
        except (OSError, ValueError, KeyError) as error:
            self.close()
            raise SourceUnreachable(source, f"does not answer for its memory ({error})") from error
        except BaseException:
            self.close()
            raise

    def _identify(self, told: Told) -> None:
        """The kernel says who holds the socket; a description that names somebody else is an old one."""
        pid = self._connection.pid  # 0 if it has none here
        self.same_process = pid == os.getpid()
        if told.pid_namespace == pid_namespace() and (pid != told.pid or start_time(pid) != told.start_time):
            raise SourceUnreachable(self._source, f"process {told.pid} is no longer the one that described itself")
        if pid:  # the connection alone is no proof of life: a forked child of the peer may hold it
            self._process = os.pidfd_open(pid)

    def check(self) -> None:
        """Raise SourceLost unless the source still vouches for its memory."""
        ended = select.poll()
        if self._process >= 0:
            ended.register(self._process, select.POLLIN)
        if ended.poll(0) or not self._connection.alive():
            raise SourceLost(self._source, "it closed its transport or died", next_step="plan the rest from other sources")

    def close(self) -> None:
        """Safe to call twice."""
        self._connection.close()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1
