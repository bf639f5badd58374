"""What the coordinator does, without gRPC: `Directory` and `Ballot` under one lock, a store beneath them, a clock beside.

Written to the store before anyone hears of it. Methods take and return messages, since records are kept as they came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from ..directory import Ballot, Change, Directory, Event, Lease, Outcome, Pending, Record
from ..errors import CoordinatorError, ManifestError
from ..manifest import Catalog, ModelKey, Parallel, SourceId
from . import codec
from ._generated import peerload_pb2 as pb
from .codec import Blob, Kind
from .store import Store, StoredBlob, Vote

log = logging.getLogger(__name__)

#: Calls that may wait at one time; later ones get what there is at once.
WAITERS: Final = 256
#: How long a blob that no live record stands on is kept, seconds: a seed may be about to announce it.
BLOB_KEEP_S: Final = 3600.0
_SWEEP_EVERY_S: Final = 60.0
_MAX_PAYLOAD_NBYTES: Final = 1 << 20
_MAX_REASON: Final = 4096


class BlobMissing(CoordinatorError):
    """The blob was never put here, or before a restart that forgot it: put it again."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What the coordinator keeps at hand of a layout blob. `catalog` is a digest."""

    catalog: str
    buffers: int
    pieces: int
    nbytes: int
    parallel: Parallel


@dataclass(frozen=True, slots=True)
class Watched:
    """The records of a model, and the changes since: a queue of events that ends with None, or None when too many
    wait already."""

    leases: list[Lease]
    events: SimpleQueue[Event | None] | None


