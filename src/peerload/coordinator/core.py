"""What the coordinator does, without gRPC: `Directory` and `Ballot` under one lock, a store beneath them, a clock beside.

A yes is in the store before it counts, so no decision is told that a restart could change. A no counts at once, and is
stored as soon as the store can be written. Methods take and return messages, since records are kept as they came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from ..errors import ManifestError, PeerloadError
from ..model.catalog import Catalog, ModelKey, Parallel
from ..model.offer import SourceId
from . import codec
from ._generated import peerload_pb2 as pb
from .ballot import Ballot, Outcome, Pending, Round
from .blobs import BlobMissing
from .codec import Blob, Kind
from .directory import Change, Directory, Event, Lease, Record
from .store import Store, StoredBlob, StoreFailed, Vote

log = logging.getLogger(__name__)

#: Calls that may wait at one time; later ones get what there is at once, and ask again.
WAITERS: Final = 4096
#: How long a blob that no live record stands on is kept, seconds: a seed may be about to announce it.
BLOB_KEEP_S: Final = 3600.0
_SWEEP_EVERY_S: Final = 60.0
#: Blobs that one call may ask for by digest: an announcement has four.
_MAX_ASKED: Final = 1024
#: The rows of digests by an algorithm that this release doesn't know: they are kept as they came.
_UNCOUNTED: Final = -1
_MAX_PAYLOAD_NBYTES: Final = 1 << 20
_MAX_REASON: Final = 4096


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


@dataclass(slots=True, eq=False)
class _Waiting:
    """The calls that wait for one round. `outcome`: how it stood when they were woken; `failed`: why that says nothing."""

    woken: threading.Condition
    calls: int = 0
    outcome: Outcome | None = None
    failed: StoreFailed | None = None


class Core:
    """Thread-safe. `clock` gives seconds and never stops while the coordinator runs; no reading of it is stored, so
    the monotonic clock serves, and no jump of the wall clock ends a lease. Owns the store."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._started_s = self._swept_s = clock()
        self._lock = threading.Lock()
        self._decoding = threading.Lock()  # one blob at a time: each may take 64 MiB while it is checked
        self._directory, self._ballot = Directory(), Ballot()
        self._outlines: dict[str, Outline] = {}
        self._digest_rows: dict[str, int] = {}
        self._catalog: tuple[str, Catalog] | None = None
        self._touched_s: dict[str, float] = {}
        self._watchers: dict[ModelKey, set[SimpleQueue[Event | None]]] = {}
        self._rounds: dict[Round, _Waiting] = {}
        self._unsaved: list[Vote] = []  # aborts that the store does not have yet
        self._over: list[Round] = []  # rounds that the store has yet to forget
        self._waiting, self._room = 0, WAITERS
        self._closed = self._failing = False
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
            try:
                self._cast(vote)
            except PeerloadError as error:
                log.warning("forgot a vote of %s: %s", vote.round, error)

    @property
    def waiting(self) -> int:
        """Calls that wait now."""
        with self._lock:
            return self._waiting

    # Blobs.

    def put_blob(self, message: pb.Blob) -> None:
        """Check and keep a blob. Raises ManifestError, and BlobMissing when a layout's catalog isn't here."""
        if not self.missing([message.digest]):
            return
        with self._decoding:
            self._examine(codec.unpack(message))
            with self._lock:
                self._touched_s[message.digest] = self._clock()  # before it is there, or the next sweep may drop it
            self._store.put_blob(StoredBlob(message.kind, message.digest, message.nbytes, message.packed))

    def missing(self, digests: list[str]) -> list[str]:
        """Those not here. The others are kept for BLOB_KEEP_S at least."""
        if len(digests) > _MAX_ASKED:
            raise ManifestError("digest", f"{len(digests)} are asked for, at most {_MAX_ASKED} are allowed")
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

    def _examine(self, blob: Blob) -> Outline | int:
        """Decode, which checks, and keep what announcements are compared with: the outline of a layout, the rows of others."""
        if blob.kind is Kind.CATALOG:
            self._catalog = blob.digest, codec.decode_catalog(blob.data)
            return len(self._catalog[1])
        if blob.kind is Kind.LAYOUT:
            used: list[str] = []

            def catalog_of(digest: str) -> Catalog:
                used.append(digest)
                if self._catalog is None or self._catalog[0] != digest:
                    self._catalog = digest, codec.decode_catalog(self._unpacked(digest, Kind.CATALOG).data)
                return self._catalog[1]

            layout = codec.decode_layout(blob.data, catalog_of)
            outline = Outline(used[0], len(layout.buffer_names), len(layout.pieces), layout.nbytes, layout.parallel)
            self._outlines[blob.digest] = outline
            return outline
        if blob.kind is Kind.DIGESTS:
            column, _ = codec.decode_digests(blob.data)
            self._digest_rows[blob.digest] = rows = _UNCOUNTED if column is None else len(column)
            return rows
        return len(codec.decode_files(blob.data))

    def _outline(self, digest: str) -> Outline:
        outline = self._outlines.get(digest)  # the sweep may take it away at any time
        if outline is None:
            with self._decoding:
                made = self._examine(self._unpacked(digest, Kind.LAYOUT))
            assert isinstance(made, Outline)
            return made
        return outline

    def _rows(self, digest: str) -> int:
        rows = self._digest_rows.get(digest)
        if rows is None:
            with self._decoding:
                made = self._examine(self._unpacked(digest, Kind.DIGESTS))
            assert isinstance(made, int)
            return made
        return rows

    # Leases.

    def announce(self, announcement: pb.Announcement, ttl_s: float) -> None:
        record = self._checked(announcement)
        with self._lock:
            events = self._directory.announce(record, ttl_s, self._clock())
            try:
                self._store.save(record.source, ttl_s, record.body)
            finally:  # it is discovered from now on, so who waits hears of it too
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
            rows = self._rows(announcement.digests)
            if rows not in (outline.pieces, _UNCOUNTED):
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
            waits = self._waiting < self._room and not self._closed
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
        for event in events:
            log.info("%s %s of %s", event.change, event.record.source, event.record.model)
            for queue in self._watchers.get(event.record.model, ()):
                queue.put(event)
        ended = [event.record.source for event in events if event.change is not Change.ANNOUNCED]
        if ended:
            try:
                self._store.end(ended)
            except StoreFailed as error:  # after a restart they would be offered once more, for one `ttl_s`
                log.warning("%s", error)

    # Agreement.

    @property
    def epoch(self) -> str:
        """Names the memory in which votes are kept: new when earlier ones were forgotten."""
        return self._store.epoch

    def agree(self, vote: Vote, wait_s: float) -> Outcome:
        """Cast a vote (again), then wait up to `wait_s` for the decision. Raises BallotFull, and StoreFailed when the vote
        could not be stored and doesn't count."""
        if len(vote.payload) > _MAX_PAYLOAD_NBYTES:
            raise ManifestError("agree.payload", f"has {len(vote.payload)} bytes, at most {_MAX_PAYLOAD_NBYTES} are allowed")
        if vote.abort is not None and len(vote.abort) > _MAX_REASON:
            raise ManifestError("agree.abort", f"has {len(vote.abort)} characters, at most {_MAX_REASON} are allowed")
        with self._lock:
            if vote.abort is None:
                self._save_yes(vote)
                outcome = self._cast(vote)
            else:
                outcome = self._cast(vote)
                self._unsaved.append(vote)
                with suppress(StoreFailed):  # `tick` tries again, and says so
                    self._save_aborts()
            if not isinstance(outcome, Pending):
                self._wake(vote.round)
                return outcome
            return self._decision(vote.round, outcome, wait_s)

    def ask(self, key: Round, rank: int, wait_s: float) -> Outcome | None:
        """What `agree` says to a rank that has voted yes. None: no such vote is known."""
        with self._lock:
            outcome = self._ballot.ask(key, rank, self._clock())
            return self._decision(key, outcome, wait_s) if isinstance(outcome, Pending) else outcome

    def _decision(self, key: Round, outcome: Outcome, wait_s: float) -> Outcome:
        """Wait for it, with the lock, if there is room for one more."""
        if wait_s <= 0 or self._waiting >= self._room or self._closed:
            return outcome
        round_ = self._rounds.setdefault(key, _Waiting(threading.Condition(self._lock)))
        round_.calls += 1
        self._waiting += 1
        try:
            round_.woken.wait(wait_s)
        finally:
            self._waiting -= 1
            round_.calls -= 1
            if not round_.calls and self._rounds.get(key) is round_:
                del self._rounds[key]
        if round_.failed is not None:
            raise StoreFailed(round_.failed.message, next_step=round_.failed.next_step)
        return outcome if round_.outcome is None else round_.outcome

    def _wake(self, key: Round, failed: StoreFailed | None = None) -> None:
        """Whoever waits for this round hears how it stands. They leave it at once, so that later ones wait anew."""
        round_ = self._rounds.pop(key, None)
        if round_ is not None:
            round_.outcome, round_.failed = self._ballot.outcome(key), failed
            round_.woken.notify_all()

    def _save_yes(self, vote: Vote) -> None:
        """Before it counts. When that fails, every rank that waits for it is told so: none may take it for an agreement."""
        self._ballot.check(vote.round, vote.rank, vote.size, vote.payload)
        if not self._ballot.counts(vote.round, vote.rank, vote.size, vote.payload):
            return
        try:
            self._save_aborts()  # the order of votes decides, after a restart as well
            self._store.cast(vote)
        except StoreFailed as error:
            told = StoreFailed(
                f"{vote.round}: the vote of rank {vote.rank} could not be stored, so nobody has agreed: {error.message}",
                next_step="make room on the coordinator's disk, then start the instance again",
            )
            self._wake(vote.round, told)
            raise told from error

    def _save_aborts(self) -> None:
        while self._unsaved:
            self._store.cast(self._unsaved[0])
            del self._unsaved[0]

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
            self._over += self._ballot.expire(now_s)
            try:
                self._tidy(now_s)
            except StoreFailed as error:
                if not self._failing:
                    log.warning("%s", error)
                self._failing = True
            else:
                self._failing = False

    def _tidy(self, now_s: float) -> None:
        """Bring the store up to date."""
        self._save_aborts()
        if self._over:
            self._store.forget(self._over)
            self._over.clear()
        if now_s - self._swept_s >= _SWEEP_EVERY_S:
            self._sweep_blobs(now_s)
            self._store.prune()
            self._swept_s = now_s

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
            self._send_home()

    def narrow(self, room: int) -> None:
        """Let no more than `room` calls wait from now on, and send those home that do: they ask again."""
        with self._lock:
            self._room = max(0, min(room, self._room))
            self._send_home()

    def _send_home(self) -> None:
        for key in list(self._rounds):
            self._wake(key)
        for queues in self._watchers.values():
            for queue in queues:
                queue.put(None)

    def close(self) -> None:
        self._store.close()
