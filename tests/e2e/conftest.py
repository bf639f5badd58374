"""What tests of whole loads share: a coordinator, seeds and targets of one small model, and sources that misbehave."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from peerload.coordinator.client import CoordinatorClient
from peerload.coordinator.server import Coordinator, serve
from peerload.model.catalog import Parallel
from peerload.testing.instances import CONFIG, Life, Result
from peerload.testing.layouts import llama
from peerload.transport.base import Transport
from peerload.transport.faulty import Faults, Faulty
from peerload.transport.probes import probe

#: 6.5 MB.
MODEL = llama(name="small", hidden=256, inter=640, heads=8, kv_heads=4, head=32, layers=4, vocabulary=1000)
BATCH = 64 << 10
#: The last one is that of the test that runs.
NAME = ["test-0"]

HAVE_NIXL = probe("nixl").available
needs_nixl = pytest.mark.skipif(not HAVE_NIXL, reason="nixl is not installed")


@contextmanager
def coordinator_process(store: str = "memory", listen: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = (
        "import sys; from peerload.coordinator.server import serve; "
        "c = serve(*sys.argv[1:]); print(c.address, flush=True); c.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code, listen, store], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture(scope="module")
def shared_url() -> Iterator[str]:
    with coordinator_process() as (_, url):
        yield url


@pytest.fixture
def url(shared_url: str) -> str:
    """The coordinator of all tests of a file; each has a model of its own, since the leases of killed seeds outlive a test."""
    NAME.append(f"test-{len(NAME)}")
    return shared_url


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with serve("127.0.0.1:0") as running:
        yield running


@pytest.fixture
def client(coordinator: Coordinator) -> Iterator[CoordinatorClient]:
    with CoordinatorClient(coordinator.address) as running:
        yield running


def seed(url: str, instance: str = "seed", **changes: object) -> Life:
    values = {"url": url, "model": MODEL, "name": NAME[-1], "instance": instance, "config": CONFIG, "ttl_s": 2.0, **changes}
    return Life(**values)  # type: ignore[arg-type]


def target(url: str, tp: int = 1, **changes: object) -> Life:
    return seed(url, "target", **{"parallel": Parallel(tp=tp), **changes})


class Slow:
    """Small batches, and something that happens before the n-th read of a source, or before each of several."""

    def __init__(self, source: str, at: int | range, then: Callable[[], object]) -> None:
        self._source, self._then = source, then
        self._at = range(at, at + 1) if isinstance(at, int) else at
        self._lock, self._reads = threading.Lock(), 0
        self.happened = threading.Event()

    def __call__(self, _rank: int, transport: Transport) -> Transport:
        if transport.name == "files":
            return transport
        slow = Faulty(transport, Faults(source=self._source, delay_s=1e-6), sleep=self._before)
        slow.limits = replace(transport.limits, max_batch_nbytes=BATCH)
        return slow

    def _before(self, _s: float) -> None:
        with self._lock:
            self._reads += 1
            now = self._reads in self._at
        if now:
            self._then()
            self.happened.set()


def faulty(faults: Faults) -> Callable[[int, Transport], Transport]:
    return lambda _, transport: transport if transport.name == "files" else Faulty(transport, faults)


def good(results: Sequence[Result]) -> None:
    for result in results:
        if result.error is not None:
            raise result.error
        assert result.receipt is not None
        assert result.wrong == []


def only(results: Sequence[Result], kind: type[BaseException]) -> BaseException:
    (result,) = results
    assert result.receipt is None
    assert isinstance(result.error, kind), result.error
    return result.error
