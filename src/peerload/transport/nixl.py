"""NIXL (https://github.com/ai-dynamo/nixl) over UCX: RDMA, TCP between hosts, CMA within one. The only importer of it.

**An open door.** Whoever reaches the UCX listener of an agent can read and write the memory that it has registered: UCX has no
way to register memory for reading only, and no authentication. So this transport is opened only when the operator names it, on
the interface that the operator names. UCX also aborts the process that connects to some addresses that are none (1 in 100 with
random bytes in them): whoever announces a seed can end a reader.

**Abandoned reads land later.** With NIXL 1.5.1, bytes of a transfer that was released, deregistered or disconnected were still
written when a stopped source went on; only destroying the agent stopped them. So every source is read through an agent of its
own (20 ms each after the first), and a read that doesn't end well ends with its agent.

The configuration is what was measured to be best: no progress thread (it burns half a core for ever and reads 5 GB/s on one
host, against 7.7 without); instead whoever has described itself polls every 10 ms, which costs 1 % of a core and is
needed for a reader's connection to complete. Over TCP, UCX's default segments reach 0.6 GB/s and 1 MiB segments 2.4: see
UCX_DEFAULTS, which are in the environment only while the backend is being made, and never override the operator's.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import itertools
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final

import numpy as np

from ..deadline import Deadline
from ..errors import ConfigError, DeadlineExceeded, HostError, PlanError, SourceLost, SourceStalled, SourceUnreachable
from ..memory.region import Region
from ..model.boxes import IntArray
from ..planning.batch import Batch
from .base import Limits
from .descriptions import check_ranges, check_rows, column, decode, encode, text, whole
from .process import boot_id
from .regions import RegionTable

INSTALL: Final = "pip install --no-deps nixl-cu12 (or nixl-cu13); it needs no GPU"
MODULES: Final = ("nixl_cu13", "nixl_cu12", "nixl._api")
UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "1m",
    "UCX_TCP_RX_SEG_SIZE": "1m",
    "UCX_TCP_SNDBUF": "4m",
    "UCX_TCP_RCVBUF": "4m",
}
POLL_S: Final = 0.010
#: A transfer is all or nothing to NIXL, so one is as large as what moved in this time before: then one that takes seconds is
#: no progress. Seconds, and the bounds in bytes; the upper one takes 3.4 s at 10 MB/s. Larger ones are no faster.
PART_S: Final = 0.25
PART_NBYTES: Final = (1 << 20, 32 << 20)
#: Below this rate on one host UCX has fallen back to something slow.
SLOW_NBYTES_PER_S: Final = 0.5e9
SLOW_FROM_NBYTES: Final = 32 << 20
RDMA: Final = Path("/sys/class/infiniband")

log = logging.getLogger(__name__)

#: Held while an agent is made: UCX reads its settings from the environment of the process.
_making = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlDescription:
    """What `NixlTransport.describe` says. metadata: NIXL's own, in base64. address, nbytes: columns of regions."""

    host: Annotated[str, text(r"[!-~]{1,64}")]
    metadata: Annotated[str, text(r"[A-Za-z0-9+/]*={0,2}")]
    address: Annotated[Sequence[int], column(whole(1))]
    nbytes: Annotated[Sequence[int], column(whole(1))]

    def __post_init__(self) -> None:
        check_rows(address=self.address, nbytes=self.nbytes)
        check_ranges("address", self.address, self.nbytes)
        base64.b64decode(self.metadata, validate=True)


def installed() -> bool:
    """Is there a NIXL to import? Says nothing about whether it works; imports nothing."""
    return any(importlib.util.find_spec(name.partition(".")[0]) is not None for name in MODULES)


def module() -> ModuleType:
    """NIXL's Python module, its log on standard error (it comes with a handler for standard output, which is ours).
    Raises HostError when it can't be imported."""
    problems = []
    for name in MODULES:
        try:
            nixl = importlib.import_module(name)
        except ImportError as error:
            problems.append(f"{name}: {error}")
            continue
        logger = logging.getLogger("nixl")
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
        if "NIXL_LOG_LEVEL" not in os.environ:
            logger.setLevel(logging.WARNING)
        return nixl
    raise HostError(f"NIXL can't be imported ({'; '.join(problems)})", next_step=INSTALL)


