"""The coordinator as seen by seeds and targets. The only place where gRPC's errors become ours.

Every call takes an optional `deadline` (default: `timeout_s` from now), retries while the coordinator is unreachable, over a
fresh connection each time, and raises CoordinatorError when it stays so, ManifestError when what was said makes no sense to the
coordinator, DeadlineExceeded when an answer didn't come in time. No call is open between two method calls.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar

import grpc

from ..deadline import Deadline
from ..errors import CommitError, CoordinatorError, DeadlineExceeded, LeaseSuperseded, LeaseUnknown, ManifestError, PeerloadError
from ..model.catalog import ModelKey, Parallel
from ..model.offer import Offer, SourceId
from . import codec
from ._generated import peerload_pb2 as pb
from ._generated import peerload_pb2_grpc as pb_grpc
from .address import checked_address
from .ballot import Round
from .blobs import BlobMissing, Blobs
from .codec import Blob

log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply")

#: One Agree call waits this long at the coordinator, seconds; then it is asked again.
_AGREE_WAIT_S: Final = 20.0
#: An Agree call is asked again when its answer is later than that, seconds: the coordinator was stopped, or the network.
_LATE_S: Final = 5.0
#: A rank whose time is up says so to the others, and learns whether it is too late for that, until this long after its deadline.
_LAST_WORD_S: Final = 1.0
#: Asking again when the coordinator has no room to let us wait, seconds: at first, and at most.
_REASK_S: Final = (0.2, 3.0)
#: It is away, or on its way out.
_AGAIN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
#: Between two tries, seconds: at first, and at most. One that restarts is found within the latter.
_BACKOFF_S: Final = (0.05, 0.5)
#: What a call gets when the deadline has passed already: one try.
_SHORTEST_S: Final = 0.3
_MAX_REASON: Final = 4096
_LOOK: Final = "is `peerload coordinator` running there? see its log"
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_NBYTES),
    ("grpc.enable_http_proxy", 0),  # the coordinator is in this cluster; the environment's proxy is for the world
    ("grpc.use_local_subchannel_pool", 1),  # a fresh channel connects at once, whatever others have met
    ("grpc.keepalive_time_ms", 20_000),  # a watch on a machine that lost power ends
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class Granted:
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


class _Line:
    """A channel, and how many calls use it. gRPC takes 5 s and more to find a coordinator that restarted, whatever its backoff
    options say; a fresh channel finds it at once."""

    def __init__(self, url: str) -> None:
        self.channel = grpc.insecure_channel(url, options=_OPTIONS)
        self.stub = pb_grpc.DirectoryStub(self.channel)
        self.calls = 0


class CoordinatorClient:
    """`url` is HOST:PORT. Connects at the first call. Remembers layouts and catalogs it has decoded, by digest: offers
    of equal layouts share one object. Thread-safe. Raises ConfigError for another url."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self.url = checked_address(url, "the coordinator's url")
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._line = _Line(url)
        self._epochs: dict[str, str] = {}  # of the coordinator's votes, by group, since this client first voted in it
        self._blobs = Blobs()

    def close(self) -> None:
        self._line.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # For seeds.

    def announce(
        self,
        offer: Offer,
        model: ModelKey,
        *,
        files: Mapping[str, bytes] | None = None,
        ttl_s: float = 30.0,
        deadline: Deadline | None = None,
    ) -> Granted:
        """Let targets find `offer` for `ttl_s` seconds; renew at a third of that. `files` (name -> content, at most
        1 MiB together) are for targets that have no copy of the model's configuration.

        Saying it again is harmless. Raises LeaseSuperseded when a newer generation has taken this rank's place."""
        deadline = self._deadline(deadline)
        message, blobs = codec.encode_offer(offer, model, files or {})
        request = pb.AnnounceRequest(announcement=message, ttl_s=ttl_s)
        while True:
            try:
                self._put(blobs, deadline)
                self._retry(lambda stub, t: stub.Announce(request, timeout=t), deadline, "announcing", BlobMissing)
            except BlobMissing:  # it restarted in between, and forgot
                deadline.check(f"announcing {offer.source} to coordinator {self.url}")
                continue
            return Granted(offer.source, ttl_s)

    def _put(self, blobs: list[Blob], deadline: Deadline) -> None:
        digests = pb.HasBlobsRequest(digest=[blob.digest for blob in blobs])
        missing = self._retry(lambda stub, t: stub.HasBlobs(digests, timeout=t), deadline, "asking for blobs").missing
        for blob in blobs:
            if blob.digest in missing:
                self._put_one(blob, deadline)

    def _put_one(self, blob: Blob, deadline: Deadline) -> None:
        request, doing = pb.PutBlobRequest(blob=codec.pack(blob)), f"putting a {blob.kind.name.lower()}"
        self._retry(lambda stub, t: stub.PutBlob(request, timeout=t), deadline, doing, BlobMissing)

    def renew(self, lease: Granted, deadline: Deadline | None = None) -> Granted:
        """Another `ttl_s` from now. Raises LeaseUnknown (it expired, or the coordinator restarted without a store:
        announce again) or LeaseSuperseded (stop offering)."""
        request = pb.RenewRequest(source=codec.encode_source(lease.source))
        deadline = self._deadline(deadline)
        reply = self._retry(lambda stub, t: stub.Renew(request, timeout=t), deadline, "renewing a lease", LeaseUnknown)
        return Granted(lease.source, reply.ttl_s)

    def withdraw(self, lease: Granted, deadline: Deadline | None = None) -> None:
        """Nobody finds it any more. Withdrawing what has ended already is no error."""
        request = pb.WithdrawRequest(source=codec.encode_source(lease.source))
        self._retry(lambda stub, t: stub.Withdraw(request, timeout=t), self._deadline(deadline), "withdrawing")

    # For targets.

    def discover(self, model: ModelKey, deadline: Deadline | None = None) -> list[Offer]:
        """Every rank of every instance that holds `model` now, whatever its layout, by instance and rank. An offer
        that this version can't read, or that the coordinator has just forgotten, is left out, with a warning."""
        deadline = self._deadline(deadline)
        offers = (self._offer(message, deadline) for message in self._announcements(model, deadline))
        return [offer for offer in offers if offer is not None]

    def wait_for(self, model: ModelKey, deadline: Deadline, enough: Callable[[list[Offer]], bool]) -> list[Offer]:
        """What `discover` says as soon as that is `enough`, asked again at every change.

        Raises DeadlineExceeded when it never was, CoordinatorError when the coordinator couldn't be asked."""
        doing, pause_s = f"waiting for seeds of {model}", _REASK_S[0]
        while True:
            asked_s = time.monotonic()
            offers, satisfied = self._retry(lambda stub, t: self._watch(stub, model, t, deadline, enough), deadline, doing)
            if satisfied:
                return offers
            if deadline.remaining_s == 0:
                there = ", ".join(str(offer.source) for offer in offers[:8]) or "none"
                raise DeadlineExceeded(
                    f"not enough seeds of {model} appeared at coordinator {self.url} in time; there: {there}",
                    next_step="start a seed, look at `peerload ls`, or wait longer",
                )
            pause_s = min(2 * pause_s, _REASK_S[1]) if time.monotonic() - asked_s < 2 * pause_s else _REASK_S[0]
            time.sleep(min(pause_s, deadline.remaining_s))  # the server was too busy to let us wait

    def _watch(
        self,
        stub: pb_grpc.DirectoryStub,
        model: ModelKey,
        timeout_s: float,
        deadline: Deadline,
        enough: Callable[[list[Offer]], bool],
    ) -> tuple[list[Offer], bool]:
        """The offers when they were enough, or when the stream ended, and which of the two it was."""
        held: dict[tuple[str, int], Offer] = {}
        offers: list[Offer] | None = None
        stream = stub.Watch(pb.WatchRequest(model=codec.encode_model(model)), timeout=timeout_s)
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
        """The files of `model` that most instances announce, or else the next that can be read. Raises CoordinatorError when
        there are none."""
        deadline = self._deadline(deadline)
        announced: dict[str, set[str]] = {}
        for message in self._announcements(model, deadline):
            if message.files:
                announced.setdefault(message.files, set()).add(message.source.instance)
        for digest in sorted(announced, key=lambda digest: -len(announced[digest])):
            try:
                return self._blobs.files(digest, self._fetching(deadline))
            except (ManifestError, BlobMissing) as error:
                log.warning("left out files that %s announces: %s", ", ".join(sorted(announced[digest])), error.message)
        raise CoordinatorError(
            f"no seed of {model} at coordinator {self.url} has announced files",
            next_step="start a seed, or give the model's directory",
        )

    def _announcements(self, model: ModelKey, deadline: Deadline) -> list[pb.Announcement]:
        request = pb.DiscoverRequest(model=codec.encode_model(model))
        doing = f"looking for seeds of {model}"
        return self._retry(lambda stub, t: list(stub.Discover(request, timeout=t)), deadline, doing)

    def _offer(self, message: pb.Announcement, deadline: Deadline) -> Offer | None:
        fetch = self._fetching(deadline)
        try:
            digests = self._blobs.digests(message.digests, fetch) if message.digests else (None,)
            return codec.decode_offer(message, self._blobs.layout(message.layout, fetch), *digests)
        except (ManifestError, BlobMissing) as error:
            log.warning("left out %s, whose offer can't be read: %s", codec.decode_source(message.source), error)
            return None

    def _fetching(self, deadline: Deadline) -> Callable[[str], Blob]:
        def fetch(digest: str) -> Blob:
            request = pb.GetBlobRequest(digest=digest)
            reply = self._retry(lambda stub, t: stub.GetBlob(request, timeout=t), deadline, "getting a blob", BlobMissing)
            return codec.unpack(reply.blob)

        return fetch

    # For the ranks of one instance.

    def agree(self, group: str, number: int, rank: int, size: int, payload: bytes, deadline: Deadline) -> list[bytes]:
        """Say yes in round `number` of `group` and wait until all `size` ranks have; their payloads by rank. Either every rank
        gets that or none does, except one that the coordinator can't answer: it raises and must not go on.

        Raises CommitError naming the rank that aborted and why; DeadlineExceeded naming the ranks that didn't vote,
        after an abort in this rank's name so that the others don't wait either; CoordinatorError, at once, when the coordinator
        has restarted and forgotten what the group had voted."""
        key = Round(group, number)
        missing: tuple[int, ...] = ()
        voted, pause_s = False, _REASK_S[0]
        while True:
            wait_s = min(_AGREE_WAIT_S, max(0.0, deadline.remaining_s - _SHORTEST_S))
            request = _vote(key, rank, size, wait_s, self._epochs.get(group, ""))
            if voted or not request.epoch:
                request.asks = True
            else:
                request.payload = payload
            asked_s = time.monotonic()
            try:
                reply = self._agree(request, deadline, f"agreeing on {key}", wait_s + _LATE_S)
            except (CoordinatorError, DeadlineExceeded) as error:
                if deadline.remaining_s > 0:
                    raise
                return self._last_word(key, rank, size, missing, deadline, error)
            if reply.WhichOneof("outcome") is None:
                if request.epoch:
                    raise self._forgotten(key)
                self._epochs[group] = reply.epoch
                continue
            voted = True
            if reply.WhichOneof("outcome") != "pending":
                return _decided(reply, key)
            missing = tuple(reply.pending.missing)
            if deadline.remaining_s == 0:
                return self._last_word(key, rank, size, missing, deadline)
            if time.monotonic() - asked_s < wait_s / 2 or wait_s == 0:  # the server was too busy to let us wait
                time.sleep(min(pause_s, deadline.remaining_s))
                pause_s = min(2 * pause_s, _REASK_S[1])

    def _last_word(
        self, key: Round, rank: int, size: int, missing: tuple[int, ...], deadline: Deadline, cause: PeerloadError | None = None
    ) -> list[bytes]:
        """Abort, since time is up, unless all have agreed in the meantime. `cause`: what kept this rank from hearing that."""
        epoch = self._epochs.get(key.group, "")
        names = ", ".join(map(str, missing[:16])) or "unknown"
        request = _vote(key, rank, size, 0.0, epoch)
        request.abort = f"its deadline passed while waiting for rank {names}"
        try:
            reply = self._agree(request, Deadline(deadline.at_s + _LAST_WORD_S, deadline.clock), f"aborting {key}")
        except PeerloadError as unheard:
            raise cause or unheard from unheard
        if epoch and reply.epoch != epoch:
            raise self._forgotten(key)
        if reply.WhichOneof("outcome") == "aborted" and reply.aborted.rank == rank:
            raise DeadlineExceeded(f"{key}: rank {names} of {size} did not vote in time", next_step="look at that rank's log")
        return _decided(reply, key)

    def abort(self, group: str, number: int, rank: int, size: int, reason: str, deadline: Deadline | None = None) -> None:
        """Say no, so that every rank that waits in `agree` raises CommitError with this reason. Tries until `deadline`."""
        request = _vote(Round(group, number), rank, size, 0.0, self._epochs.get(group, ""))
        request.abort = reason[:_MAX_REASON]
        self._agree(request, self._deadline(deadline), "aborting")

    def _agree(self, request: pb.AgreeRequest, deadline: Deadline, doing: str, patience_s: float = math.inf) -> pb.AgreeReply:
        return self._retry(lambda stub, t: stub.Agree(request, timeout=t), deadline, doing, patience_s=patience_s)

    def _forgotten(self, key: Round) -> CoordinatorError:
        return CoordinatorError(
            f"coordinator {self.url} has restarted and forgotten the votes of {key}; whether the other ranks agreed is unknown",
            next_step="start this instance again, all ranks of it; with `--store sqlite:PATH` a coordinator forgets no vote",
        )

    # For people.

    def status(self, deadline: Deadline | None = None) -> Status:
        deadline = self._deadline(deadline)
        reply = self._retry(lambda stub, t: stub.Status(pb.StatusRequest(), timeout=t), deadline, "asking for its status")
        holdings = tuple(
            Holding(
                codec.decode_model(h.model),
                codec.decode_source(h.source),
                codec.decode_parallel(h.parallel),
                h.nbytes,
                h.pieces,
                tuple(h.transport),
                h.host,
                dict(h.attributes),
                h.layout,
                h.lease_left_s,
            )
            for h in reply.holding
        )
        rounds = {Round(o.group, o.round): tuple(o.missing) for o in reply.open_round}
        return Status(reply.version, reply.store, reply.uptime_s, reply.blobs, reply.blob_nbytes, holdings, rounds)

    # Errors and retries.

    def _deadline(self, deadline: Deadline | None) -> Deadline:
        return Deadline.after(self._timeout_s) if deadline is None else deadline

    def _retry(
        self,
        attempt: Callable[[pb_grpc.DirectoryStub, float], _Reply],
        deadline: Deadline,
        doing: str,
        absent: type[CoordinatorError] = CoordinatorError,
        patience_s: float = math.inf,
    ) -> _Reply:
        """`attempt(stub, timeout_s)` until it succeeds, fails for another reason than an absent coordinator, or time is up.
        All calls are idempotent. `absent`: what NOT_FOUND means here. `patience_s`: when an attempt is given up for another."""
        pause_s, longest_s = _BACKOFF_S
        while True:
            with self._connected() as line:
                try:
                    return attempt(line.stub, min(max(deadline.remaining_s, _SHORTEST_S), patience_s))
                except grpc.RpcError as error:
                    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and patience_s < math.inf
                    if not (late or error.code() in _AGAIN) or deadline.remaining_s == 0:
                        raise self._error(error, doing, absent) from error
            self._reconnect(line)
            time.sleep(min(pause_s, deadline.remaining_s))
            pause_s = min(2 * pause_s, longest_s)

    @contextmanager
    def _connected(self) -> Iterator[_Line]:
        """The line that calls use now, open until this one is over."""
        with self._lock:
            line = self._line
            line.calls += 1
        try:
            yield line
        finally:
            with self._lock:
                line.calls -= 1
                unused = line is not self._line and not line.calls
            if unused:
                line.channel.close()

    def _reconnect(self, broken: _Line) -> None:
        """A fresh line for the calls to come, unless another thread has seen to that. Those under way end by themselves."""
        with self._lock:
            if self._line is not broken:
                return
            self._line = _Line(self.url)
            unused = not broken.calls
        if unused:
            broken.channel.close()

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
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            next_step = "see the coordinator's log, and whether its disk is full"
            return CoordinatorError(f"coordinator {self.url} refused ({doing}): {details}", next_step=next_step)
        if code in _AGAIN:
            return CoordinatorError(f"coordinator {self.url} can't be reached ({doing}): {details}", next_step=_LOOK)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return CoordinatorError(f"what answers at {self.url} is no peerload coordinator ({doing})", next_step=_LOOK)
        return CoordinatorError(f"coordinator {self.url} refused ({doing}): {code.name}: {details}", next_step=_LOOK)


def _vote(key: Round, rank: int, size: int, wait_s: float, epoch: str) -> pb.AgreeRequest:
    return pb.AgreeRequest(group=key.group, round=key.number, rank=rank, size=size, wait_s=wait_s, epoch=epoch)


def _decided(reply: pb.AgreeReply, key: Round) -> list[bytes]:
    if reply.WhichOneof("outcome") == "agreed":
        return list(reply.agreed.payload)
    raise CommitError(f"{key}: rank {reply.aborted.rank} aborted: {reply.aborted.reason}", next_step="look at that rank's log")
