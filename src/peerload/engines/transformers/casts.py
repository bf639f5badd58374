"""Casts while loading: followed as if they hadn't been made, and made when the bytes are there.

What the wire carries and what a seed offers is the checkpoint's own dtype, so that every layout has something for every other.
A parameter in another dtype has memory for its bytes beside it: its `Shadow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ...errors import LayoutError
from ...model.catalog import ITEMSIZE, Catalog, TensorSpec
from ...model.layout import Layout, Pieces
from ...tracing.recorder import DTYPE_NAMES, Allocate, Recorder, on_meta, tensors_in

#: Between these, a cast is what the engine's loader means by loading; anything else makes other values.
_FLOATS: Final = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


@dataclass(frozen=True, slots=True)
class Shadow:
    """A parameter that isn't kept in the checkpoint's dtype, and memory of our own that holds it in that dtype."""

    parameter: Tensor
    memory: Tensor

    def publish(self) -> None:
        """Cast the parameter's values into the memory."""
        self.memory.copy_(self.parameter)

    def accept(self) -> None:
        """Cast what has arrived in the memory into the parameter."""
        self.parameter.copy_(self.memory)


class CastRecorder(Recorder):
    """A recorder under which a cast is a copy. `wanted` tells what the engine would have made of a tensor."""

    def __init__(self, allocate: Allocate = on_meta) -> None:
        super().__init__(allocate)
        self._cast: dict[int, torch.dtype] = {}

    def wanted(self, tensor: Tensor) -> torch.dtype:
        return self._cast.get(tensor.untyped_storage()._cdata, tensor.dtype)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        dtype = None
        if func._schema.name == "aten::_to_copy":
            source, asked = args[0], kwargs.get("dtype")
            if isinstance(source, Tensor) and self.known(source) and {source.dtype, asked} <= _FLOATS:
                dtype = kwargs.pop("dtype")
        else:
            dtype = next((self._cast[key] for key in map(_key, tensors_in(args, kwargs)) if key in self._cast), None)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, Tensor) and isinstance(dtype, torch.dtype) and self.known(out):
            self._cast[_key(out)] = dtype
        return out


def as_kept(layout: Layout, wanted: Mapping[str, torch.dtype]) -> Layout:
    """The layout of the parameters themselves: buffers in `wanted` dtypes hold the tensors `<name> as <dtype>`, not `<name>`."""
    pieces, names = layout.pieces, layout.buffer_names
    specs, tensor, nbytes = list(layout.catalog), pieces.tensor.copy(), layout.buffer_nbytes.copy()
    offset, stride, row = pieces.offset.copy(), pieces.stride.copy(), dict(layout.catalog.row)
    for buffer, dtype in ((names.index(name), dtype) for name, dtype in wanted.items() if name in names):
        rows = np.flatnonzero(pieces.buffer == buffer)
        if any(c.buffer == buffer for c in layout.constants):
            raise LayoutError(f"{names[buffer]}: the engine casts constants to {dtype}")
        for piece in rows.tolist():
            spec = layout.tensor_of(piece)
            cast = TensorSpec(f"{spec.name} as {DTYPE_NAMES[dtype]}", DTYPE_NAMES[dtype], spec.shape)
            if cast.name not in row:
                row[cast.name] = len(specs)
                specs.append(cast)
            tensor[piece] = row[cast.name]
            here, there = ITEMSIZE[spec.dtype], dtype.itemsize
            offset[piece], stride[piece] = offset[piece] // here * there, stride[piece] // here * there
        nbytes[buffer] = nbytes[buffer] // here * there
    return replace(
        layout,
        catalog=Catalog.of(specs),
        buffer_nbytes=nbytes,
        pieces=Pieces(tensor, pieces.start, pieces.stop, pieces.buffer, offset, stride),
    )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