def checked_interface(interface: str) -> str:
    """Raises ConfigError unless it names network interfaces of this host, comma-separated."""
    there = [name for _, name in socket.if_nameindex()] + (sorted(p.name for p in RDMA.iterdir()) if RDMA.is_dir() else [])
    if not interface:
        raise ConfigError(
            "transport nixl needs `interface`, the network interface to use: every process that can reach it there can read and "
            "overwrite the weights in this process's memory",
            next_step=f"set interface to one that only trusted machines reach; this host has {', '.join(there)}",
        )
    for name in interface.split(","):
        if name.partition(":")[0] not in there:
            raise ConfigError(f"there is no network interface {name!r}", next_step=f"this host has {', '.join(there)}")
    return interface


class _Agent:
    """A NIXL agent over UCX on one interface, and what it has registered. A UCX worker takes one thread at a time: callers hold
    `lock`. Raises what NIXL raises."""

    def __init__(self, nixl: ModuleType, interface: str) -> None:
        self.lock: Final = threading.RLock()
        self._registered: set[tuple[int, int]] = set()
        self._reads: dict[int, Any] = {}  # NIXL's handles, which keep its agent alive; nobody else has one
        self._numbers = itertools.count()
        name = f"peerload-{boot_id()[:8]}-{os.getpid()}-{secrets.token_hex(4)}"
        with _making, _environment(UCX_DEFAULTS, {"UCX_NET_DEVICES": interface}):
            self._nixl: Any = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._nixl.create_backend("UCX")

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        """Memory by address and bytes, if it isn't registered yet."""
        for key in regions:
            if key not in self._registered:
                self._nixl.register_memory(np.array([[*key, 0]], np.uint64), "DRAM", ["UCX"])
                self._registered.add(key)

    def metadata(self) -> bytes:
        data: bytes = self._nixl.get_agent_metadata()
        return data

    def meet(self, metadata: bytes) -> str:
        """The name of the agent whose metadata these are."""
        name: bytes | str = self._nixl.add_remote_agent(metadata)
        return name.decode(errors="replace") if isinstance(name, bytes) else name

    def progress(self) -> None:
        """Do what UCX has to do for peers that read from us."""
        self._nixl.get_new_notifs()

    def begin(self, peer: str, src: IntArray, dst: IntArray, run: IntArray) -> int:
        """Ask for runs; returns the number of the read."""
        zero = np.zeros_like(run)
        ours = self._nixl.get_xfer_descs(np.stack([dst, run, zero], axis=1).astype(np.uint64), "DRAM")
        theirs = self._nixl.get_xfer_descs(np.stack([src, run, zero], axis=1).astype(np.uint64), "DRAM")
        number = next(self._numbers)
        self._reads[number] = self._nixl.initialize_xfer("READ", ours, theirs, peer, b"", ["UCX"])
        self._nixl.transfer(self._reads[number])
        return number

    def state(self, number: int) -> str:
        """PROC, or how the read ended; only DONE is well. Moves bytes, so there is nothing to wait for."""
        state: str = self._nixl.check_xfer_state(self._reads[number])
        if state == "DONE":
            self._nixl.release_xfer_handle(self._reads.pop(number))
        return state

    def destroy(self) -> None:
        """Forget everything. When this returns, no byte is written any more. Safe to call twice."""
        with self.lock:
            if self._nixl is not None:
                gone = weakref.ref(self._nixl.agent)
                self._reads.clear()
                self._nixl = None
                if gone() is not None:
                    raise HostError("NIXL's agent can't be ended, and may go on writing", next_step="end this process")


