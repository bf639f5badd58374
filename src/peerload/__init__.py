"""peerload: a new LLM replica loads its weights out of the memory of running ones. Importing it does nothing.

receipt = peerload.load(model, config)   # fill a transformers model's parameters in place
with peerload.seed(model, config):       # offer them to whoever starts next
    serve()
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final

#: Where the public names live; their types are in `__init__.pyi`.
_HOME: Final = {
    "Config": "config", "ModelSeed": "engines.api", "PeerloadError": "errors", "Receipt": "receipt", "load": "engines.api",
    "seed": "engines.api",
}  # fmt: skip
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Here `load` and `seed` are functions. The modules of these names don't take their place when they are imported."""

    def __getattr__(self, name: str) -> object:
        """Each name is imported when it is first asked for (PEP 562's laziness, for a module of our own class)."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
