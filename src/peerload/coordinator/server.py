"""The coordinator as a process: `Core` behind gRPC.

Threads: a call has one while it lasts, also while it waits (Watch, Agree): one that sleeps costs some memory and no time.
There is room for `core.WAITERS` calls that wait and SPARE that don't. Whoever would be one waiter too many gets what there is
to say at once and asks again, so that no number of them starves a renewal. One more thread lets time pass.
"""

# ruff: noqa: N802, ARG002 - names and arguments of the methods are the service's

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..errors import HostError, LeaseSuperseded, LeaseUnknown, ManifestError, PeerloadError
from ..model.catalog import ModelKey
from . import codec
from ._generated import peerload_pb2 as pb
from ._generated import peerload_pb2_grpc as pb_grpc
from .address import checked_address
from .ballot import Aborted, Agreed, BallotFull, Outcome, Pending, Round
from .blobs import BlobMissing
from .core import WAITERS, Core
from .directory import Change
from .store import Store, StoreFailed, Vote

log = logging.getLogger(__name__)

_R = TypeVar("_R")

SPARE: Final = 32
#: Longest that one Agree call waits, seconds: short enough for every proxy in between.
MAX_WAIT_S: Final = 30.0
_TICK_S: Final = 0.5
#: gRPC sends details as a header, of 8 KiB at most with everything else.
_MAX_DETAILS: Final = 2000
_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["Directory"]
_SERVICE: Final = _DESCRIPTOR.full_name
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
    (BallotFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StoreFailed, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (PeerloadError, grpc.StatusCode.INTERNAL),
)


