"""Values asked for by Python, and other calls that have to be seen before they lose their Python objects."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import LayoutError


class Known(Protocol):
    """What is known of tensors, and who is told of what happens to them."""

    def known(self, tensor: Tensor) -> bool:
        """Is anything known of its storage?"""

    def loaded(self, tensor: Tensor) -> bool:
        """May it see anything that depends on the checkpoint?"""

    def move(self, into: Tensor, source: Tensor, operation: str) -> None:
        """`into` now holds what `source`, of the same shape, holds."""

    def housed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Unwritten memory on `device` that is known to hold what a meta tensor holds."""

    def refuse(self, operation: str, tensors: Sequence[Tensor], why: str) -> LayoutError:
        """The error to raise for what can't be followed."""


class Item(float):
    """Stands for the value of a one-element tracked tensor. It can be handed to `fill_` or to an assignment, nothing else:
    whatever asks for its value, compares or computes with it raises LayoutError. It is a float because torch's argument
    parser wants one, and NaN so that what C code (`math`, NumPy) computes from it unasked is NaN too, which is refused as a
    constant."""

    __slots__ = ("__weakref__", "_recorder", "source")
    _recorder: Known
    source: Tensor

    def __new__(cls, recorder: Known, source: Tensor) -> Item:
        self = super().__new__(cls, math.nan)
        self._recorder, self.source = recorder, source
        return self

    def __repr__(self) -> str:
        return "<an element of a checkpoint tensor>"

    def __format__(self, how: str) -> str:
        return repr(self)

    def fill(self, into: Tensor) -> None:
        self._recorder.move(into, self.source.reshape(()).expand(into.shape), "aten::fill_")

    def asked(self, *_: object) -> NoReturn:
        raise self._recorder.refuse("item()", [self.source], "a value is needed to go on")


_COMPARED: Final = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__")
for _name in (*_COMPARED, *sorted(set(dir(float)) - set(dir(object)))):
    if _name in ("real", "imag"):
        setattr(Item, _name, property(Item.asked))
    elif _name not in ("__getformat__", "fromhex", "from_number"):
        setattr(Item, _name, Item.asked)


class Functions(TorchFunctionMode):
    """Sees calls before they lose their Python objects: `.item()`, what is filled with it, and `parameter.data = tracked`.
    `items`: the values asked for, as long as the engine keeps them."""

    def __init__(self, recorder: Known) -> None:
        super().__init__()
        self.items: list[weakref.ref[Item]] = []
        self._recorder = recorder
        self._handlers: dict[object, Callable[..., object]] = {
            Tensor.item: self._item,
            Tensor.fill_: self._fill,
            Tensor.__setitem__: self._assign,
            Tensor.data.__set__: self._set_data,  # type: ignore[attr-defined]
            Tensor.tolist: self._look,
            Tensor.numpy: self._look,
            Tensor.__array__: self._look,
        }

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        handler = self._handlers.get(func)
        if handler is None:
            if self.items:
                _refuse_items((*args, *(kwargs or {}).values()))
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))

    def _item(self, func: Callable[..., object], source: Tensor) -> object:
        if source.numel() != 1 or not self._recorder.loaded(source):
            return func(source)
        item = Item(self._recorder, source)
        self.items.append(weakref.ref(item))
        return item

    def _look(self, func: Callable[..., object], source: Tensor, *args: object, **kwargs: object) -> object:
        """Memory read outside torch: what it has there isn't what a load would have."""
        if self._recorder.loaded(source):
            raise self._recorder.refuse(f"{getattr(func, '__name__', func)}()", [source], "its values are needed to go on")
        return func(source, *args, **kwargs)

    def _fill(self, func: Callable[..., object], into: Tensor, value: object) -> object:
        if not isinstance(value, Item):
            return func(into, value)
        value.fill(into)
        return into

    def _assign(self, func: Callable[..., object], into: Tensor, index: object, value: object) -> None:
        if isinstance(value, Item):
            value.fill(into[index])  # type: ignore[index]
        else:
            func(into, index, value)

    def _set_data(self, func: Callable[..., object], into: Tensor, value: Tensor) -> None:
        """As a real tensor's data torch refuses a meta tensor: it gets memory on the old device instead, unwritten."""
        if into.device.type != "meta" and value.device.type == "meta" and self._recorder.known(value):
            value = self._recorder.housed(value, into.device)
        func(into, value)


def _refuse_items(values: Iterable[object]) -> None:
    """Raise LayoutError for an `Item` among the arguments of a call that has no use for it."""
    for value in values:
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, Item):
                inner.asked()
