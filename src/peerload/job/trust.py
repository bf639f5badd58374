"""Who is there, and whom a load plans with: sources that can be read from here, have not failed, and were never wrong."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import (
    CoordinatorError,
    DeadlineExceeded,
    PeerloadError,
    PlanError,
    Refusal,
    SourceError,
    SourcesExhausted,
    SourceStale,
    SourceStalled,
    listed,
)
from ..integrity.verdict import Verdict
from ..model.catalog import is_derived
from ..model.offer import ALGORITHM, Offer, SourceId
from ..planning.plan import Plan, make_plan
from ..planning.wants import Wants
from ..transport.base import Transport
from ..transport.process import boot_id
from .ledger import of_tensors
from .rank import Rank
from .tally import Tally

log = logging.getLogger(__name__)

#: Times a load begins anew with other sources, because weights have changed or sources have gone.
RESTARTS = 5
#: A source that changes its weights has announced them again within this time, or is given up, seconds.
CHANGE_S = 10.0
#: One more look at who is there takes no longer, seconds.
LOOK_S = 5.0


class Sources:
    """Those of one load of `rank`, which reads them over `transports`.

    reserve: offers of last resort, such as a checkpoint on disk. derives: derived tensors that nobody holds are `left` to the
    caller, which makes them whole."""

    def __init__(
        self,
        rank: Rank,
        transports: Mapping[str, Transport],
        reserve: Sequence[Offer],
        derives: bool,
        deadline: Deadline,
        tally: Tally,
    ) -> None:
        self._rank, self._transports, self._own = rank, transports, reserve
        self._derives, self._deadline, self._tally = derives, deadline, tally
        self.offers: list[Offer] = []  # those that may be read, as they were when we last looked
        self.known: dict[SourceId, Offer] = {}  # all that were ever seen: what they announced still proves what they gave
        self.failures: dict[SourceId, SourceError] = {}
        self.suspicion: dict[str, int] = {}
        self.left: set[str] = set()
        self.changing = False  # somebody's weights, which are soon announced again
        self._refusals: dict[SourceId, Refusal] = {}
        self._forgiven: set[SourceId] = set()  # they stood still once
        self._looks = 0

    @property
    def reserve(self) -> list[Offer]:
        return list(self._own) if self._rank.config.fallback == "disk" else []

    def discover(self, wants: Wants) -> None:
        """Everyone who holds this model, whatever their layout; waits up to `wait_s` until they hold all of `wants` that seeds
        will ever give us."""
        coordinator, config = self._rank.coordinator, self._rank.config
        if coordinator is None:
            return
        if config.wait_s > 0:
            with self._tally.phase("discover"):
                try:
                    patience = self._deadline.within(config.wait_s)
                    self.see(coordinator.wait_for(self._rank.model, patience, lambda offers: self.suffice(wants, offers)))
                except DeadlineExceeded:
                    if not self.reserve or self._deadline.remaining_s == 0:
                        raise
                except CoordinatorError:  # it was away for all of that time; there is more
                    pass
                else:
                    return
        self.look(coordinator)

    def look(self, coordinator: CoordinatorClient) -> None:
        """See who is there now."""
        with self._tally.phase("discover"):
            self.see(coordinator.discover(self._rank.model, self._deadline))

    def see(self, offers: Sequence[Offer]) -> None:
        """These are there now, besides ourselves. Says whom we can't use, once."""
        self.offers, refused = self._usable(offers)
        self.known.update((o.source, o) for o in offers)
        new = [r for source, r in refused.items() if source not in self._refusals]
        self._refusals.update(refused)
        if new:
            log.warning("peerload: rank %d leaves out %d sources\n%s", self._rank.member.rank, len(new), listed(new))

    def look_again(self, wants: Wants) -> bool:
        """Look who is there, now that nobody is left for `wants`. Is there somebody new who has it? A source that changes its
        weights gets a little time to announce them, and one that stood still is tried once more."""
        if self._rank.coordinator is None or self._looks >= RESTARTS:
            return False
        self._looks += 1
        failures = self.failures
        again = {s for s, error in failures.items() if isinstance(error, SourceStalled)} - self._forgiven
        self.failures = {s: error for s, error in failures.items() if s not in again}
        found = self._found(self._rank.coordinator, wants)
        if found:
            self._forgiven |= again
        else:
            self.failures = failures
        return found

    def _found(self, coordinator: CoordinatorClient, wants: Wants) -> bool:
        """Is there anybody who has not failed and has `wants`?"""
        model = self._rank.model
        stale = self.changing or any(isinstance(error, SourceStale) for error in self.failures.values())
        patience_s = max(self._rank.config.wait_s - self._tally.wall_s, CHANGE_S if stale else 0.0)
        try:
            with self._tally.phase("discover"):
                offers = coordinator.discover(model, self._deadline.within(LOOK_S))
                if not self.suffice(wants, offers):
                    if patience_s <= 0:
                        return False
                    patience = self._deadline.within(patience_s)
                    offers = coordinator.wait_for(model, patience, lambda there: self.suffice(wants, there))
        except (CoordinatorError, DeadlineExceeded) as error:
            log.info("peerload: rank %d found nobody new: %s", self._rank.member.rank, error.message)
            return False
        self.see(offers)
        return True

    # Whom we can use.

    def _usable(self, offers: Sequence[Offer]) -> tuple[list[Offer], dict[SourceId, Refusal]]:
        found, refused = [], {}
        newest: dict[str, int] = {}
        for source in (o.source for o in offers):
            newest[source.instance] = max(source.changes, newest.get(source.instance, 0))
        for offer in offers:
            if offer.source.instance == self._rank.member.instance:
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
        if any(offer.source == own.source for own in self._own):  # its failure would be taken for the checkpoint's
            return "announces itself under the name of this host's own checkpoint"
        if self._rank.config.verifies and offer.binding.algorithm != ALGORITHM:
            unknown = f"announces digests by algorithm {offer.binding.algorithm}, which this release doesn't know"
            return f"{unknown}: it knows {ALGORITHM} (run the same release on both sides, or set verify to off here)"
        if self._rank.config.verifies and offer.binding.digests is None:
            return "announces no digests, so nothing would prove its bytes (start it with verify on, or set verify to off here)"
        ours, theirs = self._transports, [e.transport for e in offer.binding.endpoints]
        if not any(name in ours for name in theirs):
            return f"it offers {', '.join(theirs) or 'no transport'}, here is {', '.join(ours) or 'none'}"
        elsewhere = offer.binding.host not in ("", boot_id())
        if elsewhere and all(ours[name].limits.same_host for name in theirs if name in ours):
            return f"is on another host, and offers {', '.join(theirs)} only"
        return ""

    def _standing(self, offers: Sequence[Offer]) -> list[Offer]:
        """Those that have not failed."""
        return [o for o in offers if o.source not in self.failures]

    def suffice(self, wants: Wants, offers: Sequence[Offer]) -> bool:
        """Do they hold all of `wants` that seeds will ever hold? What the caller makes itself is not waited for, nor what all of
        their ranks have given up (post-processing has rewritten it) and the reserve has."""
        usable = self._standing(self._usable(offers)[0])
        try:
            make_plan(wants, usable, match=self._rank.config.match)
        except PlanError as error:
            holes = {hole.tensor for hole in error.holes}
        else:
            return True
        holes = {name for name in holes if not (self._derives and is_derived(name))}
        gone = {name for offer in usable for name in offer.layout.ignored}
        if not usable or not holes <= gone:
            return False
        lacking = _without(wants, {n for n in wants.layout.catalog.names if n not in holes})
        try:
            make_plan(lacking, [], reserve=self._standing(self.reserve))
        except PlanError:
            return not holes
        return True

    # Whom we trust.

    def plan(self, wants: Wants) -> Plan:
        """Over the instances that were never wrong; when those don't suffice, with one suspect more at a time, so that what was
        wrong is read whole from one that can be told right from wrong. Raises PlanError, or SourcesExhausted if sources have
        failed."""
        config, member = self._rank.config, self._rank.member
        wants = _without(wants, self.left)  # for good: a part of one that had come was dropped
        seeds, reserve = self._standing(self.offers), self._standing(self.reserve)
        suspicion = {o.source.instance: self.suspicion.get(o.source.instance, 0) for o in (*seeds, *reserve)}
        order = sorted(suspicion, key=lambda instance: (suspicion[instance], instance))
        trusted = sum(count == 0 for count in suspicion.values())
        refused, salt = tuple(self._refusals.values()), f"{member.instance}/{member.rank}"
        while True:
            usable, last = ([o for o in some if o.source.instance in order[:trusted]] for some in (seeds, reserve))
            try:
                return make_plan(wants, usable, reserve=last, match=config.match, salt=salt, refused=refused)
            except PlanError as error:
                lacking = {hole.tensor for hole in error.holes if self._derives and is_derived(hole.tensor)}
                self.left |= lacking  # rather than trust a suspect
                rest = _without(wants, lacking)
                if len(rest) < len(wants):
                    wants = rest
                    continue
                trusted += 1
                if trusted > len(order):
                    raise self._exhausted(error) from error

    def _exhausted(self, error: PlanError) -> PeerloadError:
        if not self.failures:
            return error
        lost = "; ".join(f"{source} ({problem.problem})" for source, problem in self.failures.items())
        return SourcesExhausted(
            f"rank {self._rank.member.rank} lost {lost}, and nobody else can supply the rest\n{error.message}",
            next_step="start another seed, or allow fallback=disk",
        )

    def lose(self, failures: Mapping[SourceId, SourceError]) -> None:
        """They are not read again."""
        for source, error in failures.items():
            log.warning("peerload: rank %d: %s; planning the rest anew", self._rank.member.rank, error.message)
            self.failures[source] = error

    def suspect(self, verdict: Verdict) -> None:
        """Count against instances, in the same way on every rank, what they had part in; most if nobody else had."""
        for mismatch in verdict.mismatches:
            instances = {name.rpartition("/rank ")[0] for name in mismatch.sources}
            for instance in instances:
                self.suspicion[instance] = self.suspicion.get(instance, 0) + (1000 if len(instances) == 1 else 1)

    def doubt(self, instances: Collection[str]) -> None:
        """Another rank may know better than we what they gave."""
        for instance in instances:
            self.suspicion[instance] = max(1, self.suspicion.get(instance, 0))


def _without(wants: Wants, names: Collection[str]) -> Wants:
    """Less the boxes of these tensors."""
    kept = ~of_tensors(wants.layout, wants.piece, names)
    return Wants(wants.layout, wants.piece[kept], wants.start[kept], wants.stop[kept])
