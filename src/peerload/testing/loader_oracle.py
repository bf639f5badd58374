"""What a traced layout claims against what a real load does: element by element, for anyone who traces an engine's loader.

Run the same loader on the same kind of model with `values_of(catalog)`, then ask `differences`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..model.catalog import Catalog
from ..tracing.dtypes import DTYPES
from ..tracing.reachable import reachable_tensors
from ..tracing.trace import Traced


def values_of(catalog: Catalog) -> dict[str, Tensor]:
    """Values that tell where they come from: neighbours differ, and so do tensors, as far as the dtype has room."""
    values, total = {}, 7
    for spec in catalog:
        dtype, n = DTYPES[spec.dtype], math.prod(spec.shape)
        numbers = torch.arange(total, total + n, dtype=torch.int64)
        if dtype == torch.bool:
            flat = numbers % 3 == 0
        elif dtype.is_floating_point and dtype.itemsize > 2:
            flat = (numbers.to(torch.float64) * 1.0009765 + 0.3).to(dtype)
        elif dtype.is_floating_point:  # bit patterns of positive finite numbers
            most = {torch.bfloat16: 0x7F00, torch.float16: 0x7B00, torch.float8_e5m2: 0x7B}.get(dtype, 0x7E)
            bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
            flat = (numbers % most + 1).to(bits).view(dtype)
        else:
            flat = numbers.to(dtype)
        values[spec.name] = flat.reshape(spec.shape)
        total += n
    return values


def differences(traced: Traced, model: nn.Module, truth: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Where `truth`, which the loader has really filled with `values`, differs from what `traced` says of `model`.

    Not compared is what the trace says that it doesn't know: computed regions, hidden state, and what the engine made in a
    model without memory."""
    layout, real, mine = traced.layout, reachable_tensors(truth), reachable_tensors(model)
    homes = {real[name].untyped_storage()._cdata for name in layout.buffer_names}
    named = {*layout.buffer_names, *traced.made, *traced.hidden}
    found = [
        f"{path}: not accounted for"
        for path, tensor in real.items()
        if tensor.numel() and path not in named and tensor.untyped_storage()._cdata not in homes
    ]
    layout.prove_cover()
    expected: dict[int, tuple[Tensor, Tensor]] = {}  # per buffer: bytes, and which of them are claimed
    for i, name in enumerate(layout.buffer_names):
        if real[name].numel() * real[name].element_size() != layout.buffer_nbytes[i]:
            found.append(f"{name}: {layout.buffer_nbytes[i]} bytes, really {real[name].nbytes}")
        nbytes = int(layout.buffer_nbytes[i])
        expected[i] = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.bool)
    for row in range(len(layout.pieces)):
        spec, box = layout.tensor_of(row), layout.box_of(row)
        derived = traced.derived.get(spec.name)
        if derived is not None and not spec.name.startswith(f"{derived.covers[0]} as "):
            continue
        value = values[spec.name if derived is None else derived.covers[0]]
        for word in spec.name[len(derived.covers[0]) :].split(" as ")[1:] if derived is not None else ():
            value = value.to(DTYPES[word])
        strides = layout.pieces.stride[row, layout.catalog.width - len(spec.shape) :].tolist()
        _put(expected[int(layout.pieces.buffer[row])], int(layout.pieces.offset[row]), _bytes(value[box.slices()]), strides)
    for constant in layout.constants:
        fill = torch.frombuffer(bytearray(constant.fill), dtype=torch.uint8)
        piece = fill.expand(*constant.shape, len(constant.fill))
        _put(expected[constant.buffer], constant.offset, piece, list(constant.strides))
    for i, name in enumerate(layout.buffer_names):
        data, claimed = expected[i]
        wrong = (data != memory_of(real[name])) & claimed
        if bool(wrong.any()):
            found.append(f"{name}: {int(wrong.sum())} of {len(wrong)} bytes differ")
    made = [name for name in traced.made if mine[name].device.type != "meta"]
    found += [f"{name}: made, but differs" for name in made if not torch.equal(memory_of(mine[name]), memory_of(real[name]))]
    return found


def _put(into: tuple[Tensor, Tensor], offset: int, piece: Tensor, strides: list[int]) -> None:
    """Bytes of a contiguous piece ([*shape, bytes] of an element) to where a layout puts them; strides in bytes."""
    data, claimed = into
    shape, steps = piece.shape, (*strides, 1)
    data.as_strided(shape, steps, offset).copy_(piece)
    claimed.as_strided(shape, steps, offset).fill_(True)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, in the order of memory; on the CPU."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), int(tensor.storage_offset()))
    return flat.cpu().contiguous().view(torch.uint8)
