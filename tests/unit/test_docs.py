"""What the documentation says is there: messages, links, and files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
#: Stands for a value that is known at run time only.
VALUE = "\0"


def texts(source: str) -> Iterator[str]:
    """Every string of a module but for docstrings, a value in it being VALUE."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield re.sub(r"%[-.\d]*[sdfgr]", VALUE, node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)


@cache
def messages() -> tuple[str, ...]:
    return tuple(text for path in (ROOT / "src").rglob("*.py") for text in texts(path.read_text(encoding="utf-8")))


def quoted() -> list[str]:
    """The messages of docs/troubleshooting.md: what the first cells of its tables have in backticks."""
    found: list[str] = []
    for line in TROUBLES.read_text(encoding="utf-8").splitlines():
        cell = line.removeprefix("|").partition("|")[0].strip()
        if line.startswith("| `"):
            found += re.split(r"`, `", cell.removeprefix("`").removesuffix("`"))
    return found


def occurs(message: str) -> bool:
    """Is there a string with these words, where `...` stands for anything?"""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in messages())


def test_there_is_a_message_in_every_row() -> None:
    assert len(quoted()) >= 20


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert occurs(message.removeprefix("peerload: "))


def test_words_that_nobody_says_are_noticed() -> None:
    assert not occurs("coordinator ... has taken the day off")


def anchors(page: Path) -> set[str]:
    """What a link can name after `#`, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """In backticks, with a folder: below the repository or the package."""
    for named in re.findall(r"`([\w.]+(?:/[\w.]+)+\.(?:py|cu|c|h|txt|toml))`", page.read_text(encoding="utf-8")):
        assert any((base / named).is_file() for base in (ROOT, ROOT / "src" / "peerload")), named


def test_the_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme] == []
