"""A safetensors directory as a seed: whole tensors, TP=1, whose buffers are the data parts of the files.

Only headers are read here. Weight bytes are read by the `files` transport, at addresses of a made-up space in which the files
stand one behind the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from ..config import Config
from ..errors import ConfigError, ManifestError
from ..model.boxes import Box, IntArray
from ..model.catalog import ITEMSIZE, Catalog, ModelKey
from ..model.layout import Layout, Piece, Pieces
from ..model.offer import Binding, Endpoint, Offer, SourceId
from ..transport.files import FileSet
from .header import Stored, read_header, tensors_in

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
#: The small files of a model directory that a seed passes on; config.json alone is required. Tokenizers can be many megabytes,
#: and nobody needs one to lay out a model.
PUBLISHED: Final = ("config.json", "generation_config.json")
#: Suffixes of files that hold weights in some format, and files with such a suffix that hold none.
_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_NO_WEIGHTS: Final = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt")
_MISTRAL: Final = "params.json"
_REPOSITORY: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # as the Hub calls a model
_SAMPLES: Final = 16
_SAMPLE_NBYTES: Final = 4096
_SAMPLED_TENSORS: Final = 4096
_TENSOR_NBYTES: Final = 256


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The small files that make weights a model: file name -> bytes. What a seed publishes beside its layout."""

    contents: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if not isinstance(self.config, dict):
            raise ConfigError("config.json is not a JSON object")

    @classmethod
    def of(cls, model: ModelFiles | str | Path) -> ModelFiles:
        """From a model directory, or the path of a config.json. Raises ConfigError."""
        if isinstance(model, ModelFiles):
            return model
        path = Path(model)
        if path.is_file():
            return cls({"config.json": _read(path)})
        if not path.is_dir():
            raise ConfigError(f"{path}: no such model directory or config.json")
        if not (path / "config.json").is_file():
            raise _not_this_format(path, "has no config.json")
        return cls({name: _read(path / name) for name in PUBLISHED if (path / name).is_file()})

    @property
    def config(self) -> dict[str, object]:
        """config.json, parsed. Raises ConfigError."""
        try:
            parsed: dict[str, object] = json.loads(self.contents["config.json"])
        except KeyError:
            raise ConfigError("the model's files lack config.json") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config.json is not JSON: {error}") from error
        return parsed

    def write(self, directory: Path) -> None:
        """Into an existing directory."""
        for name, content in self.contents.items():
            (directory / Path(name).name).write_bytes(content)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A safetensors directory whose headers have been read and found consistent. Holds no file open.

    files: the shards with sizes and times as found. data_offset: [files], first byte of each data part. tensors: by name,
    so that all who derive a catalog of this model have it in the same order.
    """

    directory: Path
    files: FileSet
    data_offset: IntArray
    tensors: tuple[Stored, ...]
    headers: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Raises ConfigError when there is no such checkpoint or a shard is missing, ManifestError when a header
        contradicts itself, its file or the index."""
        directory = Path(directory)
        shards, index = _shards(directory)
        try:
            files = FileSet.of(shards)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        headers: list[bytes] = []
        tensors: list[Stored] = []
        for number, (path, nbytes) in enumerate(zip(shards, files.nbytes, strict=True)):
            header = read_header(path, nbytes)
            headers.append(header)
            tensors += tensors_in(header, path.name, number, nbytes)
        found = {t.spec.name: shards[t.file].name for t in tensors}
        for name, shard in index.items():
            if found.get(name) != shard:
                raise ManifestError(f"{INDEX}[{name}]", f"says {shard}, which doesn't hold it")
        starts = np.array([8 + len(h) for h in headers], np.int64)
        return cls(directory, files, starts, tuple(sorted(tensors, key=lambda t: t.spec.name)), tuple(headers))

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog.of(t.spec for t in self.tensors)

    @cached_property
    def layout(self) -> Layout:
        """Every tensor whole, row-major; one buffer per file: its data part."""
        pieces = []
        for row, tensor in enumerate(self.tensors):
            shape, stride = tensor.spec.shape, ITEMSIZE[tensor.spec.dtype]
            strides: list[int] = []
            for size in reversed(shape):
                strides.insert(0, stride)
                stride *= size
            pieces.append(Piece(row, Box.whole(shape), tensor.file, tensor.offset, tuple(strides)))
        nbytes = np.array(self.files.nbytes, np.int64) - self.data_offset
        names = tuple(Path(path).name for path in self.files.path)
        return Layout(self.catalog, names, nbytes, Pieces.of(pieces, self.catalog.width))

    def offer(self) -> Offer:
        """The checkpoint as a source rank that the `files` transport reads. Its generation changes with the files' sizes
        and times."""
        description = self.files.encode()
        source = SourceId(f"disk:{self.directory.name}", 0, hashlib.sha256(description).hexdigest()[:16])
        address = np.array(self.files.base, np.int64) + self.data_offset
        return Offer(self.layout, Binding(source, address, (Endpoint("files", description),)))

    def identity(self) -> str:
        """A cheap fingerprint for `ModelKey.revision` when the operator gives none: 16 hex digits of a SHA-256 over
        config.json, all headers, all file sizes, 16 samples of 4 KiB from each file, and 256 bytes out of the middle of each
        tensor (of 4,096 evenly chosen ones, if there are more). It tells apart what differs in structure, and trainings that
        touch every tensor or one of those sampled; it isn't a hash of all weights. Name revisions to be sure."""
        state = hashlib.sha256()
        config = self.directory / "config.json"
        state.update(_read(config) if config.is_file() else b"")
        rows = zip(self.files.path, self.files.nbytes, self.headers, self.data_offset.tolist(), strict=True)
        for path, nbytes, header, start in rows:
            state.update(f"\0{Path(path).name}\0{nbytes}\0".encode() + header)
            with Path(path).open("rb") as stream:
                for sample in range(_SAMPLES):
                    stream.seek(start + (nbytes - start) * sample // _SAMPLES)
                    state.update(stream.read(_SAMPLE_NBYTES))
        with ExitStack() as stack:
            opened = [stack.enter_context(Path(path).open("rb", buffering=0)) for path in self.files.path]
            step = -(-len(self.tensors) // _SAMPLED_TENSORS) or 1
            for tensor in self.tensors[::step]:
                middle = tensor.offset + math.prod(tensor.spec.shape) * ITEMSIZE[tensor.spec.dtype] // 2
                state.update(os.pread(opened[tensor.file].fileno(), _TENSOR_NBYTES, int(self.data_offset[tensor.file]) + middle))
        return state.hexdigest()[:16]

    def key(self, name: str = "", revision: str = "", *, known_as: str = "", offered: Iterable[ModelKey] = ()) -> ModelKey:
        """Under which replicas of this checkpoint find each other: `name_of(name, known_as, directory)`, and `revision`, which
        defaults to `identity()`.

        offered: the models that seeds hold now. If neither name nor revision is given and one of them has our identity, it is
        the same model, whatever directory its seed was started with: we take its name."""
        if name and name_of(name) != name:
            name, known_as = "", name  # a path says where the model is, and is no name that was chosen for it
        key = ModelKey(name_of(name, known_as, self.directory), revision or self.identity())
        if not name and not revision:
            same = sorted(model.name for model in offered if model.revision == key.revision)
            if same and key.name not in same:
                return ModelKey(same[0], key.revision)
        return key


def name_of(*said: str | Path) -> str:
    """The name of a model, after the first of `said` that isn't empty: what a configuration, an engine or a user calls it. A
    snapshot folder of the Hugging Face cache has the repository's name ("org/name"), any other directory its own, links
    followed. What is no directory is a name already, and so is "org/name" where there happens to be such a folder."""
    for word in filter(None, map(str, said)):
        path = Path(word)
        if not path.is_dir() or _REPOSITORY.fullmatch(word):
            return word
        path = path.resolve()
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return path.name
    return ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def refuse_other_formats(directory: Path) -> None:
    """Raise ConfigError for a model directory whose weights are there, but not as safetensors."""
    if _weights_of(directory) and not any(directory.glob("*.safetensors")):
        raise _not_this_format(directory, "holds no safetensors file")


def _weights_of(directory: Path) -> list[str]:
    """Files that look like weights, by name."""
    return sorted(p.name for p in directory.iterdir() if p.suffix in _WEIGHTS and p.name not in _NO_WEIGHTS)


def _not_this_format(directory: Path, problem: str) -> ConfigError:
    """Says which weights are there instead, and what to do with them."""
    found = _weights_of(directory)
    has = f", but {', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}" if found else ""
    if (directory / _MISTRAL).is_file():
        return ConfigError(
            f"{directory}: {problem}{has}, and {_MISTRAL}: Mistral's own format, which is not supported",
            next_step=f"take the model in Hugging Face's format: config.json, and {SINGLE} or its shards",
        )
    if any(name.endswith(".gguf") for name in found):
        next_step = "take the model's safetensors files: GGUF is not supported"
    elif found:
        next_step = "save it as safetensors: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    else:
        next_step = "give a Hugging Face model directory, with config.json and safetensors files"
    return ConfigError(f"{directory}: {problem}{has}", next_step=next_step)


def _is_file(path: Path) -> bool:
    """False also for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _shards(directory: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files of a checkpoint in the order transformers looks for them, and the index's claims."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    if not (directory / INDEX).is_file():
        raise _not_this_format(directory, f"holds neither {SINGLE} nor {INDEX}")
    try:
        index = json.loads(_read(directory / INDEX))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(INDEX, "is not JSON with a weight_map") from error
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise ManifestError(f"{INDEX}.weight_map", "does not map tensors to files")
    shards = [directory / name for name in sorted(set(index.values()))]
    for path in shards:
        if path.parent != directory or not _is_file(path):
            raise ConfigError(f"{directory}: the index names {path.name}, which isn't there", next_step="download it again")
    return shards, index


def found_or_downloaded(model: str, config: Config, download: Callable[[], str]) -> Path:
    """The directory of the checkpoint that an engine calls `model`, downloaded if it isn't on this host. Not downloaded, and then
    not there, if `config` names the model and revision: seeds say what such a checkpoint holds."""
    directory = Path(model)
    return directory if directory.is_dir() or (config.model_name and config.revision) else Path(download())
