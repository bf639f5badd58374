"""Transports by name, and what the host is found able to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from peerload.config import Config
from peerload.deadline import Deadline
from peerload.errors import ConfigError, HostError, SourceUnreachable
from peerload.transport.base import Limits, Region
from peerload.transport.deferred import Deferred
from peerload.transport.local import LocalTransport
from peerload.transport.registry import cma_error, open_transport, open_transports, probe

OPEN_AND_CLOSE = """
from peerload.config import Config
from peerload.deadline import Deadline
from peerload.transport.registry import open_transports
for transport in open_transports(Config()).values():
    transport.close()
"""


def test_auto_is_local_and_files_are_always_read() -> None:
    opened = open_transports(Config())
    for name, transport in opened.items():
        assert transport.name == name
        transport.close()
    assert list(opened) == ["local", "files"]


def test_one_that_is_asked_for_by_name_is_the_only_one() -> None:
    opened = open_transports(Config(transport="local"))
    assert list(opened) == ["local", "files"]
    for transport in opened.values():
        transport.close()


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu13", "nixl_cu12", "nixl._api", "nixl"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert not probe("nixl").available
    assert "pip install" in probe("nixl").install
    with pytest.raises(HostError, match="nixl_cu12"):
        open_transport("nixl", Config(interface="lo"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    for ask in (probe, lambda name: open_transport(name, Config())):
        with pytest.raises(ConfigError, match="local, nixl"):
            ask("carrier-pigeon")


def test_the_probe_of_local_says_what_the_host_allows() -> None:
    found = probe("local")
    assert found.available
    assert ("can't" in found.reason) == (cma_error() != 0)
    assert bool(found.install) == (cma_error() != 0)


def test_opening_transports_prints_nothing_on_standard_output() -> None:
    done = subprocess.run([sys.executable, "-c", OPEN_AND_CLOSE], stdout=subprocess.PIPE, timeout=60, check=True)
    assert done.stdout == b""


class Refusing(LocalTransport):
    """A transport whose host lets nobody register memory."""

    closed = False

    def register(self, regions: Sequence[Region]) -> None:
        raise HostError("no memory may be pinned", next_step="raise ulimit -l")

    def close(self) -> None:
        self.closed = True
        super().close()


def test_a_deferred_transport_that_its_host_refuses_is_closed_and_in_nobodys_way() -> None:
    made: list[Refusing] = []

    def make() -> Refusing:
        made.append(Refusing(threads=1))
        return made[-1]

    deferred = Deferred("files", Limits(strided=False, operation_nbytes=1), make)
    deferred.register([Region(4096, 1)])
    for _ in range(2):
        with pytest.raises(HostError, match="pinned"):
            deferred.describe()
    assert [t.closed for t in made] == [True]
    deferred.register([Region(8192, 1)])
    with pytest.raises(SourceUnreachable, match="pinned"):
        deferred.connect(b"", "source", Deadline.after(20))
    deferred.close()
