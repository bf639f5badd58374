"""The one configuration: what it takes, what it refuses and how it says so; and that its documentation is current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peerload.config import KEYS, Config
from peerload.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERLOAD_CONFIG", raising=False)


def test_a_document_is_text_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"url": "coordinator:7070", "wait_s": 30, "verify": False}
    path = tmp_path / "peerload.json"
    path.write_text(json.dumps(document))
    wanted = Config(url="coordinator:7070", wait_s=30.0, verify="off")
    assert Config.load(json.dumps(document)) == Config.load(str(path)) == wanted
    assert Config.load() == Config()
    monkeypatch.setenv("PEERLOAD_CONFIG", str(path))
    assert Config.load() == wanted
    assert Config.load('{"wait_s": 1}') == Config(wait_s=1.0)


def test_keyword_arguments_win_unless_they_are_none() -> None:
    document = '{"url": "a:1", "match": "same-parallelism"}'
    assert Config.load(document, url="b:2", match=None) == Config(url="b:2", match="same-parallelism")


def test_every_key_can_be_a_keyword_argument() -> None:
    assert Config.load(**{name: key.default for name, key in KEYS.items()}) == Config()
    assert not Config.load(source=False).source


def test_a_missing_file_is_named_wherever_its_path_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERLOAD_CONFIG", "/nonexistent/peerload.json")
    with pytest.raises(ConfigError, match=r"configuration file /nonexistent/peerload.json: No such file"):
        Config.load()


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown configuration key 'trasnport'") as error:
        Config.load('{"trasnport": "nixl"}')
    assert all(key in error.value.message for key in KEYS)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ('{"transport": "carrier-pigeon"}', "must be one of auto, local, nixl"),
        ('{"threads": "four"}', "threads is 'four', must be of type int"),
        ('{"verify": 1}', "verify is 1, must be of type str"),
        ('{"threads": true}', "threads is True, must be of type int"),
        ('{"staging_bytes": -1}', "must not be negative"),
        ("[]", r"configuration file \[\]: No such file"),
        ('{"deadline_s": NaN}', "deadline_s is more than 86400, or no number"),
        ('{"deadline_s": Infinity}', "deadline_s is more than 86400"),
        ('{"deadline_s": 86401}', "deadline_s is more than 86400"),
        ('{"wait_s": -Infinity}', "wait_s is -inf, must not be negative"),
        ('{"stall_s": 1' + "0" * 400 + "}", "stall_s is more than 86400"),
        ('{"staging_bytes": 1' + "0" * 400 + "}", "staging_bytes is more than"),
        ('{"deadline_s": 1' + "0" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"url": ' * 5000, "not JSON"),
        ('{"url": ' + "[" * 100_000, "not JSON"),
        ("no\0name", "configuration file 'no"),
        ('{"url": }', "not JSON"),
        ("/nonexistent/peerload.json", "configuration file /nonexistent/peerload.json: No such file"),
    ],
)
def test_senseless_values_are_refused_by_name(document: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Config.load(document)


def test_the_documentation_is_generated_from_the_class() -> None:
    command = [sys.executable, str(ROOT / "tools" / "generate_config_docs.py"), "--check"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (outcome.returncode, outcome.stdout) == (0, "up to date\n"), outcome.stderr
