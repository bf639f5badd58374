"""What a rank received, as a safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ConfigError, HostError
from ..tracing.dtypes import DTYPES
from .bare import BareRank


def writable(directory: Path) -> None:
    """Make the directory unless it is there. Raises ConfigError when files can't be written to it."""
    probe = directory / f".peerload-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't write to {directory}: {getattr(error, 'strerror', None) or error}") from error


def write_rank(directory: Path, rank: BareRank, size: int) -> Path:
    """`rank-RRRRR-of-NNNNN.safetensors`: every written piece under its tensor's name, row-major; pieces of one tensor that lie
    apart are numbered `name#1`, ... The file's metadata holds each box in the whole tensor. Returns its path. The file appears
    when it is complete. Raises HostError when it can't be written."""
    layout = rank.layout
    tensors: dict[str, torch.Tensor] = {}
    boxes: dict[str, object] = {}
    for piece in layout.written.tolist():
        spec, box = layout.tensor_of(piece), layout.box_of(piece)
        again = sum(name == spec.name or name.startswith(f"{spec.name}#") for name in tensors)
        name = f"{spec.name}#{again}" if again else spec.name
        tensors[name] = _view(rank, piece, DTYPES[spec.dtype]).contiguous()
        boxes[name] = {"start": box.start, "stop": box.stop, "shape": spec.shape}
    path = directory / f"rank-{layout.rank:05d}-of-{size:05d}.safetensors"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata={"format": "pt", "boxes": json.dumps(boxes)})
        unfinished.rename(path)
    except (OSError, SafetensorError) as error:
        raise HostError(
            f"rank {layout.rank}: can't write {path}: {error}", next_step="make room there, and pull again"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _view(rank: BareRank, piece: int, dtype: torch.dtype) -> torch.Tensor:
    pieces, layout, size = rank.layout.pieces, rank.layout, dtype.itemsize
    buffer, ndim = int(pieces.buffer[piece]), len(layout.tensor_of(piece).shape)
    flat = rank.arena.tensor(int(rank.address[buffer]), (int(layout.buffer_nbytes[buffer]) // size,), dtype)
    strides = [s // size for s in pieces.stride[piece, -ndim:].tolist()] if ndim else []
    return flat.as_strided(layout.box_of(piece).shape, strides, int(pieces.offset[piece]) // size)
