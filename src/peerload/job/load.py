"""The job: discover, plan, transfer, verify, commit. One target rank loads its weights out of its peers' memory.

First try, lost source, a range that arrived wrong, and disk fallback are the same lines with other arguments: what is
still wanted is planned again over the sources that are still trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from ..deadline import Deadline
from ..errors import ConfigError, PlanError, SourcesExhausted
from ..integrity.verdict import State, Verdict
from ..model.boxes import BoolArray, IntArray
from ..model.offer import Offer
from ..planning.plan import Plan
from ..planning.wants import Wants
from ..receipt import Receipt
from ..transport.base import Transport
from .exchange import Group
from .ledger import Ledger, of_tensors
from .rank import Rank
from .reader import Outcome, Reader
from .tally import Tally
from .trust import RESTARTS, Sources
from .verification import Verification

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """The load of one rank.

    reserve: offers of last resort, such as a checkpoint on disk, read for what no seed supplies.
    derives: the caller can make derived tensors itself: those that nobody holds are left out, and told in the receipt.
    on_bytes(phase, done, wanted): progress, called from several threads.
    complete(left): what the caller does with the proven bytes before the instance commits, such as making the derived tensors
    `left`; if it raises on any rank, no rank commits. None: nothing; all ranks of an instance have one, or none has."""

    rank: Rank
    reserve: Sequence[Offer] = ()
    derives: bool = False
    on_bytes: Callable[[str, int, int], None] = lambda *_: None
    complete: Callable[[tuple[str, ...]], None] | None = None


def load(job: Job) -> Receipt:
    """Fill the buffers. Returns when every rank of the instance holds its bytes, proven as `config.verify` asks. Raises
    otherwise, on every rank, a little after `config.deadline_s` at the latest; also if only one rank's device or transports
    can't be opened."""
    rank, member = job.rank, job.rank.member
    if member.size > 1 and rank.coordinator is None:
        raise ConfigError("several ranks can't agree without a coordinator", next_step="give its url")
    deadline, tally = Deadline.after(rank.config.deadline_s), Tally()
    group = Group(member.group, member.rank, member.size, rank.coordinator, deadline)
    with ExitStack() as stack:  # the other ranks hear of a failure before anything is closed
        try:
            with tally.phase("register"):
                transports = stack.enter_context(rank.opened())
            run = _Run(job, transports, group, deadline, tally)
            wants = Wants.of(rank.layout)
            run.sources.discover(wants)
            reader = stack.enter_context(run.registered())
            while True:
                run.fetch(wants, reader)
                measured = run.verification.measure()
                skewed = measured.skewed()
                if skewed:
                    wants = run.refreshed(skewed)
                    continue
                verdict = run.verification.judge(measured)
                wrong = run.verification.wrong(verdict)
                if wrong is None:
                    run.complete()
                    return run.receipt(verdict)
                wants = run.doubted(verdict, wrong)
        except BaseException as error:
            group.abort(error)
            raise