class _NixlPeer:
    """A source and the agent that reads from it. Raises SourceUnreachable unless a byte can be read from it by `deadline`."""

    def __init__(self, told: NixlDescription, source: str, agent: _Agent, errors: tuple[type[Exception], ...]) -> None:
        self.source: Final = source
        self.table: Final = RegionTable(told.address, told.nbytes)
        self.same_host: Final = told.host == boot_id()
        self._agent, self._errors = agent, errors
        self._part_nbytes = PART_NBYTES[0]
        self._lost = ""
        self._landing = np.zeros(1, np.uint8)  # registered for nothing but the first byte; lives as long as the agent
        self._name = ""

    def meet(self, told: NixlDescription, deadline: Deadline) -> None:
        try:
            with self._agent.lock:
                self._name = self._agent.meet(base64.b64decode(told.metadata))
                self._agent.register([(self._landing.ctypes.data, 1)])
        except self._errors as error:
            raise SourceUnreachable(self.source, f"NIXL can't connect to it: {_text(error)}") from None
        if told.address:
            one = np.ones(1, np.int64)
            try:
                self._move(one * told.address[0], one * self._landing.ctypes.data, one, deadline, deadline.remaining_s)
            except (SourceLost, DeadlineExceeded) as error:
                problem = error.problem if isinstance(error, SourceLost) else "it does not answer"
                raise SourceUnreachable(self.source, f"can't be reached over NIXL: {problem}") from error

    def read(
        self, src: IntArray, dst: IntArray, run: IntArray, regions: Sequence[tuple[int, int]], deadline: Deadline, stall_s: float
    ) -> None:
        """Runs, none of them empty, into memory that lies in `regions`. Raises HostError when those can't be registered,
        SourceLost also when nothing has moved for `stall_s`."""
        problem = ""
        with self._agent.lock:
            self._check()
            try:
                self._agent.register(regions)
            except self._errors as error:
                problem = _text(error)
        if problem:
            raise HostError(f"NIXL refuses to register memory: {problem}", next_step="raise ulimit -l")
        end = np.cumsum(run)
        at, nbytes = 0, int(run.sum())
        while at < nbytes:
            to = min(nbytes, at + self._part_nbytes)
            rows = slice(int(np.searchsorted(end, at, "right")), int(np.searchsorted(end, to, "left")) + 1)
            skip = np.maximum(0, at - (end[rows] - run[rows]))
            size = np.minimum(end[rows], to) - (end[rows] - run[rows]) - skip
            begun_s = time.monotonic()
            self._move(src[rows] + skip, dst[rows] + skip, size, deadline, stall_s)
            if to - at >= PART_NBYTES[0]:  # a small one says nothing of the rate
                rate = (to - at) / max(1e-9, time.monotonic() - begun_s)
                self._part_nbytes = int(min(max(rate * PART_S, PART_NBYTES[0]), PART_NBYTES[1]))
            at = to

    def end(self, problem: str) -> None:
        """Nothing can be read from now on, and nothing is written when this returns."""
        with self._agent.lock:
            self._lost = self._lost or problem
            self._agent.destroy()

    def _move(self, src: IntArray, dst: IntArray, run: IntArray, deadline: Deadline, stall_s: float) -> None:
        """All of it, or the agent is gone. Raises SourceLost, DeadlineExceeded."""
        problem, loss = "", SourceLost
        try:
            with self._agent.lock:
                self._check()
                number = self._agent.begin(self._name, src, dst, run)
            begun_s = time.monotonic()
            while not problem:
                with self._agent.lock:
                    self._check()
                    state = self._agent.state(number)
                if state == "DONE":
                    return
                if state != "PROC":
                    problem = f"NIXL ended the transfer in state {state}"
                elif time.monotonic() - begun_s > stall_s:
                    problem, loss = f"it has made no progress for {stall_s:g} s", SourceStalled
                deadline.check(f"reading {int(run.sum())} bytes from {self.source}")
                time.sleep(0)
        except self._errors as error:
            problem = f"NIXL says {_text(error)}"
        except BaseException as error:
            _text(error)
            self.end("a read from it was given up")
            raise
        self.end(problem)
        raise loss(self.source, problem, next_step="plan the rest from other sources")

    def _check(self) -> None:
        if self._lost:
            raise SourceLost(self.source, self._lost, next_step="plan the rest from other sources")


