"""The coordinator as a process: `Core` behind gRPC.

Threads: gRPC's pool has room for `core.WAITERS` calls that wait (Watch, Agree) and SPARE that don't. Whoever would be
one waiter too many gets what there is to say at once and asks again, so that no number of them starves a renewal. One
more thread lets time pass.
"""

# ruff: noqa: N802, ARG002 - names and arguments of the methods are the service's

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Final, NoReturn, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..directory import Aborted, Agreed, Change, Outcome, Round
from ..errors import HostError, LeaseSuperseded, LeaseUnknown, ManifestError, PeerloadError
from . import codec
from ._generated import peerload_pb2 as pb
from ._generated import peerload_pb2_grpc as pb_grpc
from .core import WAITERS, BlobMissing, Core
from .store import Store, Vote

log = logging.getLogger(__name__)

SPARE: Final = 32
#: Longest that one Agree call waits, seconds: short enough for every proxy in between.
MAX_WAIT_S: Final = 30.0
_TICK_S: Final = 0.5
#: gRPC sends details as a header, of 8 KiB at most with everything else.
_MAX_DETAILS: Final = 2000
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Directory"].full_name
_CHANGES: Final = {
    Change.WITHDRAWN: pb.WatchEvent.WITHDRAWN,
    Change.EXPIRED: pb.WatchEvent.EXPIRED,
    Change.SUPERSEDED: pb.WatchEvent.SUPERSEDED,
}
_CODES: Final[tuple[tuple[type[PeerloadError], grpc.StatusCode], ...]] = (
    (ManifestError, grpc.StatusCode.INVALID_ARGUMENT),
    (LeaseUnknown, grpc.StatusCode.NOT_FOUND),
    (BlobMissing, grpc.StatusCode.NOT_FOUND),
    (LeaseSuperseded, grpc.StatusCode.FAILED_PRECONDITION),
    (PeerloadError, grpc.StatusCode.INTERNAL),
)


def _refuse(context: grpc.ServicerContext, error: PeerloadError) -> NoReturn:
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    if isinstance(error, ManifestError):
        context.set_trailing_metadata((("peerload-field-bin", error.field.encode()[:_MAX_DETAILS]),))
        context.abort(code, f"{error.field}: {error.problem}"[:_MAX_DETAILS])
    context.abort(code, error.message[:_MAX_DETAILS])


@contextmanager
def _answering(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except PeerloadError as error:
        refused = error
    except Exception:  # the coordinator outlives what one call trips over
        log.exception("a call failed inside the coordinator")
        context.abort(grpc.StatusCode.INTERNAL, "the coordinator failed; its log has the traceback")
    else:
        return
    _refuse(context, refused)


class _Servicer(pb_grpc.DirectoryServicer):
    def __init__(self, core: Core) -> None:
        self._core = core

    def PutBlob(self, request: pb.PutBlobRequest, context: grpc.ServicerContext) -> pb.PutBlobReply:
        with _answering(context):
            self._core.put_blob(request.blob)
        return pb.PutBlobReply()

    def HasBlobs(self, request: pb.HasBlobsRequest, context: grpc.ServicerContext) -> pb.HasBlobsReply:
        with _answering(context):
            return pb.HasBlobsReply(missing=self._core.missing(list(request.digest)))

    def GetBlob(self, request: pb.GetBlobRequest, context: grpc.ServicerContext) -> pb.GetBlobReply:
        with _answering(context):
            return pb.GetBlobReply(blob=self._core.blob(request.digest))

    def Announce(self, request: pb.AnnounceRequest, context: grpc.ServicerContext) -> pb.AnnounceReply:
        with _answering(context):
            self._core.announce(request.announcement, request.ttl_s)
        return pb.AnnounceReply()

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewReply:
        with _answering(context):
            return pb.RenewReply(ttl_s=self._core.renew(codec.decode_source(request.source)).ttl_s)

    def Withdraw(self, request: pb.WithdrawRequest, context: grpc.ServicerContext) -> pb.WithdrawReply:
        with _answering(context):
            self._core.withdraw(codec.decode_source(request.source))
        return pb.WithdrawReply()

    def Discover(self, request: pb.DiscoverRequest, context: grpc.ServicerContext) -> Iterator[pb.Announcement]:
        with _answering(context):
            leases = self._core.leases(codec.decode_model(request.model))
        for lease in leases:
            yield pb.Announcement.FromString(lease.record.body)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchEvent]:
        with _answering(context):
            model = codec.decode_model(request.model)
        with self._core.watch(model) as watched:
            for lease in watched.leases:
                yield _announced(lease.record.body)
            yield pb.WatchEvent(change=pb.WatchEvent.SNAPSHOT)
            events = watched.events
            # Without the callback nothing would wake this thread when the client goes away.
            if events is None or not context.add_callback(lambda: events.put(None)):
                return
            while (event := events.get()) is not None:
                if event.change is Change.ANNOUNCED:
                    yield _announced(event.record.body)
                else:
                    yield pb.WatchEvent(change=_CHANGES[event.change], source=codec.encode_source(event.record.source))

    def Agree(self, request: pb.AgreeRequest, context: grpc.ServicerContext) -> pb.AgreeReply:
        with _answering(context):
            said = request.WhichOneof("vote")
            if said is None:
                raise ManifestError("agree.vote", "is missing")
            key = Round(request.group, request.round)
            abort = request.abort if said == "abort" else None
            wait_s = min(request.wait_s, MAX_WAIT_S, context.time_remaining() or MAX_WAIT_S)
            return _reply(self._core.agree(Vote(key, request.rank, request.size, request.payload, abort), wait_s))

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        with _answering(context):
            return self._core.status(_version())


