from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from peerload.bare import BareRank  # noqa: E402
from peerload.engines.checkpoint import ModelFiles  # noqa: E402
from peerload.engines.shards import writable, write_rank  # noqa: E402
from peerload.engines.transformers import layout_for  # noqa: E402
from peerload.errors import ConfigError, HostError  # noqa: E402
from peerload.manifest import Parallel  # noqa: E402
from peerload.testing.checkpoints import model_config  # noqa: E402


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Like a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    files = ModelFiles({"config.json": json.dumps(model_config("llama")).encode()})
    rank = BareRank.of(layout_for(files, Parallel(2), 1))
    with closing(rank.arena):
        with files_of_at_most(10_000), pytest.raises(HostError, match=r"rank 1: can't write .*rank-00001-of-00002.safetensors"):
            write_rank(tmp_path, rank, 2)
        assert list(tmp_path.iterdir()) == []
        path = write_rank(tmp_path, rank, 2)
        assert list(tmp_path.iterdir()) == [path]
        before = path.read_bytes()
        with files_of_at_most(10_000), pytest.raises(HostError):
            write_rank(tmp_path, rank, 2)
        assert path.read_bytes() == before
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {rank.layout.tensor_of(i).name for i in rank.layout.written.tolist()}


@pytest.mark.parametrize("out", ["/etc/passwd", "/etc/passwd/sub", "/proc/nope", "/dev/full", "/dev/null/x", "nul\0"])
def test_places_that_cannot_be_written_to(out: str) -> None:
    with pytest.raises(ConfigError, match="can't write to "):
        writable(Path(out))


def test_a_directory_is_made(tmp_path: Path) -> None:
    writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
