"""Handing open descriptors to processes of the same user on the same host, over a unix socket.

The connection stays open for as long as the giver vouches for its memory: its end is how a reader learns, within
microseconds and whatever the giver died of, that the giver is gone.
"""

from __future__ import annotations

import array
import errno
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Final

from ..deadline import Deadline

#: Descriptors in one message; the kernel allows 253 (SCM_MAX_FD).
FDS_IN_MESSAGE: Final = 200
#: Messages that a reader takes from one giver.
MESSAGES: Final = 64
MESSAGE_NBYTES: Final = 8192
#: How long a reader may take to say who it is and to take what it asked for, seconds.
PATIENCE_S: Final = 5.0
#: Readers connected at the same time.
SERVED: Final = 256
#: After the host has refused a connection for want of something, accept none for so long, seconds.
PAUSE_S: Final = 0.2

log = logging.getLogger(__name__)


class _Connected:
    """A connected reader as its giver sees it. `talk` does its part until it has to wait, and says for what; when it is over,
    nothing more is due, and the connection stays only to show that we live."""

    def __init__(self, peer: socket.socket, talk: Generator[int, None, None]) -> None:
        self.socket, self.talk = peer, talk
        self.until_s = time.monotonic() + PATIENCE_S
        self.content = False

    def close(self) -> None:
        self.talk.close()
        self.socket.close()


