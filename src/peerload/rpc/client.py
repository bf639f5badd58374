"""The coordinator as seen by seeds and targets. The only place where gRPC's errors become ours.

Every call takes an optional `deadline` (default: `timeout_s` from now), retries with backoff while the coordinator is
unreachable, and raises CoordinatorError when it stays so, ManifestError when what was said makes no sense to the
coordinator, DeadlineExceeded when an answer didn't come in time. No call is open between two method calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar

import grpc

from ..deadline import Deadline
from ..directory import Round
from ..errors import CommitError, CoordinatorError, DeadlineExceeded, LeaseSuperseded, LeaseUnknown, ManifestError, PeerloadError
from ..manifest import ModelKey, Offer, Parallel, SourceId
from . import codec
from ._generated import peerload_pb2 as pb
from ._generated import peerload_pb2_grpc as pb_grpc
from .blobs import Blobs
from .codec import Blob

log = logging.getLogger(__name__)

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")

#: One Agree call waits this long at the coordinator, seconds; then it is asked again.
_AGREE_WAIT_S: Final = 20.0
#: A rank whose time is up says so to the others, and learns whether it is too late for that, within this time.
_LAST_WORD_S: Final = 2.0
#: Asking again when the coordinator has no room to let us wait, seconds.
_REASK_S: Final = 0.2
#: It is away, or on its way out.
_AGAIN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_BACKOFF_S: Final = (0.05, 1.0)
#: What a call gets when the deadline has passed already: one try.
_SHORTEST_S: Final = 0.5
_MAX_REASON: Final = 4096
_LOOK: Final = "is `peerload coordinator` running there? see its log"
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_NBYTES),
    ("grpc.enable_http_proxy", 0),  # the coordinator is in this cluster; the environment's proxy is for the world
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted coordinator is found again within a second, not two minutes
    ("grpc.keepalive_time_ms", 20_000),  # a watch on a machine that lost power ends
    ("grpc.keepalive_timeout_ms", 10_000),
]


class _BlobMissing(CoordinatorError):
    """It was put before the coordinator forgot it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """`source` may be read until `ttl_s` after the last announce or renew."""

    source: SourceId
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Holding:
    """What `status` says of one rank of one instance. `layout` is the digest of its layout blob."""

    model: ModelKey
    source: SourceId
    parallel: Parallel
    nbytes: int
    pieces: int
    transports: tuple[str, ...]
    host: str
    attributes: Mapping[str, str]
    layout: str
    lease_left_s: float


@dataclass(frozen=True, slots=True)
class Status:
    """`blob_nbytes`: as stored, compressed. `open_rounds`: undecided agreements and the ranks they wait for."""

    version: str
    store: str
    uptime_s: float
    blobs: int
    blob_nbytes: int
    holdings: tuple[Holding, ...]
    open_rounds: Mapping[Round, tuple[int, ...]]


