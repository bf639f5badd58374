"""Tests on real engines run in the environment of one engine each (`./dev engines`); elsewhere they are left out by name."""

from __future__ import annotations

from importlib.metadata import packages_distributions

import pytest

#: Folders whose engine isn't installed here.
collect_ignore = sorted({"vllm", "sglang"} - packages_distributions().keys())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine in collect_ignore:
        terminalreporter.write_line(f"left out: tests/engines/{engine}, without {engine} (./dev test runs it where there is one)")
