"""The versions of each engine that were tested, and how. The log, `./dev`, the tests and docs/engines.md read this table."""

from __future__ import annotations

import logging
from functools import cache
from typing import Final, NamedTuple

log = logging.getLogger(__name__)


class Tested(NamedTuple):
    """One release of an engine. how: what was run, as docs/engines.md says it. overlay: `./dev test` lays its GPU wheel over the
    engine's environment, and traces layouts with it."""

    version: str
    how: str
    overlay: bool = False


#: By engine, the newest first.
TESTED: Final = {
    "vllm": (
        Tested("0.33.0", "layouts of its GPU wheel, traced without a GPU", overlay=True),
        Tested("0.32.0", "instances and layouts on CPUs"),
        Tested("0.24.0", "instances on two H200s; layouts of its GPU wheel, traced without a GPU", overlay=True),
    ),
    "sglang": (Tested("0.5.23", "instances and layouts on CPUs"),),
    "transformers": (Tested("5.23.0", "loads and layouts on CPUs"),),
}


@cache
def warn_unless_tested(engine: str) -> None:
    """Say once that `engine` (name and version, as in "vllm 0.32.0") is a release that was not tested. It is used all the same:
    what its loader does is traced, whatever its version."""
    name, _, version = engine.partition(" ")
    tested = [t.version for t in TESTED.get(name, ())]
    if tested and version.partition("+")[0] not in tested:
        log.warning("peerload: %s %s was not tested with this release of peerload; tested: %s", name, version, ", ".join(tested))
