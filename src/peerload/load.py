"""The job: discover, plan, transfer, verify, commit. One target rank loads its weights out of its peers' memory.

First try, lost source, a range that arrived wrong, and disk fallback are the same lines with other arguments: what is
still wanted is planned again over the offers that are still trusted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt

from .config import Config
from .deadline import Deadline
from .digest import DigestArray
from .errors import CommitError, ConfigError, DeadlineExceeded, PeerloadError, PlanError, SourcesExhausted, VerifyError
from .geometry import IntArray
from .manifest import Layout, ModelKey, Offer, SourceId, is_derived
from .memory import Arena
from .plan import Plan, Wants, make_plan
from .receipt import Read, Receipt
from .rpc.client import CoordinatorClient
from .space import space_on
from .transfer import Outcome, Reader
from .transport.base import Region, Transport
from .verify import Claims, Measured, State, Verdict, compare

log = logging.getLogger(__name__)

#: Times a range that arrived wrong is read again before the load is given up.
REREADS = 3
#: What the ranks of an instance exchange goes in parts of this size at most, bytes; all ranks' together are one message.
PART_NBYTES = (1 << 20) - 1
MESSAGE_NBYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """The target rank that loads: rank `rank` of the `size` ranks of `instance`. All ranks commit, or none does.

    launch: the same for all ranks of one life of the instance and new in the next (a run id), so that nobody takes part
    in a vote of the past."""

    instance: str
    rank: int = 0
    size: int = 1
    launch: str = ""

    @property
    def group(self) -> str:
        """Under which its ranks agree at the coordinator."""
        return f"{self.instance}/{self.launch}"


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One rank's load. The caller owns the buffers at `address` [buffers of layout], which lie in `regions` of one device, the
    transports and the coordinator's client (None: read only `reserve`), and keeps them until `load` returns.

    arena: holds all the buffers, and may get pages of a seed on this host in place of its own, so it must be known to no
    device; None: everything is copied. `config.attach` has a say too.
    reserve: offers of last resort, such as a checkpoint on disk, read for what no seed supplies.
    derives: the caller can make derived tensors itself: those that nobody holds are left out, and told in the receipt.
    on_bytes(phase, done, wanted): progress, called from several threads.
    complete(left): what the caller does with the proven bytes before the instance commits, such as making the derived tensors
    `left`; if it raises on any rank, no rank commits. None: nothing; all ranks of an instance have one, or none has."""

    model: ModelKey
    layout: Layout
    address: IntArray
    regions: Sequence[Region]
    member: Member
    transports: Mapping[str, Transport]
    config: Config
    coordinator: CoordinatorClient | None = None
    arena: Arena | None = None
    reserve: Sequence[Offer] = ()
    derives: bool = False
    on_bytes: Callable[[str, int, int], None] = lambda *_: None
    complete: Callable[[tuple[str, ...]], None] | None = None


def load(job: Job) -> Receipt:
    """Fill the buffers. Returns when every rank of the instance holds proven bytes; raises otherwise, on every rank."""
    if job.member.size > 1 and job.coordinator is None:
        raise ConfigError("several ranks can't agree without a coordinator", next_step="give its url")
    run = _Run(job, Deadline.after(job.config.deadline_s))
    try:
        offers = run.discover()
        with run.registered() as reader:
            wants = Wants.of(job.layout)
            while True:
                run.fetch(wants, offers, reader)
                verdict = run.verify(offers)
                if run.all_agree(verdict):
                    run.complete()
                    return run.receipt(verdict)
                wants = run.doubted(verdict)
    except BaseException as error:
        run.abort(error)
        raise


@dataclass(slots=True)
class _Filled:
    """What has been read so far, as columns that grow: boxes of layout pieces, whom they came from, their digests."""

    piece: IntArray
    start: IntArray
    stop: IntArray
    source: IntArray
    digest: DigestArray

    @classmethod
    def nothing(cls, width: int) -> _Filled:
        none, boxes = np.zeros(0, np.int64), np.zeros((0, width), np.int64)
        return cls(none, boxes, boxes, none, np.zeros(0, np.uint64))

    def __len__(self) -> int:
        return len(self.piece)

    def take(self, rows: npt.NDArray[np.generic]) -> _Filled:
        return _Filled(self.piece[rows], self.start[rows], self.stop[rows], self.source[rows], self.digest[rows])

    def add(self, piece: IntArray, start: IntArray, stop: IntArray, source: IntArray, digest: DigestArray) -> None:
        self.piece, self.source = np.append(self.piece, piece), np.append(self.source, source)
        self.start, self.stop = np.concatenate([self.start, start]), np.concatenate([self.stop, stop])
        self.digest = np.append(self.digest, digest)