class CoordinatorClient:
    """`url` is HOST:PORT. Connects at the first call. Remembers layouts and catalogs it has decoded, by digest: offers
    of equal layouts share one object. Thread-safe."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(url, options=_OPTIONS)
        self._stub = pb_grpc.DirectoryStub(self._channel)
        self._blobs = Blobs()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # For seeds.

    def announce(
        self, offer: Offer, model: ModelKey, *, files: Mapping[str, bytes] | None = None, ttl_s: float = 30.0,
        deadline: Deadline | None = None,
    ) -> Lease:  # fmt: skip
        """Let targets find `offer` for `ttl_s` seconds; renew at a third of that. `files` (name -> content, at most
        1 MiB together) are for targets that have no copy of the model's configuration.

        Saying it again is harmless. Raises LeaseSuperseded when a newer generation has taken this rank's place."""
        deadline = self._deadline(deadline)
        message, blobs = codec.encode_offer(offer, model, files or {})
        request = pb.AnnounceRequest(announcement=message, ttl_s=ttl_s)
        while True:
            try:
                self._put(blobs, deadline)
                self._call(self._stub.Announce, request, deadline, "announcing", _BlobMissing)
            except _BlobMissing:  # it restarted in between, and forgot
                deadline.check(f"announcing {offer.source} to coordinator {self.url}")
                continue
            return Lease(offer.source, ttl_s)

    def _put(self, blobs: list[Blob], deadline: Deadline) -> None:
        digests = pb.HasBlobsRequest(digest=[blob.digest for blob in blobs])
        missing = self._call(self._stub.HasBlobs, digests, deadline, "asking for blobs").missing
        for blob in blobs:
            if blob.digest in missing:
                request = pb.PutBlobRequest(blob=codec.pack(blob))
                self._call(self._stub.PutBlob, request, deadline, f"putting a {blob.kind.name.lower()}", _BlobMissing)

    def renew(self, lease: Lease, deadline: Deadline | None = None) -> Lease:
        """Another `ttl_s` from now. Raises LeaseUnknown (it expired, or the coordinator restarted without a store:
        announce again) or LeaseSuperseded (stop offering)."""
        request = pb.RenewRequest(source=codec.encode_source(lease.source))
        reply = self._call(self._stub.Renew, request, self._deadline(deadline), "renewing a lease", LeaseUnknown)
        return Lease(lease.source, reply.ttl_s)

    def withdraw(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Nobody finds it any more. Withdrawing what has ended already is no error."""
        request = pb.WithdrawRequest(source=codec.encode_source(lease.source))
        self._call(self._stub.Withdraw, request, self._deadline(deadline), "withdrawing")

    # For targets.

    def discover(self, model: ModelKey, deadline: Deadline | None = None) -> list[Offer]:
        """Every rank of every instance that holds `model` now, whatever its layout, by instance and rank. An offer
        that this version can't read is left out, with a warning."""
        deadline = self._deadline(deadline)
        offers = (self._offer(message, deadline) for message in self._announcements(model, deadline))
        return [offer for offer in offers if offer is not None]

    def wait_for(self, model: ModelKey, deadline: Deadline, enough: Callable[[list[Offer]], bool]) -> list[Offer]:
        """What `discover` says as soon as that is `enough`, asked again at every change.

        Raises DeadlineExceeded when it never was, CoordinatorError when the coordinator couldn't be asked."""
        doing = f"waiting for seeds of {model}"
        while True:
            offers, satisfied = self._retry(lambda t: self._watch(model, t, deadline, enough), deadline, doing)
            if satisfied:
                return offers
            if deadline.remaining_s == 0:
                there = ", ".join(str(offer.source) for offer in offers[:8]) or "none"
                raise DeadlineExceeded(
                    f"not enough seeds of {model} appeared at coordinator {self.url} in time; there: {there}",
                    next_step="start a seed, look at `peerload ls`, or wait longer",
                )
            time.sleep(min(_REASK_S, deadline.remaining_s))  # the server was too busy to let us wait

    def _watch(
        self, model: ModelKey, timeout_s: float, deadline: Deadline, enough: Callable[[list[Offer]], bool]
    ) -> tuple[list[Offer], bool]:
        """The offers when they were enough, or when the stream ended, and which of the two it was."""
        held: dict[tuple[str, int], Offer] = {}
        offers: list[Offer] | None = None
        stream = self._stub.Watch(pb.WatchRequest(model=codec.encode_model(model)), timeout=timeout_s)
        try:
            for event in stream:
                if event.change == pb.WatchEvent.ANNOUNCED:
                    offer = self._offer(event.announcement, deadline)
                    if offer is not None:
                        held[offer.source.instance, offer.source.rank] = offer
                elif event.change != pb.WatchEvent.SNAPSHOT:
                    gone = codec.decode_source(event.source)
                    if (seat := (gone.instance, gone.rank)) in held and held[seat].source == gone:
                        del held[seat]
                if offers is None and event.change != pb.WatchEvent.SNAPSHOT:
                    continue
                offers = [held[seat] for seat in sorted(held)]
                if enough(offers):
                    return offers, True
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or offers is None:
                raise
        finally:
            stream.cancel()
        return offers or [], False

    def discover_files(self, model: ModelKey, deadline: Deadline | None = None) -> Mapping[str, bytes]:
        """The files of the first instance and rank of `model` that announced any. Raises CoordinatorError when none
        did."""
        deadline = self._deadline(deadline)
        for message in self._announcements(model, deadline):
            if message.files:
                return self._blobs.files(message.files, self._fetching(deadline))
        raise CoordinatorError(
            f"no seed of {model} at coordinator {self.url} has announced files",
            next_step="start a seed, or give the model's directory",
        )

    def _announcements(self, model: ModelKey, deadline: Deadline) -> list[pb.Announcement]:
        request = pb.DiscoverRequest(model=codec.encode_model(model))
        return self._retry(lambda t: list(self._stub.Discover(request, timeout=t)), deadline, f"looking for seeds of {model}")

    def _offer(self, message: pb.Announcement, deadline: Deadline) -> Offer | None:
        fetch = self._fetching(deadline)
        try:
            digests = self._blobs.digests(message.digests, fetch) if message.digests else None
            return codec.decode_offer(message, self._blobs.layout(message.layout, fetch), digests)
        except ManifestError as error:
            log.warning("left out %s, whose offer can't be read: %s", codec.decode_source(message.source), error)
            return None

    def _fetching(self, deadline: Deadline) -> Callable[[str], Blob]:
        def fetch(digest: str) -> Blob:
            reply = self._call(self._stub.GetBlob, pb.GetBlobRequest(digest=digest), deadline, "getting a blob")
            return codec.unpack(reply.blob)

        return fetch

    # For the ranks of one instance.

    def agree(self, group: str, number: int, rank: int, size: int, payload: bytes, deadline: Deadline) -> list[bytes]:
        """Say yes in round `number` of `group` and wait until all `size` ranks have; their payloads by rank. Either every rank
        gets that or none does, except one that the coordinator can't answer: it raises and must not go on.

        Raises CommitError naming the rank that aborted and why; DeadlineExceeded naming the ranks that didn't vote,
        after an abort in this rank's name so that the others don't wait either."""
        key = Round(group, number)
        missing: tuple[int, ...] = ()
        while True:
            wait_s = min(_AGREE_WAIT_S, deadline.remaining_s)
            request = _vote(key, rank, size, wait_s)
            request.payload = payload
            asked_s = time.monotonic()
            try:
                reply = self._call(self._stub.Agree, request, deadline, f"agreeing on {key}", timeout_s=wait_s + _LAST_WORD_S)
            except (CoordinatorError, DeadlineExceeded):
                if deadline.remaining_s > 0:
                    raise
                return self._last_word(key, rank, size, missing)
            if reply.WhichOneof("outcome") != "pending":
                return _decided(reply, key)
            missing = tuple(reply.pending.missing)
            if deadline.remaining_s == 0:
                return self._last_word(key, rank, size, missing)
            if time.monotonic() - asked_s < wait_s / 2:  # the server was too busy to let us wait
                time.sleep(min(_REASK_S, deadline.remaining_s))

    def _last_word(self, key: Round, rank: int, size: int, missing: tuple[int, ...]) -> list[bytes]:
        """Abort, since time is up, unless all have agreed in the meantime."""
        request = _vote(key, rank, size, 0.0)
        request.abort = f"its deadline passed while waiting for rank {', '.join(map(str, missing[:16])) or 'unknown'}"
        reply = self._call(self._stub.Agree, request, Deadline.after(_LAST_WORD_S), f"aborting {key}")
        if reply.WhichOneof("outcome") == "aborted" and reply.aborted.rank == rank:
            raise DeadlineExceeded(
                f"{key}: rank {', '.join(map(str, missing[:16])) or 'unknown'} of {size} did not vote in time",
                next_step="look at that rank's log",
            )
        return _decided(reply, key)

    def abort(self, group: str, number: int, rank: int, size: int, reason: str, deadline: Deadline | None = None) -> None:
        """Say no, so that every rank that waits in `agree` raises CommitError with this reason."""
        request = _vote(Round(group, number), rank, size, 0.0)
        request.abort = reason[:_MAX_REASON]
        self._call(self._stub.Agree, request, self._deadline(deadline), "aborting")

    # For people.

    def status(self, deadline: Deadline | None = None) -> Status:
        reply = self._call(self._stub.Status, pb.StatusRequest(), self._deadline(deadline), "asking for its status")
        holdings = tuple(
            Holding(
                codec.decode_model(h.model), codec.decode_source(h.source), codec.decode_parallel(h.parallel), h.nbytes,
                h.pieces, tuple(h.transport), h.host, dict(h.attributes), h.layout, h.lease_left_s,
            )
            for h in reply.holding
        )  # fmt: skip
        rounds = {Round(o.group, o.round): tuple(o.missing) for o in reply.open_round}
        return Status(reply.version, reply.store, reply.uptime_s, reply.blobs, reply.blob_nbytes, holdings, rounds)

    # Errors and retries.

    def _deadline(self, deadline: Deadline | None) -> Deadline:
        return Deadline.after(self._timeout_s) if deadline is None else deadline

    def _call(
        self, call: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request, deadline: Deadline, doing: str,
        absent: type[CoordinatorError] = CoordinatorError, timeout_s: float | None = None,
    ) -> _Reply:  # fmt: skip
        return self._retry(lambda t: call(request, timeout=t if timeout_s is None else timeout_s), deadline, doing, absent)

    def _retry(
        self, attempt: Callable[[float], _Reply], deadline: Deadline, doing: str,
        absent: type[CoordinatorError] = CoordinatorError,
    ) -> _Reply:  # fmt: skip
        """`attempt(timeout_s)` until it succeeds, fails for another reason than an absent coordinator, or time is up.
        All calls are idempotent. `absent`: what NOT_FOUND means here."""
        pause_s, longest_s = _BACKOFF_S
        while True:
            try:
                return attempt(max(deadline.remaining_s, _SHORTEST_S))
            except grpc.RpcError as error:
                if error.code() not in _AGAIN or deadline.remaining_s == 0:
                    raise self._error(error, doing, absent) from error
            time.sleep(min(pause_s, deadline.remaining_s))
            pause_s = min(2 * pause_s, longest_s)

    def _error(self, error: grpc.RpcError, doing: str, absent: type[CoordinatorError]) -> PeerloadError:
        """The one place where gRPC's errors become ours."""
        code, details = error.code(), error.details() or "no details"
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            fields = [item.value for item in error.trailing_metadata() if item.key == "peerload-field-bin"]
            field = fields[0].decode(errors="replace") if fields and isinstance(fields[0], bytes) else "request"
            return ManifestError(field, details.removeprefix(f"{field}: "))
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return LeaseSuperseded(details, next_step="stop offering; if two processes use one instance name, rename one")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"coordinator {self.url} gave no answer in time ({doing})", next_step=_LOOK)
        if code is grpc.StatusCode.NOT_FOUND:
            next_step = "announce again" if absent is LeaseUnknown else ""
            return absent(f"coordinator {self.url}: {details} ({doing})", next_step=next_step)
        if code in _AGAIN:
            return CoordinatorError(f"coordinator {self.url} can't be reached ({doing}): {details}", next_step=_LOOK)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return CoordinatorError(f"what answers at {self.url} is no peerload coordinator ({doing})", next_step=_LOOK)
        return CoordinatorError(f"coordinator {self.url} refused ({doing}): {code.name}: {details}", next_step=_LOOK)


def _vote(key: Round, rank: int, size: int, wait_s: float) -> pb.AgreeRequest:
    return pb.AgreeRequest(group=key.group, round=key.number, rank=rank, size=size, wait_s=wait_s)


def _decided(reply: pb.AgreeReply, key: Round) -> list[bytes]:
    if reply.WhichOneof("outcome") == "agreed":
        return list(reply.agreed.payload)
    raise CommitError(f"{key}: rank {reply.aborted.rank} aborted: {reply.aborted.reason}", next_step="look at that rank's log")
