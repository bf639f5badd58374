"""What the received bytes are worth: every rank hashes its own, all exchange their numbers, each reaches the same verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import VerifyError, listed
from ..integrity.claims import Claims, Measured
from ..integrity.digest import DigestArray
from ..integrity.verdict import State, Verdict, compare
from ..model.boxes import IntArray
from ..receipt import Read
from .exchange import Group, Judgement
from .ledger import Ledger, Rows
from .rank import Rank
from .tally import Tally
from .trust import Sources

#: Times a range that arrived wrong is read again before the load is given up.
REREADS = 3


class Verification:
    """Of what `ledger` holds for `rank`, one of `group`. `everybody`: what all ranks have received, by source, as of the last
    verdict."""

    def __init__(self, rank: Rank, ledger: Ledger, sources: Sources, group: Group, tally: Tally) -> None:
        self._rank, self._ledger, self._sources, self._group, self._tally = rank, ledger, sources, group, tally
        self._verdicts = 0  # that found something wrong
        self.everybody: dict[str, Read] = {}

    def measure(self) -> Measured:
        """Hash what arrived since the last time, and exchange with the other ranks the numbers and the sources: without `verify`
        the sources alone."""
        catalog, ledger, member = self._rank.layout.catalog, self._ledger, self._rank.member
        with self._tally.phase("verify"):
            rows = ledger.rows
            if self._rank.config.verifies:
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
                self._rank.layout.pieces.tensor[rows.piece],
                rows.start,
                rows.stop,
                rows.digest,
                np.searchsorted(used, rows.source),
                sources,
            )
            said = mine.encode()
        with self._tally.phase("commit"):
            parts = self._group.tell(said)
        with self._tally.phase("verify"):
            return mine if len(parts) == 1 else Measured.join(self._decoded(parts))

    def _decoded(self, parts: Sequence[bytes]) -> list[Measured]:
        """Every rank's measurements. Raises CommitError, naming the rank, for what none can have sent."""
        catalog, heard = self._rank.layout.catalog, []
        known = {spec.name: spec for spec in catalog}
        for rank, part in enumerate(parts):
            try:
                one = Measured.decode(part, catalog)
            except VerifyError as error:
                raise self._group.nonsense(rank, error.message) from error
            if (one.rank != rank).any():
                raise self._group.nonsense(rank, "measurements of another rank")
            if one.catalog != catalog and any(known.setdefault(spec.name, spec) != spec for spec in one.catalog):
                raise self._group.nonsense(rank, "a derived tensor that another rank knows in another dtype or shape")
            heard.append(one)
        return heard

    def _hash(self, boxes: Rows) -> DigestArray:
        pieces, tensor = self._rank.layout.pieces, self._rank.layout.pieces.tensor[boxes.piece]
        stride = pieces.stride[boxes.piece]
        address = self._rank.address[pieces.buffer[boxes.piece]] + pieces.offset[boxes.piece]
        address = address + ((boxes.start - pieces.start[boxes.piece]) * stride).sum(axis=1)
        catalog, threads = self._rank.layout.catalog, self._rank.config.threads
        return self._rank.space.digest(catalog, tensor, boxes.start, boxes.stop, address, stride, threads)

    def judge(self, measured: Measured) -> Verdict:
        """Compare all ranks' numbers with what the sources announced, each in the generation that was read."""
        if not self._rank.config.verifies:
            return compare(Claims.of(measured.catalog, []), measured)
        if any(s.generation and s not in self._sources.known for s in measured.sources):  # it came after we had looked
            assert self._rank.coordinator is not None, "another rank has read from it"
            self._sources.look(self._rank.coordinator)
        with self._tally.phase("verify"):
            known = self._sources.known
            claims = Claims.of(measured.catalog, [known[s] for s in measured.sources if s in known])
            return compare(claims, measured)

    def wrong(self, verdict: Verdict) -> IntArray | None:
        """Which of our rows have to be read again, as all ranks find; None to commit, if every rank is content with all of them.
        Raises VerifyError when sources contradict each other, or when ranges have arrived wrong too often."""
        if verdict.contradictions:
            raise VerifyError(
                "the sources hold different weights\n" + listed(verdict.contradictions),
                next_step="withdraw the seed that is wrong, or give the weights different revisions",
            )
        member, ranks = self._rank.member, range(self._group.size)
        wrong = {rank: verdict.wrong(rank).tolist() for rank in (ranks if len(ranks) > 1 else [member.rank])}
        doubted = [str(m) for m in verdict.mismatches]
        unvouched = self._unvouched(verdict)
        if len(unvouched):
            wrong[member.rank] += unvouched.tolist()
            doubted.append(f"rank {member.rank}: {len(unvouched)} boxes that no digest covers came from sources lost since")
        finding = Judgement(doubted, wrong, self._ledger.read())
        with self._tally.phase("commit"):
            parts = self._group.tell(finding.encode())
        counts = np.bincount(verdict.measured.rank, minlength=max(wrong) + 1).tolist()
        told: list[Judgement] = []
        for rank, part in enumerate(parts):
            try:
                told.append(Judgement.decode(part, counts))
            except ValueError as error:
                raise self._group.nonsense(rank, error) from error
        self.everybody = {}
        for name, read in (item for one in told for item in one.read.items()):
            before = self.everybody.get(name, Read(0, 0))
            self.everybody[name] = Read(before.nbytes + read.nbytes, before.operations + read.operations)
        doubts = {line for one in told for line in one.doubts}
        if doubts and self._verdicts >= REREADS:
            raise VerifyError(
                f"after {REREADS + 1} reads, bytes are still wrong\n" + listed(sorted(doubts)),
                next_step="withdraw the seed that all of them were read from, or look at this host's memory and network",
            )
        if not doubts:
            return None
        self._verdicts += 1
        return np.array(sorted({row for one in told for row in one.wrong.get(member.rank, ())}), np.int64)

    def _unvouched(self, verdict: Verdict) -> IntArray:
        """Our rows that neither a digest nor a fence vouches for: a source was lost before its closing fence was read, and what
        it gave is no whole box of what was announced."""
        if not self._rank.config.verifies:
            return np.zeros(0, np.int64)
        lost = np.array([source in self._sources.failures for source in self._ledger.sources], np.bool_)[self._ledger.rows.source]
        state = verdict.state[verdict.measured.rank == self._rank.member.rank]
        return np.flatnonzero(lost & (state == State.UNPROVEN))