def _status(error: PeerloadError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Status code, details and trailing metadata."""
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    if isinstance(error, ManifestError):
        field = ("peerload-field-bin", error.field.encode(errors="replace")[:_MAX_DETAILS])
        return code, f"{error.field}: {error.problem}"[:_MAX_DETAILS], (field,)
    return code, error.message[:_MAX_DETAILS], ()


def _answer(behavior: Callable[..., object], kind: type[Message], data: bytes, context: grpc.ServicerContext) -> object:
    """One call: the request parsed by `codec`, within its bounds, and our errors as status codes.

    No error may outlive the `except` that caught it: its traceback holds the request and all that was made of it."""
    try:
        return behavior(codec.parse(kind, data, kind.DESCRIPTOR.name), context)
    except PeerloadError as error:
        code, said, trailing = _status(error)
    except Exception:  # the coordinator outlives what one call trips over
        log.exception("a call failed inside the coordinator")
        code, said, trailing = grpc.StatusCode.INTERNAL, "the coordinator failed; its log has the traceback", ()
    context.set_trailing_metadata(trailing)
    return context.abort(code, said)


def _handlers(servicer: _Servicer) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """What grpc's generated code would register, with `_answer` around each method."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in _DESCRIPTOR.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        kind = GetMessageClass(method.input_type)
        handlers[method.name] = make(partial(_answer, getattr(servicer, method.name), kind), None, _serialized)
    return handlers


def _serialized(reply: Message | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


class _Servicer(pb_grpc.DirectoryServicer):
    def __init__(self, core: Core) -> None:
        self._core = core

    def PutBlob(self, request: pb.PutBlobRequest, context: grpc.ServicerContext) -> pb.PutBlobReply:
        self._core.put_blob(request.blob)
        return pb.PutBlobReply()

    def HasBlobs(self, request: pb.HasBlobsRequest, context: grpc.ServicerContext) -> pb.HasBlobsReply:
        return pb.HasBlobsReply(missing=self._core.missing(list(request.digest)))

    def GetBlob(self, request: pb.GetBlobRequest, context: grpc.ServicerContext) -> pb.GetBlobReply:
        return pb.GetBlobReply(blob=self._core.blob(request.digest))

    def Announce(self, request: pb.AnnounceRequest, context: grpc.ServicerContext) -> pb.AnnounceReply:
        self._core.announce(request.announcement, request.ttl_s)
        return pb.AnnounceReply()

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewReply:
        return pb.RenewReply(ttl_s=self._core.renew(codec.decode_source(request.source)).ttl_s)

    def Withdraw(self, request: pb.WithdrawRequest, context: grpc.ServicerContext) -> pb.WithdrawReply:
        self._core.withdraw(codec.decode_source(request.source))
        return pb.WithdrawReply()

    def Discover(self, request: pb.DiscoverRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]
        return (lease.record.body for lease in self._core.leases(codec.decode_model(request.model)))

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchEvent]:
        return self._events(codec.decode_model(request.model), context)  # what it refuses is an answer, not a broken stream

    def _events(self, model: ModelKey, context: grpc.ServicerContext) -> Iterator[pb.WatchEvent]:
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
        said = request.WhichOneof("vote")
        if said is None:
            raise ManifestError("agree.vote", "is missing")
        key, epoch, outcome = Round(request.group, request.round), self._core.epoch, None
        wait_s = min(MAX_WAIT_S, context.time_remaining() or MAX_WAIT_S, request.wait_s)  # the last one may be no number
        if said == "abort":  # whatever this coordinator has forgotten, the others hear of it
            outcome = self._core.agree(Vote(key, request.rank, request.size, abort=request.abort), wait_s)
        elif request.epoch == epoch and said == "asks":
            outcome = self._core.ask(key, request.rank, wait_s)
        elif request.epoch == epoch:
            outcome = self._core.agree(Vote(key, request.rank, request.size, request.payload), wait_s)
        return _reply(outcome, epoch)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        return self._core.status(_version())


def _announced(body: bytes) -> pb.WatchEvent:
    return pb.WatchEvent(change=pb.WatchEvent.ANNOUNCED, announcement=pb.Announcement.FromString(body))


def _reply(outcome: Outcome | None, epoch: str) -> pb.AgreeReply:
    if isinstance(outcome, Agreed):
        return pb.AgreeReply(agreed=pb.AgreeReply.Agreed(payload=outcome.payloads), epoch=epoch)
    if isinstance(outcome, Aborted):
        return pb.AgreeReply(aborted=pb.AgreeReply.Aborted(rank=outcome.rank, reason=outcome.reason), epoch=epoch)
    if isinstance(outcome, Pending):
        return pb.AgreeReply(pending=pb.AgreeReply.Pending(missing=outcome.missing), epoch=epoch)
    return pb.AgreeReply(epoch=epoch)


def _version() -> str:
    try:
        return version("peerload")
    except PackageNotFoundError:
        return "from source"


class _Pool(ThreadPoolExecutor):
    """Threads as calls need them. `starved(threads)` is called when the system refuses another one: those that there are serve
    what was submitted. (An error out of `submit` would end gRPC's serving thread, and the coordinator would be deaf.)"""

    def __init__(self, most: int, starved: Callable[[int], None]) -> None:
        super().__init__(most, thread_name_prefix="coordinator")
        self._starved = starved

    def submit(self, fn: Callable[..., _R], /, *args: Any, **kwargs: Any) -> Future[_R]:  # noqa: ANN401 - as its base
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:  # "can't start new thread", after the call was queued
            if self._shutdown or not self._threads:
                raise
            self._starved(len(self._threads))
            return Future()


class Coordinator:
    """A running coordinator. `address` is HOST:PORT, with the port that was taken. Stop it, or use it with `with`."""

    def __init__(self, listen: str, core: Core) -> None:
        try:
            checked_address(listen, "--listen", lowest_port=0)
            _try_to_listen(listen)
        except PeerloadError:
            core.close()
            raise
        self._core = core
        self._health = health.HealthServicer()
        self._server = grpc.server(
            _Pool(WAITERS + SPARE, self._starved),
            options=[
                ("grpc.max_receive_message_length", codec.MAX_MESSAGE_NBYTES),
                ("grpc.max_send_message_length", codec.MAX_MESSAGE_NBYTES),
                ("grpc.so_reuseport", 0),  # a second coordinator on this port must fail, not take half of the calls
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        self._server.add_registered_method_handlers(_SERVICE, _handlers(_Servicer(core)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            core.close()
            raise _cannot_listen(listen, "") from error
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        self._stopping = threading.Event()
        self._ticking = threading.Thread(target=self._tick, name="coordinator-tick", daemon=True)
        self._server.start()
        self._ticking.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    @property
    def waiting(self) -> int:
        """Calls that wait now."""
        return self._core.waiting

    def narrow(self, room: int) -> None:
        """Let no more than `room` calls wait at one time; others ask again."""
        self._core.narrow(room)

    def _starved(self, threads: int) -> None:
        log.warning("this system allows no more than %d threads here; calls that wait beyond that ask again", threads)
        self.narrow(threads - SPARE)

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


def _try_to_listen(listen: str) -> None:
    """Raise HostError with the system's reason if it can't be done. gRPC says less, and more noise."""
    host, _, port = listen.rpartition(":")
    try:
        (family, kind, number, _, where), *_ = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, number) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(where)
            trial.listen(1)
    except OSError as error:
        raise _cannot_listen(listen, f": {error.strerror or error}") from error


def _cannot_listen(listen: str, why: str) -> HostError:
    return HostError(f"can't listen on {listen}{why}", next_step="name a free port and an address of this machine, as HOST:PORT")


def serve(listen: str, store_url: str = "memory", clock: Callable[[], float] = time.monotonic) -> Coordinator:
    """Start a coordinator on HOST:PORT (port 0: any), with `store_url` as in `Store`.

    Raises ConfigError for a senseless URL, HostError when store or port can't be used."""
    return Coordinator(listen, Core(Store(store_url), clock))