class Core:
    """Thread-safe. `clock` gives seconds and never stops while the coordinator runs; no reading of it is stored, so
    the monotonic clock serves, and no jump of the wall clock ends a lease. Owns the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._started_s = self._swept_s = clock()
        self._lock = threading.Condition()
        self._decoding = threading.Lock()  # one blob at a time: each may take 64 MiB while it is checked
        self._directory, self._ballot = Directory(), Ballot()
        self._outlines: dict[str, Outline] = {}
        self._digest_rows: dict[str, int] = {}
        self._catalog: tuple[str, Catalog] | None = None
        self._touched_s: dict[str, float] = {}
        self._watchers: dict[ModelKey, set[SimpleQueue[Event | None]]] = {}
        self._waiting = 0
        self._closed = False
        self._restore()

    def _restore(self) -> None:
        leases = []
        for ttl_s, body in self._store.leases():
            announcement = pb.Announcement.FromString(body)
            try:
                leases.append((self._checked(announcement), ttl_s))
            except (ManifestError, BlobMissing) as error:
                # Its seed is told so at the next renewal, and announces again.
                log.warning("forgot %s, which the store has only in part: %s", codec.decode_source(announcement.source), error)
        self._directory.restore(self._store.generations(), leases, self._started_s)
        for vote in self._store.votes():
            self._cast(vote)

    # Blobs.

    def put_blob(self, message: pb.Blob) -> None:
        """Check and keep a blob. Raises ManifestError, and BlobMissing when a layout's catalog isn't here."""
        if not self.missing([message.digest]):
            return
        with self._decoding:
            self._examine(codec.unpack(message))
            self._store.put_blob(StoredBlob(message.kind, message.digest, message.nbytes, message.packed))

    def missing(self, digests: list[str]) -> list[str]:
        """Those not here. The others are kept for BLOB_KEEP_S at least."""
        with self._lock:
            here = {digest for digest in digests if self._store.has_blob(digest)}
            self._touched_s.update(dict.fromkeys(here, self._clock()))
        return [digest for digest in digests if digest not in here]

    def blob(self, digest: str) -> pb.Blob:
        stored = self._store.blob(digest)
        if stored is None:
            raise BlobMissing(f"blob {digest[:64]!r} is not here")
        return pb.Blob(kind=pb.BlobKind.ValueType(stored.kind), digest=digest, nbytes=stored.nbytes, packed=stored.packed)

    def _unpacked(self, digest: str, kind: Kind) -> Blob:
        blob = codec.unpack(self.blob(digest))
        if blob.kind is not kind:
            raise ManifestError(kind.name.lower(), f"blob {digest[:12]} is a {blob.kind.name}")
        return blob

    def _examine(self, blob: Blob) -> None:
        """Decode, which checks, and keep what announcements are compared with."""
        if blob.kind is Kind.CATALOG:
            self._catalog = blob.digest, codec.decode_catalog(blob.data)
        elif blob.kind is Kind.LAYOUT:
            used: list[str] = []

            def catalog_of(digest: str) -> Catalog:
                used.append(digest)
                if self._catalog is None or self._catalog[0] != digest:
                    self._catalog = digest, codec.decode_catalog(self._unpacked(digest, Kind.CATALOG).data)
                return self._catalog[1]

            layout = codec.decode_layout(blob.data, catalog_of)
            self._outlines[blob.digest] = Outline(
                used[0], len(layout.buffer_names), len(layout.pieces), layout.nbytes, layout.parallel
            )
        elif blob.kind is Kind.DIGESTS:
            self._digest_rows[blob.digest] = len(codec.decode_digests(blob.data))
        else:
            codec.decode_files(blob.data)

    def _outline(self, digest: str) -> Outline:
        if digest not in self._outlines:
            with self._decoding:
                self._examine(self._unpacked(digest, Kind.LAYOUT))
        return self._outlines[digest]

    # Leases.

    def announce(self, announcement: pb.Announcement, ttl_s: float) -> None:
        record = self._checked(announcement)
        with self._lock:
            events = self._directory.announce(record, ttl_s, self._clock())
            self._store.save(record.source, ttl_s, record.body)
            self._publish(events)

    def _checked(self, announcement: pb.Announcement) -> Record:
        """The record, once its blobs are here and fit it."""
        record = codec.decode_record(announcement)
        missing = self.missing(list(record.blobs))
        if missing:
            raise BlobMissing(f"blob {missing[0][:64]!r} is not here")
        outline = self._outline(announcement.layout)
        if len(announcement.address) != 8 * outline.buffers:
            raise ManifestError("binding.address", f"has {len(announcement.address)} bytes for {outline.buffers} buffers")
        if announcement.digests:
            if announcement.digests not in self._digest_rows:
                with self._decoding:
                    self._examine(self._unpacked(announcement.digests, Kind.DIGESTS))
            rows = self._digest_rows[announcement.digests]
            if rows != outline.pieces:
                raise ManifestError("binding.digests", f"has {rows} rows for {outline.pieces} pieces")
        if announcement.files:
            self._unpacked(announcement.files, Kind.FILES)
        return record

    def renew(self, source: SourceId) -> Lease:
        with self._lock:
            return self._directory.renew(source, self._clock())

    def withdraw(self, source: SourceId) -> None:
        with self._lock:
            self._publish(self._directory.withdraw(source, self._clock()))

    def leases(self, model: ModelKey | None = None) -> list[Lease]:
        with self._lock:
            return self._directory.leases(self._clock(), model)

    @contextmanager
    def watch(self, model: ModelKey) -> Iterator[Watched]:
        queue: SimpleQueue[Event | None] = SimpleQueue()
        with self._lock:
            leases = self._directory.leases(self._clock(), model)
            waits = self._waiting < WAITERS and not self._closed
            if waits:
                self._waiting += 1
                self._watchers.setdefault(model, set()).add(queue)
        try:
            yield Watched(leases, queue if waits else None)
        finally:
            if waits:
                with self._lock:
                    self._waiting -= 1
                    self._watchers[model].remove(queue)
                    if not self._watchers[model]:
                        del self._watchers[model]

    def _publish(self, events: list[Event]) -> None:
        ended = [event.record.source for event in events if event.change is not Change.ANNOUNCED]
        if ended:
            self._store.end(ended)
        for event in events:
            log.info("%s %s of %s", event.change, event.record.source, event.record.model)
            for queue in self._watchers.get(event.record.model, ()):
                queue.put(event)

    # Agreement.

    def agree(self, vote: Vote, wait_s: float) -> Outcome:
        """Cast a vote (again), then wait up to `wait_s` for the decision."""
        if len(vote.payload) > _MAX_PAYLOAD_NBYTES:
            raise ManifestError("agree.payload", f"has {len(vote.payload)} bytes, at most {_MAX_PAYLOAD_NBYTES} are allowed")
        if vote.abort is not None and len(vote.abort) > _MAX_REASON:
            raise ManifestError("agree.abort", f"has {len(vote.abort)} characters, at most {_MAX_REASON} are allowed")
        with self._lock:
            outcome = self._cast(vote)
            self._store.cast(vote)
            if not isinstance(outcome, Pending):
                self._lock.notify_all()
            elif wait_s > 0 and self._waiting < WAITERS and not self._closed:
                self._waiting += 1
                try:
                    self._lock.wait_for(lambda: self._closed or not isinstance(self._ballot.outcome(vote.round), Pending), wait_s)
                    outcome = self._cast(vote)
                finally:
                    self._waiting -= 1
            return outcome

    def _cast(self, vote: Vote) -> Outcome:
        if vote.abort is not None:
            return self._ballot.abort(vote.round, vote.rank, vote.size, vote.abort, self._clock())
        return self._ballot.vote(vote.round, vote.rank, vote.size, vote.payload, self._clock())

    # The rest.

    def tick(self) -> None:
        """Let time pass: call this about every second."""
        with self._lock:
            now_s = self._clock()
            self._publish(self._directory.expire(now_s))
            old = self._ballot.expire(now_s)
            if old:
                self._store.forget(old)
            if now_s - self._swept_s >= _SWEEP_EVERY_S:
                self._swept_s = now_s
                self._sweep_blobs(now_s)

    def _sweep_blobs(self, now_s: float) -> None:
        used = {digest for lease in self._directory.leases(now_s) for digest in lease.record.blobs}
        used |= {self._outlines[digest].catalog for digest in used & self._outlines.keys()}
        unused = self._store.blob_sizes().keys() - used
        old = [digest for digest in unused if self._touched_s.get(digest, self._started_s) + BLOB_KEEP_S <= now_s]
        if old:
            self._store.drop_blobs(old)
            for known in (self._outlines, self._digest_rows, self._touched_s):
                for digest in old:
                    known.pop(digest, None)

    def status(self, version: str) -> pb.StatusReply:
        with self._lock:
            now_s = self._clock()
            leases, rounds = self._directory.leases(now_s), self._ballot.outcomes()
        sizes = self._store.blob_sizes()
        return pb.StatusReply(
            version=version,
            store=self._store.url,
            uptime_s=now_s - self._started_s,
            blobs=len(sizes),
            blob_nbytes=sum(sizes.values()),
            holding=[self._holding(lease, now_s) for lease in leases],
            open_round=[
                pb.OpenRound(group=key.group, round=key.number, missing=outcome.missing)
                for key, outcome in rounds.items()
                if isinstance(outcome, Pending)
            ],
        )

    def _holding(self, lease: Lease, now_s: float) -> pb.Holding:
        announcement = pb.Announcement.FromString(lease.record.body)
        outline = self._outline(announcement.layout)
        return pb.Holding(
            model=announcement.model,
            source=announcement.source,
            parallel=codec.encode_parallel(outline.parallel),
            nbytes=outline.nbytes,
            pieces=outline.pieces,
            transport=[endpoint.transport for endpoint in announcement.endpoint],
            host=announcement.host,
            attributes=announcement.attributes,
            layout=announcement.layout,
            lease_left_s=lease.expires_s - now_s,
        )

    def dismiss(self) -> None:
        """Send every waiting call home, and let none wait from now on."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            for queues in self._watchers.values():
                for queue in queues:
                    queue.put(None)

    def close(self) -> None:
        self._store.close()