class NixlTransport:
    """CPU memory so far. interface: the network interface to use, for which see the top of this file. stall_s: a source that
    makes no progress for so long is lost. Raises HostError when NIXL isn't there, ConfigError for an interface that isn't."""

    name = "nixl"
    #: 100,000 operations of 4 KiB run at 1.3 GB/s, large ones at 7.7: an operation costs 2.6 us, or 20 KiB.
    limits = Limits(strided=False, operation_nbytes=20 << 10, max_operations=1 << 16, max_batch_nbytes=64 << 20, pins=True)

    def __init__(self, interface: str, stall_s: float = 5.0) -> None:
        self._interface, self._stall_s = checked_interface(interface), stall_s
        self._nixl = module()
        self._errors = _errors(self._nixl)
        self._lock = threading.Lock()
        self._regions: dict[tuple[int, int], None] = {}
        self._here = RegionTable([], [])
        self._keys: list[tuple[int, int]] = []
        self._serving: _Agent | None = None
        self._peers: dict[str, _NixlPeer] = {}
        self._connected = 0
        self._warned = False
        self._closed = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="peerload-nixl", daemon=True)

    def register(self, regions: Sequence[Region]) -> None:
        """Adds to what is registered already. An agent registers memory when it is first used there."""
        if any(region.device != "cpu" for region in regions):
            raise HostError("transport nixl moves CPU memory only so far")
        with self._lock:
            self._check_open()
            self._regions.update({(region.address, region.nbytes): None for region in regions})
            self._keys = list(self._regions)
            self._here = RegionTable([a for a, _ in self._keys], [n for _, n in self._keys])
            if self._serving is not None:
                with self._translated("NIXL refuses to register memory"), self._serving.lock:
                    self._serving.register(self._keys)

    def describe(self) -> bytes:
        """Opens the door: see the top of this file."""
        with self._lock, self._translated("NIXL can't describe itself"):
            self._check_open()
            if self._serving is None:
                self._serving = _Agent(self._nixl, self._interface)
                self._poller.start()
            with self._serving.lock:
                self._serving.register(self._keys)
                metadata = self._serving.metadata()
            return encode(
                NixlDescription(
                    host=boot_id(),
                    metadata=base64.b64encode(metadata).decode(),
                    address=[a for a, _ in self._keys],
                    nbytes=[n for _, n in self._keys],
                )
            )

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        """Reads a byte, so that a peer that can't be reached is found out now."""
        told = decode(NixlDescription, description, source)
        self._check_open()
        try:
            with self._translated("NIXL can't start"):
                peer = _NixlPeer(told, source, _Agent(self._nixl, self._interface), self._errors)
        except HostError as error:
            raise SourceUnreachable(source, error.message, next_step=error.next_step) from error
        try:
            peer.meet(told, deadline)
            with self._lock:
                self._check_open()
                self._connected += 1
                handle = f"{source}#{self._connected}"
                self._peers[handle] = peer
        except BaseException:
            peer.end("it was never reached")
            raise
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Before anything moves, raises PlanError for destinations outside our regions and SourceLost for sources outside those
        of the peer; a run lies in one region."""
        self._check_open()
        with self._lock:
            there, here, keys = self._peers.get(peer), self._here, self._keys
        if there is None:
            raise PlanError(f"there is no peer {peer!r}")
        runs = Batch.of_runs(*batch.runs())
        rows = here.locate(runs)
        there.table.locate_sources(runs, there.source)
        nbytes, begun_s = runs.nbytes, time.monotonic()
        deadline.check(f"reading {nbytes} bytes from {there.source}")
        some = np.flatnonzero(runs.run)
        needed = [keys[row] for row in np.unique(rows[some]).tolist()]
        for i in range(0, len(some), self.limits.max_operations):
            part = some[i : i + self.limits.max_operations]
            there.read(runs.src[part], runs.dst[part], runs.run[part], needed, deadline, self._stall_s)
        rate = nbytes / max(1e-9, time.monotonic() - begun_s)
        if there.same_host and nbytes >= SLOW_FROM_NBYTES and rate < SLOW_NBYTES_PER_S and not self._warned:
            self._warned = True
            log.warning(
                "peerload: nixl reads %s at %.2f GB/s although it is on this host; UCX has fallen back to a slow path "
                "(UCX_LOG_LEVEL=info shows which)",
                there.source,
                rate / 1e9,
            )

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            peers, self._peers = self._peers, {}
            serving, self._serving = self._serving, None
        for peer in peers.values():
            peer.end("the transport was closed")
        if serving is not None:
            self._poller.join()
            serving.destroy()

    def _poll(self) -> None:
        serving = self._serving
        assert serving is not None, "the thread starts when there is an agent"
        while not self._closed.wait(POLL_S):
            try:
                with serving.lock:
                    serving.progress()
            except self._errors as error:
                log.warning("peerload: NIXL can't make progress for its readers: %s", _text(error))

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise HostError("the transport is closed")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise HostError(f"{what}: {_text(error)}", next_step=INSTALL) from None


def _text(error: BaseException) -> str:
    """What it says. Its traceback holds nothing afterwards: NIXL's agent can't be destroyed while a frame in it holds it."""
    traceback.clear_frames(error.__traceback__)
    return str(error)


def _errors(nixl: ModuleType) -> tuple[type[Exception], ...]:
    """What NIXL raises: classes of its bindings without a common base, and RuntimeError."""
    bindings = getattr(nixl, "nixlBind", None) or importlib.import_module(f"{nixl.__name__.removesuffix('._api')}._bindings")
    found = [
        e for name, e in vars(bindings).items() if name.startswith("nixl") and isinstance(e, type) and issubclass(e, Exception)
    ]
    return (*found, RuntimeError)


@contextmanager
def _environment(defaults: Mapping[str, str], settings: Mapping[str, str]) -> Iterator[None]:
    """Variables set for the block: defaults unless the operator has set them, settings in any case."""
    changed = {**{name: value for name, value in defaults.items() if name not in os.environ}, **settings}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
