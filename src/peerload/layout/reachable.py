"""Every tensor that a model can reach, by dotted path: parameters and buffers first, then what its modules keep elsewhere."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

#: Objects looked at before giving up; a 61-layer MoE model with its configuration has about 60,000.
MOST_OBJECTS: Final = 2_000_000

#: What holds no tensor, or holds the world.
_LEAVES: Final = (
    str, bytes, bytearray, int, float, complex, bool, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype,
    torch.device, torch.Size, torch.Generator, torch.dtype, type(None),
)  # fmt: skip


def reachable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Path -> tensor. Parameters come first and under every name (tied ones more than once), then buffers, then tensors in
    attributes of modules and parameters, in the lists, dicts and plain objects that these hold, and what partial functions,
    bound methods and closures carry. Each of those once, under the first path found, breadth first.

    Raises RuntimeError when the model holds on to more than MOST_OBJECTS objects."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    seen = {id(t) for t in found.values()}
    keep: list[object] = []  # an id is a name only while its object lives
    queue: deque[tuple[str, object]] = deque()
    for path, module in model.named_modules():
        seen.add(id(module))
        queue.extend(_inside(path, module))
    for path, tensor in list(found.items()):
        queue.extend(_inside(path, tensor))
    while queue:
        path, value = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if len(seen) > MOST_OBJECTS:
            raise RuntimeError(f"the model holds more than {MOST_OBJECTS} objects")
        keep.append(value)
        if isinstance(value, Tensor):
            found[path] = value
        queue.extend(_inside(path, value))
    return found


def _inside(path: str, value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, by path."""
    dot = f"{path}." if path else ""
    if isinstance(value, Mapping):
        try:
            items = list(value.items())
        except (RuntimeError, TypeError, AttributeError):  # a mapping in name only
            items = []
        yield from ((f"{path}[{key!r}]" if not isinstance(key, str) else f"{dot}{key}", v) for key, v in items)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"{path}[{i}]", v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((f"{dot}{name}", v) for name, v in (("func", value.func), ("args", value.args), ("keywords", value.keywords)))
    elif isinstance(value, types.MethodType):
        yield f"{dot}__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{dot}{name}", cell.cell_contents
            except ValueError:  # not filled yet
                continue
    if isinstance(value, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from ((f"{dot}{name}", v) for name, v in getattr(value, kind).items())
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        skip = ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ()
        yield from ((f"{dot}{name}", v) for name, v in list(attributes.items()) if name not in skip)
    for base in type(value).__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            slot = base.__dict__.get(name)
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield f"{dot}{name}", slot.__get__(value)
                except AttributeError:  # never set
                    continue
