"""Modules that have every attribute and every submodule, none of which does anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Absent:
    """An attribute of a module that isn't there. As a decorator it leaves what it decorates alone; any other call raises."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Absent:
        return _attribute(f"{self.__name__}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], Absent):
            return args[0]
        raise RuntimeError(f"{self.__name__} is not there: this process runs with peerload's stand-ins for tests")

    def __hash__(self) -> int:
        return hash(self.__name__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and other.__name__ == self.__name__


class _Submodules(MetaPathFinder, Loader):
    """Finds every submodule of one package."""

    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self._prefix) else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _getter(module.__name__)


def stand_in(package: str, version: str) -> None:
    """Make the module that calls this, under its own name, one that has everything."""
    module = sys.modules[package].__dict__
    module["__version__"] = version
    module["__getattr__"] = _getter(package)
    sys.meta_path.insert(0, _Submodules(package))


def _getter(module: str) -> Callable[[str], Absent]:
    return lambda name: _attribute(f"{module}.{name}")


def _attribute(name: str) -> Absent:
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return Absent(name)
