"""Handing open descriptors to processes of the same user on the same host, over a unix socket.

The connection stays open for as long as the giver vouches for its memory: its end is how a reader learns, within
microseconds and whatever the giver died of, that the giver is gone.
"""

from __future__ import annotations

import array
import errno
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Final

from ..deadline import Deadline

#: Descriptors in one message; the kernel allows 253 (SCM_MAX_FD).
FDS_IN_MESSAGE: Final = 200
#: How long either side waits for the other's next message, seconds.
PATIENCE_S: Final = 5.0


class Handover:
    """Serves descriptors in a thread of its own. `offered()` is asked at each connection for descriptors by number; they
    are closed after they were sent. Only who knows `token` and is the same user (or root) is served."""

    def __init__(self, offered: Callable[[], dict[int, int]]) -> None:
        self._offered = offered
        self.token: Final = secrets.token_hex(16)
        self.address: Final = f"peerload-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(64)
        self._stop, self._stopped = socket.socketpair()
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
            served: set[socket.socket] = set()
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stopped:
                        for peer in served:
                            peer.close()
                        return
                    if key.fileobj is self._listener:
                        peer, _ = self._listener.accept()
                        peer.settimeout(PATIENCE_S)
                        served.add(peer)
                        selector.register(peer, EVENT_READ)
                        continue
                    peer = next(p for p in served if p is key.fileobj)
                    if not self._answer(peer):
                        selector.unregister(peer)
                        served.discard(peer)
                        peer.close()

    def _answer(self, peer: socket.socket) -> bool:
        """False when the connection is to be closed."""
        try:
            said = peer.recv(64)
            if not secrets.compare_digest(said, self.token.encode()) or credentials(peer)[1] not in (os.geteuid(), 0):
                return False
            descriptors = self._offered()
            try:
                numbers = list(descriptors)
                for i in range(0, max(1, len(numbers)), FDS_IN_MESSAGE):
                    part = numbers[i : i + FDS_IN_MESSAGE]
                    message = {"numbers": part, "more": i + FDS_IN_MESSAGE < len(numbers)}
                    socket.send_fds(peer, [json.dumps(message).encode()], [descriptors[n] for n in part])
            finally:
                for fd in descriptors.values():
                    os.close(fd)
        except OSError:
            return False
        return True


class Connection:
    """The reader's end. Raises OSError (refused, timed out) or PermissionError (not served)."""

    def __init__(self, address: str, token: str, deadline: Deadline) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(deadline.remaining_s)
            self._socket.connect(f"\0{address}")
            self.pid, self.uid = credentials(self._socket)
            self._socket.send(token.encode())
        except BaseException:
            self._socket.close()
            raise

    def receive(self) -> dict[int, int]:
        """The descriptors by number, which are the caller's from now on. Call once."""
        descriptors: dict[int, int] = {}
        more = True
        while more:
            data, ancillary, _, _ = self._socket.recvmsg(8192, socket.CMSG_SPACE(4 * FDS_IN_MESSAGE), socket.MSG_CMSG_CLOEXEC)
            arrived = array.array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    arrived.frombytes(payload[: len(payload) // 4 * 4])
            if not data:
                for fd in descriptors.values():
                    os.close(fd)
                raise PermissionError(errno.EACCES, "it refused the connection")
            message = json.loads(data)
            descriptors.update(zip(message["numbers"], arrived, strict=True))
            more = message["more"]
        self._socket.setblocking(False)
        return descriptors

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


def credentials(peer: socket.socket) -> tuple[int, int]:
    """Process id (0 when it has none in our namespace) and user id of the other end, on the kernel's word."""
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid
