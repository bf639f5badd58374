"""Being a seed: one rank's weights offered to whoever starts next, for as long as the `with` lasts.

    with Seed(rank):
        serve()

Entering opens the transports, hashes the weights once, unless they have just been proven, writes the fence and takes a lease; a
thread renews the lease, and announces again when the coordinator has forgotten it. Leaving clears the fence first, so that nobody
reads what is no longer vouched for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Event, Lock, Thread

import numpy as np
import numpy.typing as npt

from ..coordinator.client import Granted
from ..deadline import Deadline
from ..errors import ConfigError, CoordinatorError, DeadlineExceeded, HostError, LeaseSuperseded, LeaseUnknown
from ..integrity.digest import PRIME
from ..memory.space import digest_layout
from ..model.offer import FENCE_NBYTES, Binding, Endpoint, Offer, SourceId, fence
from ..transport.files import FilesTransport
from ..transport.process import boot_id
from .rank import Rank

log = logging.getLogger(__name__)

#: Seconds a lease lasts; a heartbeat comes three times as often, so two may be lost.
TTL_S = 30.0
#: An unreachable coordinator may hold up the end of a seed for so long, seconds: the lease runs out by itself.
GOODBYE_S = 2.0


class Seed:
    """Offers the buffers of `rank`, whose memory stays as it is, but for `changing()`, until the seed is closed.

    An arena is frozen, so that targets on this host needn't copy: what is written from then on costs memory of its own, and is
    read with process_vm_readv. An arena that a seed has frozen must be given to every later seed of it. With `config.verify` off
    no digests are announced; targets then refuse the seed unless they load with verify off, too.

    files: small model files (config.json) for targets that have no copy. attributes: for people who look at the coordinator.
    proven: digests of pieces, by row of the layout, that were measured when these bytes arrived (`Receipt.digests`). They are
    announced as they are: should memory have changed since, targets find out. Only the other pieces are hashed here.
    on_ended: called once, in a thread of the seed or that of `changing`, when another process has taken this rank's place:
    nothing is offered then.
    """

    def __init__(
        self,
        rank: Rank,
        *,
        files: Mapping[str, bytes] | None = None,
        attributes: Mapping[str, str] | None = None,
        proven: Mapping[int, int] | None = None,
        ttl_s: float = TTL_S,
        on_ended: Callable[[LeaseSuperseded], None] = lambda _: None,
    ) -> None:
        if rank.coordinator is None:
            raise ConfigError("a seed needs a coordinator, where targets find it", next_step="give its url")
        known = dict(proven or {})
        if any(not 0 <= row < len(rank.layout.pieces) or not 0 <= digest < PRIME for row, digest in known.items()):
            raise ValueError("a proven digest is of no piece of the layout, or out of range")
        self._rank, self._coordinator, self._space, self._arena = rank, rank.coordinator, rank.space, rank.arena
        self._files, self._attributes = dict(files or {}), dict(attributes or {})
        self._proven, self._ttl_s, self._on_ended = known, ttl_s, on_ended
        self._changes = 0
        self._stop = Event()
        self._announcing = Lock()  # so that no heartbeat renews a lease that is just being replaced
        self._heart = Thread(target=self._beat, name=f"peerload-heartbeat-{rank.layout.rank}", daemon=True)
        self._huge = Thread(target=self._enlarge, name=f"peerload-pages-{rank.layout.rank}", daemon=True)
        self._offer: Offer | None = None
        self._asked = False  # to be announced: the coordinator may offer us, even if its answer was lost
        self._lease: Granted | None = None
        self._closing = ExitStack()

    @property
    def offer(self) -> Offer:
        assert self._offer is not None, "the seed has not been entered"
        return self._offer

    def __enter__(self) -> Seed:
        """Raises what opening transports and announcing raise; nothing is offered or open then."""
        with ExitStack() as last:  # the last line comes first, whatever fails
            self._transports = last.enter_context(self._rank.opened())
            self._fence = self._space.fence()
            last.callback(self._fence.close)
            regions = [*self._rank.regions(), self._fence.region()]
            for transport in self._transports.values():
                transport.register(regions)
            last.callback(self._join)
            last.callback(self._withdraw)
            last.callback(self._clear_fence)
            self._write()
            with self._announcing:
                self._lease = self._announce()
            self._heart.start()
            self._huge.start()
            self._closing = last.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _join(self) -> None:
        for thread, timeout_s in ((self._heart, GOODBYE_S), (self._huge, None)):
            if thread.ident is not None:  # it was started
                thread.join(timeout_s)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the weights in place; all ranks of an instance do so together, and equally often. The old generation can't be
        read from the first moment on. The new one is announced after the block, or by a later heartbeat if the coordinator is
        away. If the block raises, the weights are in an unknown state, so the offer is withdrawn. Raises LeaseSuperseded, after
        which nothing is offered."""
        self._clear_fence()
        try:
            yield
        except BaseException:
            self._withdraw()
            raise
        self._proven.clear()
        self._changes += 1
        self._republish()

    def _republish(self) -> None:
        try:
            self._write()
        except BaseException:
            self._withdraw()
            raise
        with self._announcing:
            self._lease = None  # of the old generation: to renew it would offer what the fence no longer vouches for
            if self._stop.is_set():
                return
            try:
                self._lease = self._announce()
            except LeaseSuperseded as error:
                self._end(error)
                raise
            except (CoordinatorError, DeadlineExceeded) as error:
                log.warning("peerload: %s could not be announced, trying again: %s", self.offer.source, error.message)

    def _clear_fence(self) -> None:
        self._fence.write(bytes(FENCE_NBYTES))

    def _withdraw(self) -> None:
        """End the heartbeat and the lease, whichever generation it is of."""
        self._stop.set()
        if not self._announcing.acquire(timeout=GOODBYE_S):
            log.warning("peerload: %s is being announced while it ends; its lease will run out", self.offer.source)
            return
        try:
            if self._asked:
                self._coordinator.withdraw(Granted(self.offer.source, self._ttl_s), Deadline.after(GOODBYE_S))
        except (CoordinatorError, DeadlineExceeded) as error:
            log.warning("peerload: could not withdraw %s, its lease will run out: %s", self.offer.source, error.message)
        finally:
            self._asked, self._lease = False, None
            self._announcing.release()

    def _write(self) -> None:
        """A new generation of what is in memory now: its fence and its offer. Nobody is told of it yet."""
        source = SourceId.new(self._rank.member.instance, self._rank.layout.rank, self._changes)
        endpoints = self._endpoints()  # first: memory that a transport pins can't be frozen; pinned once frozen, it is copied
        if self._thawed():
            endpoints = self._endpoints()
        digests: npt.NDArray[np.uint64] | None = None
        if self._rank.config.verifies:
            digests = self._digest()
        self._fence.write(fence(source.generation))
        binding = Binding(
            source,
            self._rank.address,
            endpoints,
            digests=digests,
            fence_address=self._fence.address,
            host=boot_id(),
            attributes=self._attributes,
        )
        with self._announcing:
            self._offer = Offer(self._rank.layout, binding)

    def _digest(self) -> npt.NDArray[np.uint64]:
        """[pieces], those proven as they were proven."""
        digests = np.zeros(len(self._rank.layout.pieces), np.uint64)
        digests[list(self._proven)] = list(self._proven.values())
        rows = np.setdiff1d(np.arange(len(digests)), list(self._proven))
        digests[rows] = digest_layout(
            self._space, self._rank.layout, self._rank.address, rows=rows, threads=self._rank.config.threads
        )
        return digests

    def _thawed(self) -> bool:
        """Freeze the arena, once. True if its memfd mustn't be read (any more), which the transports have then been told: the
        second time, the memory may have been changed since; or it holds attached pages of another seed."""
        if self._arena is None or self._arena.freeze() or self._arena.region().fd >= 0:
            return False
        for transport in self._transports.values():
            transport.register([self._arena.region()])
        return True

    def _endpoints(self) -> tuple[Endpoint, ...]:
        """How others may reach this process; a transport that this host turns out not to have is left out."""
        found = []
        for name, transport in self._transports.items():
            if name == FilesTransport.name:
                continue
            try:
                found.append(Endpoint(name, transport.describe()))
            except HostError as error:
                log.warning("peerload: %s is not offered over %s: %s", self._rank.member.instance, name, error.message)
        return tuple(found)

    def _announce(self) -> Granted:
        self._asked = True
        return self._coordinator.announce(self.offer, self._rank.model, files=self._files, ttl_s=self._ttl_s)

    def _enlarge(self) -> None:
        """Move the arena into huge pages, so that attaching it costs few page faults. It stays readable meanwhile."""
        if self._arena is not None:
            self._arena.collapse(self._stop.is_set)

    def _beat(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            try:
                with self._announcing:
                    if not self._stop.is_set():
                        self._renew()
            except LeaseSuperseded as error:
                self._end(error)
                return
            except (CoordinatorError, DeadlineExceeded) as error:
                log.warning("peerload: heartbeat of %s failed, trying again: %s", self.offer.source, error.message)
            except Exception:
                log.exception("peerload: heartbeat of %s failed, trying again", self.offer.source)

    def _end(self, error: LeaseSuperseded) -> None:
        """Another process has this rank's place."""
        log.error("peerload: %s is no longer offered: %s", self.offer.source, error.message)
        self._asked, self._lease = False, None
        self._stop.set()
        self._on_ended(error)

    def _renew(self) -> None:
        """Raises LeaseSuperseded when another process has taken this rank's place."""
        deadline = Deadline.after(self._ttl_s / 3)  # a late heartbeat is of no use
        try:
            if self._lease is None:  # a change could not be announced
                self._lease = self._announce()
            else:
                self._coordinator.renew(self._lease, deadline)
        except LeaseUnknown:
            log.info("peerload: the coordinator has forgotten %s; announcing again", self.offer.source)
            self._lease = self._announce()