class Handover:
    """Serves descriptors in a thread of its own. `offered()` is asked at each connection for descriptors by number; they
    are closed after they were sent. Only who knows `token` and is the same user (or root) is served. No reader, however slow or
    silent, holds up another one; a host that runs out of descriptors delays new readers only."""

    def __init__(self, offered: Callable[[], dict[int, int]]) -> None:
        self._offered = offered
        self.token: Final = secrets.token_hex(16)
        self.address: Final = f"peerload-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._stop, self._stopped = socket.socketpair()
        self._readers: dict[int, _Connected] = {}  # by descriptor
        self._resume_s = 0.0  # when to accept again
        self._told = False
        self._thread = threading.Thread(target=self._serve, name="peerload-handover", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Disconnect everybody. Safe to call twice."""
        with suppress(OSError):
            self._stop.send(b".")
        self._thread.join()
        self._stop.close()

    def _serve(self) -> None:
        with DefaultSelector() as selector, self._listener, self._stopped:
            selector.register(self._stopped, EVENT_READ)
            selector.register(self._listener, EVENT_READ)
            while True:
                for key, _ in selector.select(self._next_s()):
                    if key.fileobj is self._stopped:
                        for each in self._readers.values():
                            each.close()
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        reader = self._readers.get(key.fd)
                        if reader is not None and reader.socket is key.fileobj:  # neither dropped nor replaced in this turn
                            self._go_on(selector, reader)
                self._tidy(selector)

    def _next_s(self) -> float | None:
        """Seconds until something is due that no event announces."""
        due = [reader.until_s for reader in self._readers.values() if not reader.content]
        due += [self._resume_s] if self._resume_s else []
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _tidy(self, selector: DefaultSelector) -> None:
        """Drop who had time enough, and accept again after a pause."""
        now = time.monotonic()
        for reader in [r for r in self._readers.values() if not r.content and r.until_s <= now]:
            self._drop(selector, reader)
        if self._resume_s and self._resume_s <= now:
            self._resume_s = 0.0
            selector.register(self._listener, EVENT_READ)

    def _accept(self, selector: DefaultSelector) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED):
                if not self._told:
                    log.warning("peerload: no new reader can connect for now: %s; raise ulimit -n", error.strerror)
                self._told = True
                self._resume_s = time.monotonic() + PAUSE_S
                selector.unregister(self._listener)
            return
        peer.setblocking(False)
        reader = _Connected(peer, self._talk(peer))
        if credentials(peer)[1] not in (os.geteuid(), 0) or not self._room(selector):
            reader.close()
            return
        self._readers[peer.fileno()] = reader
        selector.register(peer, EVENT_READ)
        self._go_on(selector, reader)

    def _room(self, selector: DefaultSelector) -> bool:
        """For one more reader, if need be in place of one that hasn't said yet who it is."""
        if len(self._readers) < SERVED:
            return True
        oldest = min((r for r in self._readers.values() if not r.content), key=lambda r: r.until_s, default=None)
        if oldest is not None:
            self._drop(selector, oldest)
        return oldest is not None

    def _go_on(self, selector: DefaultSelector, reader: _Connected) -> None:
        """An event has come for `reader`; one that has all it asked for has nothing to say but that it leaves."""
        if reader.content:
            self._drop(selector, reader)
            return
        try:
            selector.modify(reader.socket, next(reader.talk))
        except StopIteration:
            reader.content = True
            selector.modify(reader.socket, EVENT_READ)
        except OSError:
            self._drop(selector, reader)

    def _drop(self, selector: DefaultSelector, reader: _Connected) -> None:
        del self._readers[reader.socket.fileno()]
        selector.unregister(reader.socket)
        reader.close()

    def _talk(self, peer: socket.socket) -> Generator[int, None, None]:
        """Hear the token and send what is offered; yields the event to wait for. Raises OSError to end the connection."""
        while True:
            with suppress(BlockingIOError):
                said = peer.recv(64)
                break
            yield EVENT_READ
        if not secrets.compare_digest(said, self.token.encode()):
            raise PermissionError(errno.EACCES, "a stranger")
        descriptors = self._offered()
        try:
            numbers = list(descriptors)
            for i in range(0, max(1, len(numbers)), FDS_IN_MESSAGE):
                part = numbers[i : i + FDS_IN_MESSAGE]
                message = json.dumps({"numbers": part, "more": i + FDS_IN_MESSAGE < len(numbers)}).encode()
                while True:
                    with suppress(BlockingIOError):
                        socket.send_fds(peer, [message], [descriptors[n] for n in part])
                        break
                    yield EVENT_WRITE
        finally:
            for fd in descriptors.values():
                os.close(fd)


class Connection:
    """The reader's end. Raises OSError (refused, timed out) or PermissionError (not served). Both calls end by `deadline`."""

    def __init__(self, address: str, token: str, deadline: Deadline) -> None:
        self._deadline = deadline
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connect(f"\0{address}")
            self.pid, self.uid = credentials(self._socket)
            self._wait_at_most()
            self._socket.send(token.encode())
        except BaseException:
            self._socket.close()
            raise

    def receive(self, wanted: Collection[int]) -> dict[int, int]:
        """The descriptors of the `wanted` numbers that the giver has, which are the caller's from now on; others are closed.
        Raises ValueError for what is no answer. Call once."""
        kept: dict[int, int] = {}
        try:
            self._receive_all(wanted, kept)
        except BaseException:
            for fd in kept.values():
                os.close(fd)
            raise
        self._socket.setblocking(False)
        return kept

    def _receive_all(self, wanted: Collection[int], kept: dict[int, int]) -> None:
        for _ in range(MESSAGES):
            self._wait_at_most()
            if not self._receive_one(wanted, kept):
                return
        raise ValueError(f"more than {MESSAGES} messages")

    def _receive_one(self, wanted: Collection[int], kept: dict[int, int]) -> bool:
        """Whether another message will come. The descriptors of this one are in `kept`, or closed."""
        # Not socket.recv_fds: it ignores its flags before Python 3.13, and descriptors would leak into children.
        data, ancillary, _, _ = self._socket.recvmsg(
            MESSAGE_NBYTES, socket.CMSG_SPACE(4 * FDS_IN_MESSAGE), socket.MSG_CMSG_CLOEXEC
        )
        arrived = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                arrived.frombytes(payload[: len(payload) // 4 * 4])
        spare = set(arrived)
        try:
            numbers, more = _message(data, len(arrived))
            for number, fd in zip(numbers, arrived, strict=True):
                if number in wanted and number not in kept:
                    kept[number] = fd
                    spare.remove(fd)
        finally:
            for fd in spare:
                os.close(fd)
        return more

    def alive(self) -> bool:
        """Whether the giver still holds its end."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()

    def _connect(self, address: str) -> None:
        while True:
            self._wait_at_most()
            try:
                self._socket.connect(address)
            except BlockingIOError:  # its queue is full
                time.sleep(min(0.01, self._deadline.remaining_s))
            else:
                return

    def _wait_at_most(self) -> None:
        left_s = self._deadline.remaining_s
        if left_s == 0:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
        self._socket.settimeout(left_s)


def _message(data: bytes, arrived: int) -> tuple[list[int], bool]:
    """Numbers of the descriptors that `arrived` with a message, and whether another one follows."""
    if not data:
        raise PermissionError(errno.EACCES, "it refused the connection")
    try:
        told = json.loads(data.decode())
    except RecursionError:
        raise ValueError("its message is nested too deep") from None
    if type(told) is not dict or type(told.get("numbers")) is not list or type(told.get("more")) is not bool:
        raise ValueError("its message makes no sense")
    numbers: list[int] = told["numbers"]
    if not all(type(number) is int for number in numbers):
        raise ValueError("its message numbers no descriptors")
    if len(numbers) != arrived:
        raise ValueError(f"{arrived} of {len(numbers)} descriptors arrived; ulimit -n may be too low")
    return numbers, told["more"]


def credentials(peer: socket.socket) -> tuple[int, int]:
    """Process id (0 when it has none in our namespace) and user id of the other end, on the kernel's word."""
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid
