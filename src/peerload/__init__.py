"""peerload: a new LLM replica loads its weights out of the memory of running ones. Importing it does nothing.

receipt = peerload.load(model, config)   # fill a transformers model's parameters in place
with peerload.seed(model, config):       # offer them to whoever starts next
    serve()
"""

from __future__ import annotations

import importlib
from typing import Final

#: Where the public names live; their types are in `__init__.pyi`.
_HOME: Final = {
    "Config": "config",
    "ModelSeed": "engines.transformers.api",
    "PeerloadError": "errors",
    "Receipt": "receipt",
    "load": "engines.transformers.api",
    "seed": "engines.transformers.api",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Each name is imported when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
