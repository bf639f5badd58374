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


LISTENING = """
import os, sys
from pathlib import Path
from peerload.config import Config
from peerload.transport.registry import open_transports
for transport in open_transports(Config.load(sys.argv[1])).values():
    transport.describe()
mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
for table in ("tcp", "tcp6", "udp", "udp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        columns = line.split()
        if f"socket:[{columns[9]}]" in mine and (table.startswith("udp") or columns[3] == "0A"):
            print(columns[1].partition(":")[0])
os._exit(0 if sys.stdout.flush() is None else 1)
"""


def listening(config: str) -> list[str]:
    """Addresses, as the kernel writes them, on which a process with these transports can be reached through the network."""
    done = subprocess.run([sys.executable, "-c", LISTENING, config], stdout=subprocess.PIPE, timeout=60, check=True, text=True)
    return done.stdout.split()


def test_nobody_can_reach_a_seed_through_the_network_by_default() -> None:
    assert listening("{}") == []


@pytest.mark.skipif(not probe("nixl").available, reason=probe("nixl").reason)
def test_nixl_can_be_reached_on_the_named_interface_only() -> None:
    assert set(listening('{"transport": "nixl", "interface": "lo"}')) == {"0100007F"}


def test_nixl_without_an_interface_is_refused_with_the_reason() -> None:
    for config, problem in ((Config(), "can read and overwrite the weights"), (Config(interface="lo,eth77"), "'eth77'")):
        with pytest.raises(ConfigError, match=problem) as error:
            open_transport("nixl", config)
        assert "lo" in error.value.next_step


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
