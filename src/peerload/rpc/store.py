"""What the coordinator remembers over a restart: blobs, records, generations, votes. One SQLite database, in a file or
in memory. `epoch` names that memory: it is new where earlier votes are not remembered.

No expiry is stored: after a restart every lease gets a full `ttl_s`, and what was renewed a second ago need not be
written. Writes survive the death of the process at any point (write-ahead log, one transaction each), not the loss of
power in the last moment; seeds then announce again. Thread-safe.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..directory import FENCE_S, Round
from ..errors import ConfigError, HostError
from ..manifest import SourceId

#: SQLite's typing is dynamic; the schema below says what a row holds.
Row = tuple[Any, ...]

#: Counts the schema's changes. A file of another number is refused, by name.
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS epoch (name TEXT);
CREATE TABLE IF NOT EXISTS blob (digest TEXT PRIMARY KEY, kind INTEGER, nbytes INTEGER, packed BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lease (
    instance TEXT, rank INTEGER, generation TEXT, ttl_s REAL, body BLOB, PRIMARY KEY (instance, rank));
CREATE TABLE IF NOT EXISTS generation (
    instance TEXT, rank INTEGER, generation TEXT, superseded INTEGER, seen_unix_s REAL,
    PRIMARY KEY (instance, rank, generation));
CREATE INDEX IF NOT EXISTS generation_seen ON generation (seen_unix_s);
CREATE TABLE IF NOT EXISTS vote (
    id INTEGER PRIMARY KEY, party TEXT, round INTEGER, rank INTEGER, size INTEGER, payload BLOB, abort TEXT, digest TEXT,
    UNIQUE (party, round, rank, size, digest));
"""