def _announced(body: bytes) -> pb.WatchEvent:
    return pb.WatchEvent(change=pb.WatchEvent.ANNOUNCED, announcement=pb.Announcement.FromString(body))


def _reply(outcome: Outcome) -> pb.AgreeReply:
    if isinstance(outcome, Agreed):
        return pb.AgreeReply(agreed=pb.AgreeReply.Agreed(payload=outcome.payloads))
    if isinstance(outcome, Aborted):
        return pb.AgreeReply(aborted=pb.AgreeReply.Aborted(rank=outcome.rank, reason=outcome.reason))
    return pb.AgreeReply(pending=pb.AgreeReply.Pending(missing=outcome.missing))


def _version() -> str:
    try:
        return version("peerload")
    except PackageNotFoundError:
        return "from source"


class Coordinator:
    """A running coordinator. `address` is HOST:PORT, with the port that was taken. Stop it, or use it with `with`."""

    def __init__(self, listen: str, core: Core) -> None:
        self._core = core
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(WAITERS + SPARE, thread_name_prefix="coordinator"),
            options=[
                ("grpc.max_receive_message_length", codec.MAX_MESSAGE_NBYTES),
                ("grpc.max_send_message_length", codec.MAX_MESSAGE_NBYTES),
                ("grpc.so_reuseport", 0),  # a second coordinator on this port must fail, not take half of the calls
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        pb_grpc.add_DirectoryServicer_to_server(_Servicer(core), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            core.close()
            next_step = "name a free port and an address of this machine, as HOST:PORT"
            raise HostError(f"can't listen on {listen}", next_step=next_step) from error
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        self._stopping = threading.Event()
        self._ticking = threading.Thread(target=self._tick, name="coordinator-tick", daemon=True)
        self._server.start()
        self._ticking.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _tick(self) -> None:
        while not self._stopping.wait(_TICK_S):
            try:
                self._core.tick()
            except Exception:  # the next tick may do better; leases must not live for ever
                log.exception("a tick failed")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it was stopped; False when `timeout_s` passed first."""
        return self._stopping.wait(timeout_s)

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what is being asked, for at most `grace_s`, then close everything. Safe to call twice."""
        if self._stopping.is_set():
            return
        self._health.enter_graceful_shutdown()
        self._core.dismiss()
        self._server.stop(grace_s).wait()
        self._stopping.set()
        self._ticking.join()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def serve(listen: str, store_url: str = "memory", clock: Callable[[], float] = time.monotonic) -> Coordinator:
    """Start a coordinator on HOST:PORT (port 0: any), with `store_url` as in `Store`.

    Raises ConfigError for a senseless URL, HostError when store or port can't be used."""
    return Coordinator(listen, Core(Store(store_url), clock))
