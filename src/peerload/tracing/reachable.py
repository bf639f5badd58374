"""Every tensor that a model can reach, by dotted path: parameters and buffers first, then what its modules keep elsewhere."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from ..errors import LayoutError

#: Objects looked at before giving up. vLLM's Llama-3.3-70B with its configuration has about 20,000.
MOST_OBJECTS: Final = 2_000_000

#: Exact types that hold no tensor.
_PLAIN: Final = frozenset(
    (
        str,
        bytes,
        bytearray,
        int,
        float,
        complex,
        bool,
        type(None),
        torch.dtype,
        torch.device,
        torch.Size,
        torch.Generator,
        types.BuiltinFunctionType,
        types.ModuleType,
        type,
        range,
        slice,
    )
)
_OF_MODULE: Final = ("_parameters", "_buffers", "_modules")


def reachable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Path -> tensor. Parameters come first and under every name (tied ones more than once), then buffers, then tensors in
    attributes of modules and parameters, in the lists, dicts and plain objects that these hold, and what partial functions,
    bound methods and closures carry. Each of those once, under the first path found, breadth first. Sparse tensors and
    parameters that aren't initialised yet are left out.

    Raises LayoutError when the model holds on to more than MOST_OBJECTS objects."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {path: tensor for path, tensor in named if _has_memory(tensor)}
    seen = {id(t) for t in found.values()}
    keep: list[object] = []  # an id is a name only while its object lives
    queue: deque[tuple[str, str, object]] = deque()

    def look_into(path: str, value: object) -> None:
        for step, child in _children(value):
            if type(child) not in _PLAIN and id(child) not in seen and not isinstance(child, type):
                seen.add(id(child))
                keep.append(child)
                queue.append((path, step, child))

    modules = dict(model.named_modules())
    seen.update(map(id, modules.values()))
    for path, value in (*modules.items(), *list(found.items())):
        look_into(path, value)
    while queue:
        parent, step, value = queue.popleft()
        path = step if not parent and step[0] != "[" else f"{parent}{step}" if step[0] == "[" else f"{parent}.{step}"
        if isinstance(value, Tensor) and _has_memory(value):
            found[path] = value
        look_into(path, value)
        if len(keep) > MOST_OBJECTS:
            raise LayoutError(f"the model holds on to more than {MOST_OBJECTS} objects")
    return found


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not nn.parameter.is_lazy(tensor)


def _children(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, by the step that leads there: an attribute's name, or an index in brackets."""
    if isinstance(value, dict):
        yield from _entries(list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"[{i}]", child) for i, child in enumerate(value) if type(child) not in _PLAIN)
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not filled yet
                continue
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, Mapping):
        try:
            entries = list(value.items())
        except (RuntimeError, TypeError, AttributeError, LookupError):  # a mapping in name only
            entries = []
        yield from _entries(entries)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        if isinstance(value, nn.Module):
            for kind in _OF_MODULE:
                yield from getattr(value, kind).items()
            yield from [item for item in attributes.items() if item[0] not in _OF_MODULE]
        else:
            yield from list(attributes.items())
    for name, slot in _slots(type(value)):  # type: ignore[arg-type]
        try:
            yield name, slot.__get__(value)
        except AttributeError:  # never set
            continue


def _entries(items: Iterable[tuple[object, object]]) -> Iterator[tuple[str, object]]:
    for key, child in items:
        if type(child) not in _PLAIN:
            yield (key if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"), child


@functools.cache
def _slots(kind: type) -> tuple[tuple[str, types.MemberDescriptorType], ...]:
    """The slots of a type's instances that may hold anything."""
    return tuple(
        (name, member)
        for base in kind.__mro__
        if "__slots__" in base.__dict__
        for name, member in base.__dict__.items()
        if isinstance(member, types.MemberDescriptorType)
    )