class _Run:
    """One `load` under way: its sources, what has come from them, and what that is worth."""

    def __init__(self, job: Job, transports: Mapping[str, Transport], group: Group, deadline: Deadline, tally: Tally) -> None:
        self._job, self._rank, self._transports = job, job.rank, transports
        self._group, self._deadline, self.tally = group, deadline, tally
        self._space = job.rank.space
        self._restarts = 0
        self.ledger = Ledger(job.rank.layout)
        self.sources = Sources(job.rank, transports, job.reserve, job.derives, deadline, tally)
        self.verification = Verification(job.rank, self.ledger, self.sources, group, tally)

    @contextmanager
    def registered(self) -> Iterator[Reader]:
        """Our buffers and staging memory known to every transport, constants written."""
        rank, config = self._rank, self._rank.config
        with Reader(
            self._transports,
            config.staging_bytes,
            rank.arena,
            self._space,
            reserve=self._job.reserve,
            stall_s=config.stall_s,
            keep_unfenced=config.verifies,
        ) as reader:
            with self.tally.phase("register"):
                regions = [*rank.regions(), *reader.regions()]
                for transport in self._transports.values():
                    transport.register(regions)
                for constant in rank.layout.constants:
                    self._space.fill(constant, rank.address)
            yield reader

    def fetch(self, wants: Wants, reader: Reader) -> None:
        """Read all of `wants`; a source that fails gives its remainder back to the planner."""
        total, done, lock = wants.nbytes, 0, Lock()

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                now = min(done, total)  # staging and second tries move more than is wanted
            self._job.on_bytes("transfer", now, total)

        while len(wants):
            try:
                with self.tally.phase("plan"):
                    plan = self.plan(wants)
            except (PlanError, SourcesExhausted):
                if not self.sources.look_again(wants):
                    raise
                continue
            with self.tally.phase("transfer"):
                outcome = reader.read(plan, self._rank.address, self._deadline, on_bytes)
            self._note(plan, outcome)
            wants = plan.rest(outcome.undone)

    def plan(self, wants: Wants) -> Plan:
        """What has come of the derived tensors that are left to the caller counts for nothing: it makes them whole."""
        plan = self.sources.plan(wants)
        self.ledger.drop(of_tensors(self._rank.layout, self.ledger.rows.piece, self.sources.left))
        return plan

    def _note(self, plan: Plan, outcome: Outcome) -> None:
        self.sources.lose(outcome.failures)
        reserve = {o.source for o in self.sources.reserve}
        number = self.ledger.numbers(replace(o.source, generation="") if o.source in reserve else o.source for o in plan.offers)
        done = np.setdiff1d(np.arange(len(plan)), outcome.undone)
        self.ledger.add(plan.wants.piece[plan.want[done]], plan.start[done], plan.stop[done], number[plan.offer[done]])
        self.tally.add(outcome)

    def refreshed(self, skewed: Collection[str]) -> Wants:
        """The ranks have read different generations of the instances `skewed`, and all of them know. What of these is no longer
        on offer has to be read again."""
        names, member = ", ".join(sorted(skewed)), self._rank.member
        if self._restarts >= RESTARTS:
            raise SourcesExhausted(
                f"the weights of {names} changed {RESTARTS + 1} times while the ranks of {member.instance} read them",
                next_step="load from seeds that don't change, or change them less often",
            )
        self._restarts += 1
        self.sources.changing = True
        log.warning("peerload: rank %d: the ranks have read different generations of %s; discovering again", member.rank, names)
        assert self._rank.coordinator is not None, "there are other ranks"
        self.sources.look(self._rank.coordinator)
        current = {o.source for o in self.sources.offers}
        stale = np.array([s.instance in skewed and s not in current for s in self.ledger.sources], np.bool_)
        return self._again(stale[self.ledger.rows.source])

    def _again(self, rows: BoolArray) -> Wants:
        """Forget these rows of the ledger; returns what they were."""
        gone = self.ledger.drop(rows)
        return Wants(self._rank.layout, gone.piece, gone.start, gone.stop)

    def complete(self) -> None:
        """The caller's own last step, and the vote on it."""
        if self._job.complete is not None:
            with self.tally.phase("complete"):
                self._job.complete(tuple(sorted(self.sources.left)))
            with self.tally.phase("commit"):
                self._group.tell(b"")

    def doubted(self, verdict: Verdict, wrong: IntArray) -> Wants:
        """What this rank has to read again, from elsewhere if anybody else has it."""
        for mismatch in verdict.mismatches:
            log.warning("peerload: rank %d: %s; reading it again", self._rank.member.rank, mismatch)
        rows = np.zeros(len(self.ledger.rows), np.bool_)
        rows[wrong] = True
        given = np.unique(self.ledger.rows.source[rows]).tolist()
        self.sources.suspect(verdict)
        self.sources.doubt([self.ledger.sources[number].instance for number in given])
        wants = self._again(rows)
        self.tally.reread_nbytes += wants.nbytes
        return wants

    def receipt(self, verdict: Verdict) -> Receipt:
        rank, config, ledger = self._rank.member.rank, self._rank.config, self.ledger
        layout, tally = self._rank.layout, self.tally
        left = [row for row in layout.written.tolist() if layout.tensor_of(row).name in self.sources.left]
        needed = Wants.of(layout).nbytes - int(layout.piece_nbytes[left].sum())
        proven = np.zeros(len(ledger.rows), np.bool_)
        if config.verifies:
            proven = verdict.state[verdict.measured.rank == rank] == State.PROVEN
        own = np.array([not source.generation for source in ledger.sources], np.bool_)[ledger.rows.source] & ~proven
        verified, checkpoint = int(ledger.nbytes[proven].sum()), int(ledger.nbytes[own].sum())
        return Receipt(
            model=str(self._rank.model),
            rank=rank,
            sources=ledger.read(),
            instance=self.verification.everybody,
            needed_nbytes=needed,
            wire_nbytes=tally.wire_nbytes,
            operations=tally.operations,
            attached_nbytes=tally.attached_nbytes,
            seconds=dict(tally.seconds),
            wall_s=tally.wall_s,
            verify=config.verifies,
            verified_nbytes=verified,
            checkpoint_nbytes=checkpoint,
            unverified_nbytes=needed - verified - checkpoint,
            reread_nbytes=tally.reread_nbytes,
            staging_nbytes=tally.staging_nbytes,
            digest=verdict.digest,
            digest_tensors=verdict.digest_tensors,
            left=tuple(sorted(self.sources.left)),
            digests=ledger.digests(),
        )
