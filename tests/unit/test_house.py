"""The tree of docs/design.md, the linter's contract and the files say the same."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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


#: Most lines of a file, and of a function.
FILE_LINES, FUNCTION_LINES = 500, 60


def modules(folder: Path = PACKAGE) -> list[Path]:
    """All but generated code."""
    return sorted(path for path in folder.rglob("*.py") if "_generated" not in path.parts)


def test_a_class_name_stands_in_one_module() -> None:
    """A leading underscore makes no other word of it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in sorted(found.items()) if len(paths) > 1} == {}


def test_files_and_functions_are_short() -> None:
    long = []
    for path in [*modules(), *modules(ROOT / "tests")]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if text.count("\n") > FILE_LINES:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert long == []


def test_the_formatter_is_never_switched_off() -> None:
    switch = re.compile(r"#\s*fmt:\s*(skip|off)")
    found = [path for path in [*modules(), *modules(ROOT / "tests")] if switch.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types and imports inside functions count."""
    known = {dotted(path): path for path in modules(PACKAGE)}
    try:
        TopologicalSorter({name: set(imported(name, path, known)) - {name} for name, path in known.items()}).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that this one names in an import."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from (found for found in inner if found in known)
            if module in known and not all(found in known for found in inner):
                yield module
