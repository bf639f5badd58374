"""NIXL (https://github.com/ai-dynamo/nixl) over UCX: RDMA, TCP between hosts, CMA within one. The only importer of it.

The configuration is what was measured to be best: no progress thread (it burns half a core for ever and reads 5 GB/s on one
host, against 7.7 without); instead whoever has described itself polls every 10 ms, which costs 1 % of a core and is
needed for a reader's connection to complete. Over TCP, UCX's default segments reach 0.6 GB/s and 1 MiB segments 2.4: see
UCX_DEFAULTS, which are in the environment only while the backend is being made, and never override the operator's.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..deadline import Deadline
from ..errors import DeadlineExceeded, HostError, PlanError, SourceLost, SourceUnreachable
from .base import Limits, Region
from .host import boot_id
from .table import RegionTable

INSTALL: Final = "pip install --no-deps nixl-cu12 (or nixl-cu13); it needs no GPU"
MODULES: Final = ("nixl_cu13", "nixl_cu12", "nixl._api")
UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "1m", "UCX_TCP_RX_SEG_SIZE": "1m", "UCX_TCP_SNDBUF": "4m", "UCX_TCP_RCVBUF": "4m",
}  # fmt: skip
POLL_S: Final = 0.010
#: How long a peer may take to answer the first read.
CONNECT_S: Final = 10.0
#: Below this rate on one host UCX has fallen back to something slow.
SLOW_NBYTES_PER_S: Final = 0.5e9
SLOW_FROM_NBYTES: Final = 32 << 20

log = logging.getLogger(__name__)


class _Agent(Protocol):
    """What we use of `nixl_agent`. Descriptor lists and transfers are opaque to us."""

    def create_backend(self, backend: str) -> None: ...
    def register_memory(self, regions: npt.NDArray[np.uint64], mem_type: str, backends: list[str]) -> object: ...
    def deregister_memory(self, registered: object, backends: list[str]) -> None: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> bytes | str: ...
    def remove_remote_agent(self, agent: str) -> None: ...
    def get_new_notifs(self) -> object: ...
    def get_xfer_descs(self, rows: npt.NDArray[np.uint64], mem_type: str) -> object: ...
    def initialize_xfer(self, operation: str, here: object, there: object, agent: str, notif_msg: bytes, backends: list[str]) -> object: ...  # noqa: E501  # fmt: skip
    def transfer(self, transfer: object) -> str: ...
    def check_xfer_state(self, transfer: object) -> str: ...
    def release_xfer_handle(self, transfer: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _Peer:
    source: str
    agent: str
    table: RegionTable
    same_host: bool


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


class NixlTransport:
    """CPU memory so far. Raises HostError when NIXL isn't there or has no UCX."""

    name = "nixl"
    #: 100,000 operations of 4 KiB run at 1.3 GB/s, large ones at 7.7: an operation costs 2.6 us, or 20 KiB.
    limits = Limits(strided=False, operation_nbytes=20 << 10, max_operations=1 << 16, max_batch_nbytes=64 << 20)

    def __init__(self, threads: int = 0) -> None:
        del threads  # UCX moves bytes in the thread that asks
        nixl = module()
        self._errors = _errors(nixl)
        self._lock = threading.RLock()  # one UCX worker: one thread at a time
        self._name = f"peerload-{boot_id()[:8]}-{os.getpid()}-{secrets.token_hex(4)}"
        with self._translated("NIXL can't start"), _environment(UCX_DEFAULTS):
            self._agent: _Agent = nixl.nixl_agent(self._name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._agent.create_backend("UCX")
        self._registered: dict[tuple[int, int], object] = {}
        self._here = RegionTable([], [])
        self._peers: dict[str, _Peer] = {}
        self._connected = 0
        self._warned = False
        self._closed = threading.Event()
        self._poller: threading.Thread | None = None

    def register(self, regions: Sequence[Region]) -> None:
        """Adds to what is registered already."""
        if any(region.device != "cpu" for region in regions):
            raise HostError("transport nixl moves CPU memory only so far")
        with self._lock, self._translated("NIXL refuses to register memory"):
            self._check_open()
            for region in regions:
                key = region.address, region.nbytes
                if key not in self._registered:
                    self._registered[key] = self._agent.register_memory(np.array([[*key, 0]], np.uint64), "DRAM", ["UCX"])
            self._here = RegionTable([a for a, _ in self._registered], [n for _, n in self._registered])

    def describe(self) -> bytes:
        with self._lock, self._translated("NIXL can't describe itself"):
            self._check_open()
            if self._poller is None:
                self._poller = threading.Thread(target=self._poll, name="peerload-nixl", daemon=True)
                self._poller.start()
            metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
            told = {
                "host": boot_id(), "metadata": metadata,
                "address": [a for a, _ in self._registered], "nbytes": [n for _, n in self._registered],
            }  # fmt: skip
        return json.dumps(told, separators=(",", ":")).encode()

    def connect(self, description: bytes, source: str) -> str:
        """Reads a byte, so that a peer that can't be reached is found out now."""
        try:
            told = json.loads(description)
            metadata = base64.b64decode(told["metadata"], validate=True)
            table = RegionTable(told["address"], told["nbytes"])
            same_host = told["host"] == boot_id()
            first = int(told["address"][0]) if told["address"] else 0
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise SourceUnreachable(source, f"gave a description that makes no sense: {error}") from error
        try:
            with self._lock:
                self._check_open()
                agent = self._agent.add_remote_agent(metadata)
        except self._errors as error:
            raise SourceUnreachable(source, f"NIXL can't connect to it: {error}") from error
        peer = _Peer(source, agent.decode() if isinstance(agent, bytes) else agent, table, same_host)
        if first:
            self._try(peer, first)
        with self._lock:
            self._connected += 1
            handle = f"{source}#{self._connected}"
            self._peers[handle] = peer
        return handle

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Raises PlanError, before anything moves, for bytes outside the registered regions of either side; a run lies in
        one region."""
        self._check_open()
        there = self._peers.get(peer)
        if there is None:
            raise PlanError(f"there is no peer {peer!r}")
        src, dst, run = batch.runs()
        self._here.locate(dst, dst + run, "dst", "this process")
        there.table.locate(src, src + run, "src", f"source {there.source}")
        some = np.flatnonzero(run)
        nbytes, began = int(run.sum()), time.monotonic()
        deadline.check(f"reading {nbytes} bytes from {there.source}")
        for i in range(0, len(some), self.limits.max_operations):
            part = some[i : i + self.limits.max_operations]
            self._transfer(there, src[part], dst[part], run[part], deadline)
        rate = nbytes / max(1e-9, time.monotonic() - began)
        if there.same_host and nbytes >= SLOW_FROM_NBYTES and rate < SLOW_NBYTES_PER_S and not self._warned:
            self._warned = True
            log.warning(
                "peerload: nixl reads %s at %.2f GB/s although it is on this host; UCX has fallen back to a slow path "
                "(UCX_LOG_LEVEL=info shows which)", there.source, rate / 1e9,
            )  # fmt: skip

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        if self._poller is not None:
            self._poller.join()
        with self._lock:
            for agent in {peer.agent for peer in self._peers.values()}:
                with suppress(*self._errors):
                    self._agent.remove_remote_agent(agent)
            self._peers.clear()
            for registered in self._registered.values():
                with suppress(*self._errors):
                    self._agent.deregister_memory(registered, ["UCX"])
            self._registered.clear()
            self._here = RegionTable([], [])
            del self._agent

    def _transfer(
        self, there: _Peer, src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], run: npt.NDArray[np.int64], deadline: Deadline
    ) -> None:
        zero = np.zeros_like(run)
        transfer: object = None
        try:
            with self._lock:
                ours = self._agent.get_xfer_descs(np.stack([dst, run, zero], axis=1).astype(np.uint64), "DRAM")
                theirs = self._agent.get_xfer_descs(np.stack([src, run, zero], axis=1).astype(np.uint64), "DRAM")
                transfer = self._agent.initialize_xfer("READ", ours, theirs, there.agent, b"", ["UCX"])
                state = self._agent.transfer(transfer)
            while state == "PROC":
                deadline.check(f"reading {int(run.sum())} bytes from {there.source}")
                with self._lock:
                    self._check_open()
                    state = self._agent.check_xfer_state(transfer)  # moves bytes, so there is nothing to wait for
                time.sleep(0)
        except self._errors as error:
            raise SourceLost(there.source, f"NIXL says {error}", next_step="plan the rest from other sources") from error
        finally:
            if transfer is not None and not self._closed.is_set():
                with self._lock, suppress(*self._errors):
                    self._agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise SourceLost(there.source, f"NIXL ended the transfer in state {state}")

    def _try(self, peer: _Peer, address: int) -> None:
        """Read a byte into memory registered for nothing else."""
        landing = np.zeros(1, np.uint8)
        one = np.ones(1, np.int64)
        with self._lock, self._translated("NIXL refuses to register memory"):
            registered = self._agent.register_memory(np.array([[landing.ctypes.data, 1, 0]], np.uint64), "DRAM", ["UCX"])
        try:
            self._transfer(peer, one * address, one * landing.ctypes.data, one, Deadline.after(CONNECT_S))
        except (SourceLost, DeadlineExceeded) as error:
            raise SourceUnreachable(peer.source, f"does not answer over NIXL: {error.message}") from error
        finally:
            with self._lock, suppress(*self._errors):
                self._agent.deregister_memory(registered, ["UCX"])

    def _poll(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                with self._lock:
                    self._agent.get_new_notifs()
            except self._errors as error:
                log.warning("peerload: NIXL can't make progress for its readers: %s", error)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise HostError("the transport is closed")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise HostError(f"{what}: {error}", next_step=INSTALL) from error


def _errors(nixl: ModuleType) -> tuple[type[Exception], ...]:
    """What NIXL raises: classes of its bindings without a common base, and RuntimeError."""
    bindings = getattr(nixl, "nixlBind", None) or importlib.import_module(f"{nixl.__name__.removesuffix('._api')}._bindings")
    found = [
        e for name, e in vars(bindings).items() if name.startswith("nixl") and isinstance(e, type) and issubclass(e, Exception)
    ]
    return (*found, RuntimeError)


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Variables set for the block, unless the operator has set them: UCX reads them when its context is made."""
    missing = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