class _Run:
    """The state of one `load`: what is filled, who is lost, who is mistrusted, and how long each phase took."""

    def __init__(self, job: Job, deadline: Deadline) -> None:
        self.job, self.deadline = job, deadline
        self.space = space_on(job.regions[0].device if job.regions else "cpu")
        self.begun_s = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.filled = _Filled.nothing(job.layout.catalog.width)
        self.sources: list[str] = []
        self.read_from: dict[str, Read] = {}
        self.everybody: dict[str, Read] = {}
        self.failures: dict[SourceId, str] = {}
        self.suspicion: dict[str, int] = {}
        self.wire_nbytes = self.attached_nbytes = self.operations = self.staging_nbytes = self.reread_nbytes = 0
        self.round = self.rereads = self.hashed = 0
        self.left: set[str] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def discover(self) -> list[Offer]:
        """Everyone who holds this model, whatever their layout; waits up to `wait_s` until they hold all we want."""
        job, coordinator = self.job, self.job.coordinator
        if coordinator is None:
            return []

        def others(offers: Sequence[Offer]) -> list[Offer]:
            return [o for o in offers if o.source.instance != job.member.instance]

        def enough(offers: Sequence[Offer]) -> bool:
            try:
                make_plan(job.layout, others(offers), match=job.config.match)
            except PlanError:
                return False
            return True

        with self.phase("discover"):
            if job.config.wait_s > 0:
                try:
                    return others(coordinator.wait_for(job.model, self.deadline.within(job.config.wait_s), enough))
                except DeadlineExceeded:
                    if not self._reserve or self.deadline.remaining_s == 0:
                        raise
            return others(coordinator.discover(job.model))

    @contextmanager
    def registered(self) -> Iterator[Reader]:
        """Our buffers and staging memory known to every transport, constants written."""
        job = self.job
        with Reader(
            job.transports, job.config.staging_bytes, job.arena if job.config.attach else None, self.space,
            reserve=job.reserve, stall_s=job.config.stall_s, keep_unfenced=job.config.verifies,
        ) as reader:  # fmt: skip
            with self.phase("register"):
                for transport in self.job.transports.values():
                    transport.register([*self.job.regions, *reader.regions()])
                for constant in self.job.layout.constants:
                    self.space.fill(constant, self.job.address)
            yield reader

    def fetch(self, wants: Wants, offers: Sequence[Offer], reader: Reader) -> None:
        """Read all of `wants`; a source that fails gives its remainder back to the planner."""
        total, done, lock = wants.nbytes, 0, Lock()

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                now = min(done, total)  # staging and second tries move more than is wanted
            self.job.on_bytes("transfer", now, total)

        while len(wants) or wants.opaque:
            with self.phase("plan"):
                plan = self._plan(wants, offers)
            with self.phase("transfer"):
                outcome = reader.read(plan, self.job.address, self.deadline, on_bytes)
            self._note(plan, outcome)
            wants = plan.rest(outcome.undone, outcome.undone_opaques)

    @property
    def _reserve(self) -> list[Offer]:
        return list(self.job.reserve) if self.job.config.fallback == "disk" else []

    def _plan(self, wants: Wants, offers: Sequence[Offer]) -> Plan:
        """Over the instances that were never wrong; when those don't suffice, with one suspect more at a time, so that
        what was wrong is read whole from one that can be told right from wrong."""
        config, member = self.job.config, self.job.member
        seeds, reserve = ([o for o in some if o.source not in self.failures] for some in (offers, self._reserve))
        suspicion = {o.source.instance: self.suspicion.get(o.source.instance, 0) for o in (*seeds, *reserve)}
        order = sorted(suspicion, key=lambda instance: (suspicion[instance], instance))
        trusted = sum(count == 0 for count in suspicion.values())
        while True:
            usable, last = ([o for o in some if o.source.instance in order[:trusted]] for some in (seeds, reserve))
            try:
                return make_plan(wants, usable, reserve=last, match=config.match, salt=f"{member.instance}/{member.rank}")
            except PlanError as error:
                left = self._leave(wants, error)  # rather than trust a suspect
                if len(left) < len(wants):
                    wants = left
                    continue
                trusted += 1
                if trusted > len(order):
                    raise self._exhausted(error) from error

    def _leave(self, wants: Wants, error: PlanError) -> Wants:
        """Without the derived tensors that nobody can supply, if the caller can make them."""
        lacking = {hole.tensor for hole in error.holes if self.job.derives and is_derived(hole.tensor)}
        self.left |= lacking
        names = wants.layout.catalog.names
        kept = np.array([names[tensor] not in lacking for tensor in wants.tensor.tolist()], np.bool_)
        return Wants(wants.layout, wants.piece[kept], wants.start[kept], wants.stop[kept], wants.opaque)

    def _exhausted(self, error: PlanError) -> PeerloadError:
        if not self.failures:
            return error
        lost = "; ".join(f"{source} ({problem})" for source, problem in self.failures.items())
        return SourcesExhausted(f"rank {self.job.member.rank} lost {lost}, and nobody else can supply the rest\n{error.message}",
                                next_step="start another seed, or allow fallback=disk")  # fmt: skip

    def _note(self, plan: Plan, outcome: Outcome) -> None:
        for source, error in outcome.failures.items():
            log.warning("peerload: rank %d: %s; planning the rest anew", self.job.member.rank, error.message)
            self.failures[source] = error.problem
        done = np.setdiff1d(np.arange(len(plan)), outcome.undone)
        names = [str(o.source) for o in plan.offers]
        self.sources += [name for name in names if name not in self.sources]
        number = np.array([self.sources.index(name) for name in names], np.int64)
        piece, start, stop = plan.wants.piece[plan.want[done]], plan.start[done], plan.stop[done]
        self.filled.add(piece, start, stop, number[plan.offer[done]], np.zeros(len(done), np.uint64))
        nbytes = np.bincount(plan.offer[done], plan.copy_nbytes[done], len(names)).astype(np.int64)
        copies = np.bincount(plan.offer[done], minlength=len(names))
        for row, offer, _ in plan.opaque:
            if row not in outcome.undone_opaques:
                nbytes[offer] += plan.wants.layout.opaques[row].nbytes
                copies[offer] += 1
        for name, size, count in zip(names, nbytes.tolist(), copies.tolist(), strict=True):
            if count:
                before = self.read_from.get(name, Read(0, 0))
                self.read_from[name] = Read(before.nbytes + size, before.operations + count)
        self.wire_nbytes += outcome.wire_nbytes
        self.attached_nbytes += outcome.attached_nbytes
        self.operations += outcome.operations
        self.staging_nbytes = max(self.staging_nbytes, outcome.staging_nbytes)

    def verify(self, offers: Sequence[Offer]) -> Verdict:
        """Hash what arrived since the last time, exchange the numbers with the other ranks, and compare all of them with
        what the sources announced."""
        catalog, filled = self.job.layout.catalog, self.filled
        with self.phase("verify"):
            if self.job.config.verifies:
                filled.digest[self.hashed :] = self._hash(filled.take(np.arange(self.hashed, len(filled))))
                self.hashed = len(filled)
            else:
                filled = _Filled.nothing(catalog.width)
            rank = np.full(len(filled), self.job.member.rank)
            tensor = self.job.layout.pieces.tensor[filled.piece]
            sources = tuple(self.sources)
            mine = Measured(catalog, rank, tensor, filled.start, filled.stop, filled.digest, filled.source, sources)
        parts = self._exchange(mine.encode())
        with self.phase("verify"):
            measured = Measured.join([Measured.decode(part, catalog) for part in parts])
            read = set(measured.sources)
            return compare(Claims.of(measured.catalog, [o for o in offers if str(o.source) in read]), measured)

    def _hash(self, boxes: _Filled) -> DigestArray:
        pieces, tensor = self.job.layout.pieces, self.job.layout.pieces.tensor[boxes.piece]
        stride = pieces.stride[boxes.piece]
        address = self.job.address[pieces.buffer[boxes.piece]] + pieces.offset[boxes.piece]
        address = address + ((boxes.start - pieces.start[boxes.piece]) * stride).sum(axis=1)
        catalog, threads = self.job.layout.catalog, self.job.config.threads
        return self.space.digest(catalog, tensor, boxes.start, boxes.stop, address, stride, threads)

    def all_agree(self, verdict: Verdict) -> bool:
        """Commit if every rank is content. Raises VerifyError when sources contradict each other, or when ranges have
        arrived wrong too often."""
        if verdict.contradictions:
            raise VerifyError(
                "the sources hold different weights\n" + _listed(verdict.contradictions),
                next_step="withdraw the seed that is wrong, or give the weights different revisions",
            )
        said = {"doubts": [str(m) for m in verdict.mismatches[:20]], "read": self.read_from}
        told = [json.loads(part) for part in self._exchange(json.dumps(said).encode())]
        self.everybody = {}
        for name, (nbytes, operations) in (item for rank in told for item in rank["read"].items()):
            before = self.everybody.get(name, Read(0, 0))
            self.everybody[name] = Read(before.nbytes + nbytes, before.operations + operations)
        doubts = [line for rank in told for line in rank["doubts"]]
        if doubts and self.rereads >= REREADS:
            raise VerifyError(
                f"after {REREADS + 1} reads, bytes are still wrong\n" + _listed(sorted(set(doubts))),
                next_step="withdraw the seed that all of them were read from, or look at this host's memory and network",
            )
        return not doubts

    def complete(self) -> None:
        """The caller's own last step, and the vote on it."""
        if self.job.complete is not None:
            with self.phase("complete"):
                self.job.complete(tuple(sorted(self.left)))
            self._exchange(b"")

    def doubted(self, verdict: Verdict) -> Wants:
        """What this rank has to read again, from elsewhere if anybody else has it."""
        for mismatch in verdict.mismatches:
            log.warning("peerload: rank %d: %s; reading it again", self.job.member.rank, mismatch)
        self.rereads += 1
        wrong = verdict.wrong(self.job.member.rank)
        bad, layout = self.filled.take(wrong), self.job.layout
        self._suspect(verdict)
        self.filled = self.filled.take(np.setdiff1d(np.arange(len(self.filled)), wrong))
        self.hashed = len(self.filled)
        wants = Wants(layout, bad.piece, bad.start, bad.stop)
        self.reread_nbytes += wants.nbytes
        return wants

    def _suspect(self, verdict: Verdict) -> None:
        """Count against instances, in the same way on every rank, what they had part in; most if nobody else had."""
        for mismatch in verdict.mismatches:
            instances = {name.rpartition("/rank ")[0] for name in mismatch.sources}
            for instance in instances:
                self.suspicion[instance] = self.suspicion.get(instance, 0) + (1000 if len(instances) == 1 else 1)

    def _exchange(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank, once all have sent theirs. Raises CommitError if one has given up."""
        member, coordinator = self.job.member, self.job.coordinator
        if coordinator is None or member.size == 1:
            return [payload]
        step = min(PART_NBYTES, MESSAGE_NBYTES // member.size)
        parts = [payload[at : at + step] for at in range(0, len(payload), step)] or [b""]
        heard: list[bytes] = [b""] * member.size
        more = True
        with self.phase("commit"):
            while more:  # until nobody's payload has another part: its first byte says so
                part = parts.pop(0) if parts else b""
                said = (b"+" if parts else b".") + part
                answers = coordinator.agree(self.job.member.group, self.round, member.rank, member.size, said, self.deadline)
                self.round += 1
                heard = [old + new[1:] for old, new in zip(heard, answers, strict=True)]
                more = any(new[:1] == b"+" for new in answers)
        return heard

    def abort(self, error: BaseException) -> None:
        """Let the other ranks know, so that none of them waits or serves."""
        member, coordinator = self.job.member, self.job.coordinator
        if coordinator is None or member.size == 1 or isinstance(error, CommitError):
            return
        reason = error.message if isinstance(error, PeerloadError) else f"{type(error).__name__}: {error}"
        try:
            for number in (self.round, self.round + 1):  # the others may have agreed on this round without our hearing of it
                coordinator.abort(self.job.member.group, number, member.rank, member.size, reason)
        except PeerloadError as unheard:
            log.warning("peerload: rank %d could not tell the others that it gave up: %s", member.rank, unheard.message)

    def receipt(self, verdict: Verdict) -> Receipt:
        rank = self.job.member.rank
        proven = verdict.nbytes(State.PROVEN, rank)
        layout = self.job.layout
        left = [row for row in layout.written.tolist() if layout.tensor_of(row).name in self.left]
        needed = Wants.of(layout).nbytes - int(layout.piece_nbytes[left].sum())
        return Receipt(
            model=str(self.job.model), rank=rank, sources=dict(self.read_from), instance=self.everybody, needed_nbytes=needed,
            wire_nbytes=self.wire_nbytes, operations=self.operations, attached_nbytes=self.attached_nbytes,
            seconds=dict(self.seconds), wall_s=time.perf_counter() - self.begun_s,
            verified_nbytes=proven, unverified_nbytes=needed - proven, reread_nbytes=self.reread_nbytes,
            staging_nbytes=self.staging_nbytes, digest=verdict.digest, digest_tensors=verdict.digest_tensors,
            left=tuple(sorted(self.left)),
        )  # fmt: skip


def _listed(rows: Sequence[object]) -> str:
    more = f"\n  ... and {len(rows) - 10} more" if len(rows) > 10 else ""
    return "\n".join(f"  {row}" for row in rows[:10]) + more
