"""Traced layouts kept in files, one for each rank of a model under an engine, for the offline commands.

`peerload layout` and `peerload plan --engine` would otherwise start an engine to answer a question they have answered before.
Running instances never look here: they trace the model they have in their hands, every time. A file is two lines of JSON: what
it is for and the digest of the second line, which is the layout. Delete it, or the folder, whenever you like. One that is
damaged, or of another format, is ignored with a warning and written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from ..errors import ConfigError, ManifestError
from ..model.catalog import Catalog, Parallel
from ..model.layout import Constant, Layout, Pieces

#: Goes up whenever what is written changes.
FORMAT: Final = 2

_COLUMNS: Final = ("tensor", "start", "stop", "buffer", "offset", "stride")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayoutKey:
    """All that a layout depends on. engine: name; version: the engine's. tracer: digest of the code here that derives layouts.
    model: digest of config.json and of the checkpoint's names, dtypes and shapes. quantization: its method's name or empty.
    device: capability of the one that the engine chooses its kernels for ("cpu", "cuda 9.0"). platform: the one that was asked
    for. arguments: the operator's of the engine, as JSON."""

    engine: str
    version: str
    tracer: str
    model: str
    quantization: str
    parallel: Parallel
    rank: int
    device: str
    platform: str = "auto"
    arguments: str = "{}"

    @property
    def filename(self) -> str:
        """Readable, and different for different keys."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        p = self.parallel
        return f"{self.engine}-{self.model[:8]}-tp{p.tp}-pp{p.pp}-ep{p.ep}-rank{self.rank}-{digest}.json"


@dataclass(frozen=True, slots=True, eq=False)
class CachedTrace:
    """What is kept of a trace. derived: logical name -> reason, for tensors that only the engine can make; covers: -> the
    checkpoint tensors that it makes them of. made and hidden: as in `loader.Traced`."""

    layout: Layout
    derived: Mapping[str, str] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)
    covers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LayoutCache:
    """A folder of such files, made when the first is written. None of it is locked: files are replaced as a whole."""

    folder: Path

    def get(self, key: LayoutKey) -> CachedTrace | None:
        """None when there is no file, or none that can be used."""
        path = self.folder / key.filename
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            log.warning("cached layout %s can't be read and is made anew: %s", path, error)
            return None
        try:
            return _decoded(text, key)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ManifestError) as error:
            log.warning("cached layout %s is damaged or of another format and is made anew: %s", path, error)
            return None

    def put(self, key: LayoutKey, kept: CachedTrace) -> Path:
        """Returns the file's path. Raises ConfigError when the folder can't be written."""
        path = self.folder / key.filename
        scratch = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.folder, suffix=".part", delete=False) as stream:
                scratch = stream.name
                stream.write(_encoded(key, kept))
            Path(scratch).replace(path)
        except OSError as error:
            if scratch:
                Path(scratch).unlink(missing_ok=True)
            raise ConfigError(
                f"cached layout {path} can't be written: {error.strerror}", next_step="choose another folder, or --cache off"
            ) from error
        return path


def model_digest(config: bytes, catalog: Catalog) -> str:
    """For `LayoutKey.model`: 32 hexadecimal digits of a SHA-256."""
    state = hashlib.sha256(config)
    state.update(json.dumps([catalog.names, catalog.dtypes, catalog.shapes]).encode())
    return state.hexdigest()[:32]


@cache
def tracer_digest() -> str:
    """For `LayoutKey.tracer`: of `tracers()`."""
    state = hashlib.sha256()
    for path in tracers():
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def tracers() -> list[Path]:
    """The sources that say what an engine's parameters hold: those of `tracing/` and `engines/`."""
    package = Path(__file__).parents[1]
    return sorted(path for folder in ("tracing", "engines") for path in (package / folder).rglob("*.py"))


def device_capability() -> str:
    """For `LayoutKey.device`: of the first accelerator that engines here would use."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda {}.{}".format(*torch.cuda.get_device_capability())


def _encoded(key: LayoutKey, kept: CachedTrace) -> str:
    layout, p = kept.layout, kept.layout.pieces
    head = {"format": FORMAT, "key": asdict(key)}
    body = json.dumps(
        {
            "derived": dict(kept.derived),
            "made": kept.made,
            "hidden": dict(kept.hidden),
            "covers": dict(kept.covers),
            "aliases": dict(layout.aliases),
            "ignored": dict(layout.ignored),
            "parallel": asdict(layout.parallel),
            "rank": layout.rank,
            "buffers": [layout.buffer_names, layout.buffer_nbytes.tolist()],
            "tensors": [layout.catalog.names, layout.catalog.dtypes, layout.catalog.shapes],
            "pieces": {name: getattr(p, name).tolist() for name in _COLUMNS},
            "constants": [[c.buffer, c.offset, c.shape, c.strides, c.fill.hex()] for c in layout.constants],
        }
    )
    return json.dumps({**head, "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body + "\n"


def _decoded(text: str, key: LayoutKey) -> CachedTrace:
    """Raises one of the errors that `get` expects for everything that `_encoded` didn't write for this key."""
    first, body, _ = text.split("\n", 2)
    head = json.loads(first)
    if head["format"] != FORMAT:
        raise ValueError(f"format {head['format']!r}, not {FORMAT}")
    if head["key"] != asdict(key):
        raise ValueError("it is for something else")
    if head["sha256"] != hashlib.sha256(body.encode()).hexdigest():
        raise ValueError("its SHA-256 is another one")
    found = json.loads(body)
    names, dtypes, shapes = found["tensors"]
    catalog = Catalog(tuple(names), tuple(dtypes), tuple(map(tuple, shapes)))
    rows = len(found["pieces"]["tensor"])
    columns = {name: np.array(found["pieces"][name], np.int64) for name in _COLUMNS}
    pieces = Pieces(**{n: c.reshape(rows, catalog.width) if n in ("start", "stop", "stride") else c for n, c in columns.items()})
    layout = Layout(
        catalog,
        tuple(found["buffers"][0]),
        np.array(found["buffers"][1], np.int64),
        pieces,
        tuple(Constant(b, at, tuple(shape), tuple(step), bytes.fromhex(fill)) for b, at, shape, step, fill in found["constants"]),
        found["aliases"],
        found["ignored"],
        Parallel(**found["parallel"]),
        found["rank"],
    )
    return CachedTrace(
        layout, found["derived"], tuple(found["made"]), found["hidden"], {n: tuple(c) for n, c in found["covers"].items()}
    )
