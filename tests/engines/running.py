"""A real engine with its workers in a process of its own, for tests.

Each engine's folder has an `engine.py` that says how the engine is started and what it answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from peerload.testing.processes import Child

#: What is to be continued, and by how many tokens each.
PROMPTS = [[5, 17, 300, 42], [9, 8, 7, 6, 5, 4]]
TOKENS = 12
#: How long an engine may take to start or to answer. A start takes half a minute on an idle machine.
ANSWER_S = 500.0
#: How much of its log an error shows, characters: the reason often stands far from the end.
TAIL = 20_000


class EngineProcess(Child):
    """An engine that was told to start. Several may be started before the first is waited for (`wait`).

    It runs `main(arguments, link)` of `folder`/engine.py, which first says "ready" and answers "tokens"."""

    def __init__(
        self,
        folder: Path,
        arguments: Mapping[str, object],
        *,
        python: str,
        environment: Mapping[str, str],
        log: Path | None = None,
    ) -> None:
        """python: of an environment that has the engine."""
        path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(folder), str(folder.parent)]))
        super().__init__(
            "engine:main",
            arguments,
            name=f"the {folder.name} instance",
            python=python,
            environment={**environment, "PYTHONPATH": path},
            log=log,
            grace_s=60.0,
        )

    def wait(self) -> Self:
        """Until it serves."""
        self.hear(ANSWER_S)
        return self

    def ask(self, order: object, timeout_s: float = ANSWER_S) -> Any:
        return super().ask(order, timeout_s)

    def tokens(self) -> list[list[int]]:
        """Those that greedily follow each prompt."""
        return self.ask("tokens")

    def tail(self) -> str:
        return self.log[-TAIL:]