class StoreFailed(HostError):
    """What was to be written was not: a full disk, most of the time."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """`packed`: `nbytes` bytes under zlib."""

    kind: int
    digest: str
    nbytes: int
    packed: bytes


@dataclass(frozen=True, slots=True)
class Vote:
    """`payload` of a yes, or `abort`, the reason of a no."""

    round: Round
    rank: int
    size: int
    payload: bytes = b""
    abort: str | None = None


class Store:
    """`url` is `memory` or `sqlite:PATH`. A file belongs to one coordinator at a time. `wall` tells the Unix time.

    Raises ConfigError for another URL, HostError when the file can't be used."""

    def __init__(self, url: str, wall: Callable[[], float] = time.time) -> None:
        scheme, _, path = url.partition(":")
        if not (url == "memory" or (scheme == "sqlite" and path)):
            raise ConfigError(f"store {url!r} is neither memory nor sqlite:PATH")
        self.url = url
        self._wall = wall
        self._lock = threading.Lock()
        try:
            if path:
                Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=2.0, isolation_level=None, check_same_thread=False)
            # Exclusive: a second coordinator on this file would answer with half of the truth.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,), (tables,) = (
                self._db.execute(query).fetchone() for query in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            if tables and version != _VERSION:
                self._db.close()
                raise HostError(
                    f"store {path} was written by {'a newer' if version > _VERSION else 'another'} peerload: its schema is "
                    f"version {version}, this one reads {_VERSION}",
                    next_step="name another file, or delete this one: running seeds announce themselves again",
                )
            script = f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;"
            self._db.executescript(script)
            self._db.execute("INSERT INTO epoch SELECT ? WHERE NOT EXISTS (SELECT 1 FROM epoch)", (uuid.uuid4().hex,))
            self.epoch = str(self._db.execute("SELECT name FROM epoch").fetchone()[0])
            self.prune()
        except (sqlite3.Error, OSError) as error:
            taken = "locked" in str(error)
            raise HostError(
                f"store {path} can't be used: {error}",
                next_step="another coordinator holds it: stop that one, or name another file" if taken else "name another file",
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Blobs.

    def put_blob(self, blob: StoredBlob) -> None:
        with self._transaction() as db:
            row = (blob.digest, blob.kind, blob.nbytes, blob.packed)
            db.execute("INSERT OR IGNORE INTO blob VALUES (?, ?, ?, ?)", row)

    def blob(self, digest: str) -> StoredBlob | None:
        row = self._row("SELECT kind, nbytes, packed FROM blob WHERE digest = ?", digest)
        return None if row is None else StoredBlob(row[0], digest, row[1], row[2])

    def has_blob(self, digest: str) -> bool:
        return self._row("SELECT 1 FROM blob WHERE digest = ?", digest) is not None

    def blob_sizes(self) -> dict[str, int]:
        """Stored bytes by digest."""
        return {str(digest): int(nbytes) for digest, nbytes in self._rows("SELECT digest, length(packed) FROM blob")}

    def drop_blobs(self, digests: Iterable[str]) -> None:
        with self._transaction() as db:
            db.executemany("DELETE FROM blob WHERE digest = ?", ((digest,) for digest in digests))

    # Leases and generations.

    def save(self, source: SourceId, ttl_s: float, body: bytes) -> None:
        """Let this generation hold its seat; the others are superseded."""
        seat, now_s = (source.instance, source.rank), self._wall()
        with self._transaction() as db:
            db.execute(
                "UPDATE generation SET superseded = 1, seen_unix_s = ? WHERE instance = ? AND rank = ? AND NOT superseded",
                (now_s, *seat),
            )
            db.execute("INSERT OR REPLACE INTO generation VALUES (?, ?, ?, 0, ?)", (*seat, source.generation, now_s))
            db.execute("INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?, ?)", (*seat, source.generation, ttl_s, body))

    def end(self, sources: Iterable[SourceId]) -> None:
        """These no longer hold a lease."""
        rows, now_s = [(s.instance, s.rank, s.generation) for s in sources], self._wall()
        with self._transaction() as db:
            db.executemany("DELETE FROM lease WHERE instance = ? AND rank = ? AND generation = ?", rows)
            db.executemany(
                "UPDATE generation SET seen_unix_s = ? WHERE instance = ? AND rank = ? AND generation = ?",
                ((now_s, *row) for row in rows),
            )

    def prune(self) -> None:
        """Forget the generations that ended longer than FENCE_S ago."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM generation WHERE seen_unix_s < ? AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.instance = "
                "generation.instance AND lease.rank = generation.rank AND lease.generation = generation.generation)",
                (self._wall() - FENCE_S,),
            )

    def leases(self) -> list[tuple[float, bytes]]:
        """(ttl_s, body) of all."""
        return [(ttl_s, body) for ttl_s, body in self._rows("SELECT ttl_s, body FROM lease")]

    def generations(self) -> list[tuple[SourceId, bool]]:
        """All that were ever announced and not forgotten, each with whether it is superseded."""
        rows = self._rows("SELECT instance, rank, generation, superseded FROM generation ORDER BY superseded DESC")
        return [(SourceId(instance, rank, generation), bool(old)) for instance, rank, generation, old in rows]

    # Votes.

    def cast(self, vote: Vote) -> None:
        said = vote.payload if vote.abort is None else vote.abort.encode()
        digest = ("yes " if vote.abort is None else "no ") + hashlib.sha256(said).hexdigest()
        key = (vote.round.group, vote.round.number, vote.rank, vote.size)
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO vote (party, round, rank, size, payload, abort, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, vote.payload, vote.abort, digest),
            )

    def votes(self) -> list[Vote]:
        """In the order in which they were cast, which decides."""
        rows = self._rows("SELECT party, round, rank, size, payload, abort FROM vote ORDER BY id")
        return [Vote(Round(party, number), rank, size, payload, abort) for party, number, rank, size, payload, abort in rows]

    def forget(self, rounds: Iterable[Round]) -> None:
        with self._transaction() as db:
            db.executemany("DELETE FROM vote WHERE party = ? AND round = ?", ((r.group, r.number) for r in rounds))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:  # a COMMIT that fails may have ended it or not
                        self._db.execute("ROLLBACK")
            except sqlite3.Error as error:
                next_step = "look at the disk it lies on"
                raise StoreFailed(f"store {self.url} can't be written: {error}", next_step=next_step) from error

    def _rows(self, query: str) -> list[Row]:
        with self._lock:
            return self._db.execute(query).fetchall()

    def _row(self, query: str, key: str) -> Row | None:
        with self._lock:
            rows: list[Row] = self._db.execute(query, (key,)).fetchall()
        return rows[0] if rows else None
