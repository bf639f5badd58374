"""The tree of docs/design.md, the linter's contract and the files say the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "peerload"
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
#: What is not told file by file: generated code, compiled code, stand-ins for tests.
WHOLE = ("_generated", "native", "sglang_stubs")


def told() -> Iterator[tuple[str, str]]:
    """Each path of the tree in docs/design.md, relative to the package, with its caption."""
    block = re.search(r"^    src/peerload/\n((?:      .*\n)+)", DESIGN, re.MULTILINE)
    assert block is not None, "docs/design.md has no tree"
    folders: list[str] = []
    for line in block.group(1).splitlines():
        name, _, caption = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip()) - 6) // 2
        folders[depth:] = [name]
        yield "".join(folders), caption.strip()


def files() -> set[str]:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    return {path for path in found if not path.endswith("__init__.py") and not set(Path(path).parts) & set(WHOLE)}


def test_the_tree_names_every_file_and_no_other() -> None:
    named = [path for path, _ in told() if not path.endswith("/")]
    assert len(named) == len(set(named))
    assert set(named) == files()


def test_every_line_of_the_tree_has_a_caption() -> None:
    assert [path for path, caption in told() if not caption] == []


def test_every_folder_says_what_lives_there() -> None:
    folders = [PACKAGE / path for path, _ in told() if path.endswith("/")]
    assert [folder.name for folder in folders if not (folder / "__init__.py").read_text().startswith('"""')] == []


def test_the_layers_are_those_of_the_contract() -> None:
    """`a > b | c > d` in docs/design.md: imports point to the right only."""
    line = re.search(r"^    (cli > .*(?:\n    > .*)*)$", DESIGN, re.MULTILINE)
    assert line is not None, "docs/design.md does not list the layers"
    layers = [names(part) for part in line.group(1).split(">")]
    (contract,) = (contract for contract in CONTRACTS if contract["type"] == "layers")
    assert layers == [names(layer) for layer in contract["layers"]]
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set().union(*layers)


def names(layer: str) -> set[str]:
    return {name.strip() for name in layer.split("|")}
