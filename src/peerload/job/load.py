"""The job: discover, plan, transfer, verify, commit. One target rank loads its weights out of its peers' memory.

First try, lost source, a range that arrived wrong, and disk fallback are the same lines with other arguments: what is
still wanted is planned again over the offers that are still trusted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import (
    ConfigError,
    CoordinatorError,
    DeadlineExceeded,
    PeerloadError,
    PlanError,
    Refusal,
    SourceError,
    SourcesExhausted,
    SourceStale,
    SourceStalled,
    VerifyError,
)
from ..integrity.claims import Claims, Measured
from ..integrity.digest import DigestArray
from ..integrity.verdict import State, Verdict, compare
from ..memory.arena import Arena
from ..memory.region import Region
from ..memory.space import space_on
from ..model.boxes import BoolArray, IntArray
from ..model.catalog import ModelKey, is_derived
from ..model.layout import Layout
from ..model.offer import Offer, SourceId
from ..planning.plan import Plan, make_plan
from ..planning.wants import Wants
from ..receipt import Read, Receipt
from ..transport.base import Transport
from ..transport.process import boot_id
from .exchange import Finding, Group
from .ledger import Ledger, Rows
from .reader import Outcome, Reader

log = logging.getLogger(__name__)

#: Times a range that arrived wrong is read again before the load is given up.
REREADS = 3
#: Times a load begins anew with other sources, because weights have changed or sources have gone.
RESTARTS = 5
#: A source that changes its weights has announced them again within this time, or is given up, seconds.
CHANGE_S = 10.0
#: One more look at who is there takes no longer, seconds.
LOOK_S = 5.0


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
    """Fill the buffers. Returns when every rank of the instance holds its bytes, proven as `config.verify` asks. Raises
    otherwise, on every rank, a little after `config.deadline_s` at the latest."""
    if job.member.size > 1 and job.coordinator is None:
        raise ConfigError("several ranks can't agree without a coordinator", next_step="give its url")
    run = _Run(job, Deadline.after(job.config.deadline_s))
    try:
        run.discover()
        with run.registered() as reader:
            wants = Wants.of(job.layout)
            while True:
                run.fetch(wants, reader)
                measured = run.measure()
                skewed = measured.skewed()
                if skewed:
                    wants = run.refreshed(skewed)
                    continue
                verdict = run.judge(measured)
                wrong = run.wrong(verdict)
                if wrong is None:
                    run.complete()
                    return run.receipt(verdict)
                wants = run.doubted(verdict, wrong)
    except BaseException as error:
        run.group.abort(error)
        raise


class _Run:
    """The state of one `load`: what is filled, who is there, lost or mistrusted, and how long each phase took."""

    def __init__(self, job: Job, deadline: Deadline) -> None:
        self.job, self.deadline = job, deadline
        member = job.member
        self.group = Group(member.group, member.rank, member.size, job.coordinator, deadline)
        self.space = space_on(job.regions[0].device if job.regions else "cpu")
        self.begun_s = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.ledger = Ledger(job.layout)
        self.offers: list[Offer] = []  # those that may be read, as they were when we last looked
        self.known: dict[SourceId, Offer] = {}  # all that were ever seen: what they announced still proves what they gave
        self.refusals: dict[SourceId, Refusal] = {}
        self.failures: dict[SourceId, SourceError] = {}
        self.forgiven: set[SourceId] = set()  # they stood still once
        self.suspicion: dict[str, int] = {}
        self.everybody: dict[str, Read] = {}
        self.wire_nbytes = self.attached_nbytes = self.operations = self.staging_nbytes = self.reread_nbytes = 0
        self.rereads = self.restarts = self.looks = 0
        self.left: set[str] = set()
        self.changing = False  # somebody's weights, which are soon announced again

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    # Who is there.

    def discover(self) -> None:
        """Everyone who holds this model, whatever their layout; waits up to `wait_s` until they hold all that seeds will ever
        give us."""
        job = self.job
        if job.coordinator is None:
            return
        with self.phase("discover"):
            if job.config.wait_s > 0:
                wants = Wants.of(job.layout)
                try:
                    waited = self.deadline.within(job.config.wait_s)
                    self._seen(job.coordinator.wait_for(job.model, waited, lambda offers: self._enough(wants, offers)))
                except DeadlineExceeded:
                    if not self._reserve or self.deadline.remaining_s == 0:
                        raise
                except CoordinatorError:  # it was away for all of that time; there is more
                    pass
                else:
                    return
            self._seen(job.coordinator.discover(job.model, self.deadline))

    def _seen(self, offers: Sequence[Offer]) -> None:
        """These are there now, besides ourselves. Says whom we can't use, once."""
        self.offers, refused = self._usable(offers)
        self.known.update((o.source, o) for o in offers)
        new = [r for source, r in refused.items() if source not in self.refusals]
        self.refusals.update(refused)
        if new:
            log.warning("peerload: rank %d leaves out %d sources\n%s", self.job.member.rank, len(new), _listed(new))

    def _usable(self, offers: Sequence[Offer]) -> tuple[list[Offer], dict[SourceId, Refusal]]:
        found, refused = [], {}
        newest: dict[str, int] = {}
        for source in (o.source for o in offers):
            newest[source.instance] = max(source.changes, newest.get(source.instance, 0))
        for offer in offers:
            if offer.source.instance == self.job.member.instance:
                continue
            reason = self._unusable(offer)
            if offer.source.changes < newest[offer.source.instance]:
                reason = "still announces weights that other ranks of its instance have changed"
                self.changing = True
            if reason:
                refused[offer.source] = Refusal(str(offer.source), reason)
            else:
                found.append(offer)
        return found, refused

    def _unusable(self, offer: Offer) -> str:
        """Why an offer can't be read from here, or an empty string."""
        if any(offer.source == own.source for own in self.job.reserve):  # its failure would be taken for the checkpoint's
            return "announces itself under the name of this host's own checkpoint"
        if self.job.config.verifies and offer.binding.digests is None:
            return "announces no digests, so nothing would prove its bytes (start it with verify on, or set verify to off here)"
        ours, theirs = self.job.transports, [e.transport for e in offer.binding.endpoints]
        if not any(name in ours for name in theirs):
            return f"it offers {', '.join(theirs) or 'no transport'}, here is {', '.join(ours) or 'none'}"
        elsewhere = offer.binding.host not in ("", boot_id())
        if elsewhere and all(ours[name].limits.same_host for name in theirs if name in ours):
            return f"is on another host, and offers {', '.join(theirs)} only"
        return ""

    def _enough(self, wants: Wants, offers: Sequence[Offer]) -> bool:
        """Do they hold all of `wants` that seeds will ever hold? What the caller makes itself is not waited for, nor what all of
        their ranks have given up (post-processing has rewritten it) and the reserve has."""
        usable, _ = self._usable(offers)
        usable = [o for o in usable if o.source not in self.failures]
        match = self.job.config.match
        try:
            make_plan(wants, usable, match=match)
        except PlanError as error:
            holes = {hole.tensor for hole in error.holes}
        else:
            return True
        holes = {name for name in holes if not (self.job.derives and is_derived(name))}
        gone = {name for offer in usable for name in offer.layout.ignored}
        if not usable or not holes <= gone:
            return False
        reserve = [o for o in self._reserve if o.source not in self.failures]
        try:
            make_plan(_without(wants, {n for n in wants.layout.catalog.names if n not in holes}), [], reserve=reserve)
        except PlanError:
            return not holes
        return True

    def _anew(self, wants: Wants) -> bool:
        """Look again who is there, now that nobody is left for `wants`. Is there somebody new who has it? A source that changes
        its weights gets a little time to announce them, and one that stood still is tried once more."""
        if self.job.coordinator is None or self.looks >= RESTARTS:
            return False
        self.looks += 1
        failures = self.failures
        again = {s for s, error in failures.items() if isinstance(error, SourceStalled)} - self.forgiven
        self.failures = {s: error for s, error in failures.items() if s not in again}
        found = self._found(self.job.coordinator, wants)
        if found:
            self.forgiven |= again
        else:
            self.failures = failures
        return found

    def _found(self, coordinator: CoordinatorClient, wants: Wants) -> bool:
        """Is there anybody who has not failed and has `wants`?"""
        model = self.job.model
        stale = self.changing or any(isinstance(error, SourceStale) for error in self.failures.values())
        left_s = self.job.config.wait_s - (time.perf_counter() - self.begun_s)
        patience_s = max(left_s, CHANGE_S if stale else 0.0)

        def suffices(offers: Sequence[Offer]) -> bool:
            return self._enough(wants, offers)

        try:
            with self.phase("discover"):
                offers = coordinator.discover(model, self.deadline.within(LOOK_S))
                if not suffices(offers):
                    if patience_s <= 0:
                        return False
                    offers = coordinator.wait_for(model, self.deadline.within(patience_s), suffices)
        except (CoordinatorError, DeadlineExceeded) as error:
            log.info("peerload: rank %d found nobody new: %s", self.job.member.rank, error.message)
            return False
        self._seen(offers)
        return True

    # What is read.

    @contextmanager
    def registered(self) -> Iterator[Reader]:
        """Our buffers and staging memory known to every transport, constants written."""
        job = self.job
        with Reader(
            job.transports,
            job.config.staging_bytes,
            job.arena if job.config.attach else None,
            self.space,
            reserve=job.reserve,
            stall_s=job.config.stall_s,
            keep_unfenced=job.config.verifies,
        ) as reader:
            with self.phase("register"):
                for transport in self.job.transports.values():
                    transport.register([*self.job.regions, *reader.regions()])
                for constant in self.job.layout.constants:
                    self.space.fill(constant, self.job.address)
            yield reader

    def fetch(self, wants: Wants, reader: Reader) -> None:
        """Read all of `wants`; a source that fails gives its remainder back to the planner."""
        total, done, lock = wants.nbytes, 0, Lock()

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                now = min(done, total)  # staging and second tries move more than is wanted
            self.job.on_bytes("transfer", now, total)

        while len(wants):
            try:
                with self.phase("plan"):
                    plan = self.plan(wants)
            except (PlanError, SourcesExhausted):
                if not self._anew(wants):
                    raise
                continue
            with self.phase("transfer"):
                outcome = reader.read(plan, self.job.address, self.deadline, on_bytes)
            self._note(plan, outcome)
            wants = plan.rest(outcome.undone)

    @property
    def _reserve(self) -> list[Offer]:
        return list(self.job.reserve) if self.job.config.fallback == "disk" else []

    def plan(self, wants: Wants) -> Plan:
        """Over the instances that were never wrong; when those don't suffice, with one suspect more at a time, so that
        what was wrong is read whole from one that can be told right from wrong."""
        config, member = self.job.config, self.job.member
        wants = _without(wants, self.left)  # for good: a part of one that had come was dropped
        seeds, reserve = ([o for o in some if o.source not in self.failures] for some in (self.offers, self._reserve))
        suspicion = {o.source.instance: self.suspicion.get(o.source.instance, 0) for o in (*seeds, *reserve)}
        order = sorted(suspicion, key=lambda instance: (suspicion[instance], instance))
        trusted = sum(count == 0 for count in suspicion.values())
        refused, salt = tuple(self.refusals.values()), f"{member.instance}/{member.rank}"
        while True:
            usable, last = ([o for o in some if o.source.instance in order[:trusted]] for some in (seeds, reserve))
            try:
                return make_plan(wants, usable, reserve=last, match=config.match, salt=salt, refused=refused)
            except PlanError as error:
                left = self._leave(wants, error)  # rather than trust a suspect
                if len(left) < len(wants):
                    wants = left
                    continue
                trusted += 1
                if trusted > len(order):
                    raise self._exhausted(error) from error

    def _leave(self, wants: Wants, error: PlanError) -> Wants:
        """Without the derived tensors that nobody can supply, if the caller can make them. It makes them whole, so what has come
        of them counts for nothing."""
        lacking = {hole.tensor for hole in error.holes if self.job.derives and is_derived(hole.tensor)}
        self.left |= lacking
        if lacking:
            self.ledger.drop(_of(wants.layout, self.ledger.rows.piece, lacking))
        return _without(wants, lacking)

    def _exhausted(self, error: PlanError) -> PeerloadError:
        if not self.failures:
            return error
        lost = "; ".join(f"{source} ({problem.problem})" for source, problem in self.failures.items())
        return SourcesExhausted(
            f"rank {self.job.member.rank} lost {lost}, and nobody else can supply the rest\n{error.message}",
            next_step="start another seed, or allow fallback=disk",
        )

    def _note(self, plan: Plan, outcome: Outcome) -> None:
        for source, error in outcome.failures.items():
            log.warning("peerload: rank %d: %s; planning the rest anew", self.job.member.rank, error.message)
            self.failures[source] = error
        reserve = {o.source for o in self._reserve}
        number = self.ledger.numbers(replace(o.source, generation="") if o.source in reserve else o.source for o in plan.offers)
        done = np.setdiff1d(np.arange(len(plan)), outcome.undone)
        self.ledger.add(plan.wants.piece[plan.want[done]], plan.start[done], plan.stop[done], number[plan.offer[done]])
        self.wire_nbytes += outcome.wire_nbytes
        self.attached_nbytes += outcome.attached_nbytes
        self.operations += outcome.operations
        self.staging_nbytes = max(self.staging_nbytes, outcome.staging_nbytes)

    # What it is worth.

    def measure(self) -> Measured:
        """Hash what arrived since the last time, and exchange with the other ranks the numbers and the sources: without `verify`
        the sources alone."""
        catalog, ledger, member = self.job.layout.catalog, self.ledger, self.job.member
        with self.phase("verify"):
            rows = ledger.rows
            if self.job.config.verifies:
                new = np.flatnonzero(~rows.hashed)
                rows.digest[new] = self._hash(rows.take(new))
                rows.hashed[new] = True
            else:
                rows = rows.take(np.zeros(len(rows), np.bool_))
            used = np.unique(ledger.rows.source)  # what was dropped came from nobody
            sources = tuple(ledger.sources[number] for number in used.tolist())
            mine = Measured(
                catalog,
                np.full(len(rows), member.rank),
                self.job.layout.pieces.tensor[rows.piece],
                rows.start,
                rows.stop,
                rows.digest,
                np.searchsorted(used, rows.source),
                sources,
            )
            said = mine.encode()
        with self.phase("commit"):
            parts = self.group.tell(said)
        with self.phase("verify"):
            return mine if len(parts) == 1 else Measured.join(self._decoded(parts))

    def _decoded(self, parts: Sequence[bytes]) -> list[Measured]:
        """Every rank's measurements. Raises CommitError, naming the rank, for what none can have sent."""
        catalog, heard = self.job.layout.catalog, []
        known = {spec.name: spec for spec in catalog}
        for rank, part in enumerate(parts):
            try:
                one = Measured.decode(part, catalog)
            except VerifyError as error:
                raise self.group.nonsense(rank, error.message) from error
            if (one.rank != rank).any():
                raise self.group.nonsense(rank, "measurements of another rank")
            if one.catalog != catalog and any(known.setdefault(spec.name, spec) != spec for spec in one.catalog):
                raise self.group.nonsense(rank, "a derived tensor that another rank knows in another dtype or shape")
            heard.append(one)
        return heard

    def _hash(self, boxes: Rows) -> DigestArray:
        pieces, tensor = self.job.layout.pieces, self.job.layout.pieces.tensor[boxes.piece]
        stride = pieces.stride[boxes.piece]
        address = self.job.address[pieces.buffer[boxes.piece]] + pieces.offset[boxes.piece]
        address = address + ((boxes.start - pieces.start[boxes.piece]) * stride).sum(axis=1)
        catalog, threads = self.job.layout.catalog, self.job.config.threads
        return self.space.digest(catalog, tensor, boxes.start, boxes.stop, address, stride, threads)

    def refreshed(self, skewed: Collection[str]) -> Wants:
        """The ranks have read different generations of the instances `skewed`, and all of them know. What of these is no longer
        on offer has to be read again."""
        names, member = ", ".join(sorted(skewed)), self.job.member
        if self.restarts >= RESTARTS:
            raise SourcesExhausted(
                f"the weights of {names} changed {RESTARTS + 1} times while the ranks of {member.instance} read them",
                next_step="load from seeds that don't change, or change them less often",
            )
        self.restarts += 1
        self.changing = True
        log.warning("peerload: rank %d: the ranks have read different generations of %s; discovering again", member.rank, names)
        assert self.job.coordinator is not None, "there are other ranks"
        with self.phase("discover"):
            self._seen(self.job.coordinator.discover(self.job.model, self.deadline))
        current = {o.source for o in self.offers}
        stale = np.array([s.instance in skewed and s not in current for s in self.ledger.sources], np.bool_)
        return self._again(stale[self.ledger.rows.source])

    def _again(self, rows: BoolArray) -> Wants:
        """Forget these rows of the ledger; returns what they were."""
        gone = self.ledger.drop(rows)
        return Wants(self.job.layout, gone.piece, gone.start, gone.stop)

    def judge(self, measured: Measured) -> Verdict:
        """Compare all ranks' numbers with what the sources announced, each in the generation that was read."""
        if not self.job.config.verifies:
            return compare(Claims.of(measured.catalog, []), measured)
        if any(s.generation and s not in self.known for s in measured.sources):  # it came after we had looked
            assert self.job.coordinator is not None, "another rank has read from it"
            with self.phase("discover"):
                self._seen(self.job.coordinator.discover(self.job.model, self.deadline))
        with self.phase("verify"):
            claims = Claims.of(measured.catalog, [self.known[s] for s in measured.sources if s in self.known])
            return compare(claims, measured)

    def wrong(self, verdict: Verdict) -> IntArray | None:
        """Which of our rows have to be read again, as all ranks find; None to commit, if every rank is content with all of them.
        Raises VerifyError when sources contradict each other, or when ranges have arrived wrong too often."""
        if verdict.contradictions:
            raise VerifyError(
                "the sources hold different weights\n" + _listed(verdict.contradictions),
                next_step="withdraw the seed that is wrong, or give the weights different revisions",
            )
        member, ranks = self.job.member, range(self.group.size)
        wrong = {rank: verdict.wrong(rank).tolist() for rank in (ranks if len(ranks) > 1 else [member.rank])}
        doubted = [str(m) for m in verdict.mismatches]
        unvouched = self._unvouched(verdict)
        if len(unvouched):
            wrong[member.rank] += unvouched.tolist()
            doubted.append(f"rank {member.rank}: {len(unvouched)} boxes that no digest covers came from sources lost since")
        finding = Finding(doubted, wrong, self.ledger.read())
        with self.phase("commit"):
            parts = self.group.tell(finding.encode())
        counts = np.bincount(verdict.measured.rank, minlength=max(wrong) + 1).tolist()
        told: list[Finding] = []
        for rank, part in enumerate(parts):
            try:
                told.append(Finding.decode(part, counts))
            except ValueError as error:
                raise self.group.nonsense(rank, error) from error
        self.everybody = {}
        for name, read in (item for one in told for item in one.read.items()):
            before = self.everybody.get(name, Read(0, 0))
            self.everybody[name] = Read(before.nbytes + read.nbytes, before.operations + read.operations)
        doubts = {line for one in told for line in one.doubts}
        if doubts and self.rereads >= REREADS:
            raise VerifyError(
                f"after {REREADS + 1} reads, bytes are still wrong\n" + _listed(sorted(doubts)),
                next_step="withdraw the seed that all of them were read from, or look at this host's memory and network",
            )
        if not doubts:
            return None
        return np.array(sorted({row for one in told for row in one.wrong.get(member.rank, ())}), np.int64)

    def _unvouched(self, verdict: Verdict) -> IntArray:
        """Our rows that neither a digest nor a fence vouches for: a source was lost before its closing fence was read, and what
        it gave is no whole box of what was announced."""
        if not self.job.config.verifies:
            return np.zeros(0, np.int64)
        lost = np.array([source in self.failures for source in self.ledger.sources], np.bool_)[self.ledger.rows.source]
        state = verdict.state[verdict.measured.rank == self.job.member.rank]
        return np.flatnonzero(lost & (state == State.UNPROVEN))

    def complete(self) -> None:
        """The caller's own last step, and the vote on it."""
        if self.job.complete is not None:
            with self.phase("complete"):
                self.job.complete(tuple(sorted(self.left)))
            with self.phase("commit"):
                self.group.tell(b"")

    def doubted(self, verdict: Verdict, wrong: IntArray) -> Wants:
        """What this rank has to read again, from elsewhere if anybody else has it."""
        for mismatch in verdict.mismatches:
            log.warning("peerload: rank %d: %s; reading it again", self.job.member.rank, mismatch)
        self.rereads += 1
        self._suspect(verdict)
        rows = np.zeros(len(self.ledger.rows), np.bool_)
        rows[wrong] = True
        for number in np.unique(self.ledger.rows.source[rows]).tolist():  # other ranks may know better
            instance = self.ledger.sources[number].instance
            self.suspicion[instance] = max(1, self.suspicion.get(instance, 0))
        wants = self._again(rows)
        self.reread_nbytes += wants.nbytes
        return wants

    def _suspect(self, verdict: Verdict) -> None:
        """Count against instances, in the same way on every rank, what they had part in; most if nobody else had."""
        for mismatch in verdict.mismatches:
            instances = {name.rpartition("/rank ")[0] for name in mismatch.sources}
            for instance in instances:
                self.suspicion[instance] = self.suspicion.get(instance, 0) + (1000 if len(instances) == 1 else 1)

    def receipt(self, verdict: Verdict) -> Receipt:
        rank, config, ledger = self.job.member.rank, self.job.config, self.ledger
        layout = self.job.layout
        left = [row for row in layout.written.tolist() if layout.tensor_of(row).name in self.left]
        needed = Wants.of(layout).nbytes - int(layout.piece_nbytes[left].sum())
        proven = np.zeros(len(ledger.rows), np.bool_)
        if config.verifies:
            proven = verdict.state[verdict.measured.rank == rank] == State.PROVEN
        own = np.array([not source.generation for source in ledger.sources], np.bool_)[ledger.rows.source] & ~proven
        verified, checkpoint = int(ledger.nbytes[proven].sum()), int(ledger.nbytes[own].sum())
        return Receipt(
            model=str(self.job.model),
            rank=rank,
            sources=ledger.read(),
            instance=self.everybody,
            needed_nbytes=needed,
            wire_nbytes=self.wire_nbytes,
            operations=self.operations,
            attached_nbytes=self.attached_nbytes,
            seconds=dict(self.seconds),
            wall_s=time.perf_counter() - self.begun_s,
            verify=config.verifies,
            verified_nbytes=verified,
            checkpoint_nbytes=checkpoint,
            unverified_nbytes=needed - verified - checkpoint,
            reread_nbytes=self.reread_nbytes,
            staging_nbytes=self.staging_nbytes,
            digest=verdict.digest,
            digest_tensors=verdict.digest_tensors,
            left=tuple(sorted(self.left)),
            digests=ledger.digests(),
        )


def _of(layout: Layout, piece: IntArray, names: Collection[str]) -> BoolArray:
    """[n] whether layout piece piece[n] is one of a tensor named so."""
    tensors = [layout.catalog.row[name] for name in names]
    return np.isin(layout.pieces.tensor[piece], tensors)


def _without(wants: Wants, names: Collection[str]) -> Wants:
    """Less the boxes of these tensors."""
    kept = ~_of(wants.layout, wants.piece, names)
    return Wants(wants.layout, wants.piece[kept], wants.start[kept], wants.stop[kept])


def _listed(rows: Sequence[object]) -> str:
    more = f"\n  ... and {len(rows) - 10} more" if len(rows) > 10 else ""
    return "\n".join(f"  {row}" for row in rows[:10]) + more
