"""Regenerate `src/peerload/coordinator/_generated` from `src/peerload/coordinator/*.proto`; with `--check`, only compare.

Needs the `dev` extra (grpcio-tools, mypy-protobuf). Exit code 1: the committed code is stale.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

RPC = Path(__file__).resolve().parent.parent / "src" / "peerload" / "coordinator"
#: The path under which protoc sees the files, so that generated code imports itself from inside the package.
PACKAGE = "peerload/coordinator/_generated"


def generate(out: Path) -> dict[str, str]:
    """Run protoc into the empty folder `out`; returns the text of every generated file by name."""
    protos = sorted(RPC.glob("*.proto"))
    arguments = ["protoc", f"--proto_path={PACKAGE}={RPC}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # Installed beside this interpreter, which need not be on the PATH.
    here = Path(sys.executable).parent
    arguments += [f"--plugin=protoc-gen-{kind}={here / f'protoc-gen-{kind}'}" for kind in ("mypy", "mypy_grpc")]
    if protoc.main([*arguments, *(f"{PACKAGE}/{p.name}" for p in protos)]) != 0:
        raise SystemExit("protoc failed")
    return {p.name: p.read_text(encoding="utf-8") for p in sorted((out / PACKAGE).iterdir())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    check = parser.parse_args().check
    target = RPC / "_generated"
    with tempfile.TemporaryDirectory() as out:
        fresh = generate(Path(out))
    committed = {p.name: p.read_text(encoding="utf-8") for p in target.glob("*_pb2*.py*")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if check:
        sys.stdout.write(f"stale: {', '.join(stale)}\n" if stale else "up to date\n")
        return 1 if stale else 0
    for name in committed.keys() - fresh.keys():
        (target / name).unlink()
    for name, text in fresh.items():
        (target / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {', '.join(stale) or 'nothing: up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
