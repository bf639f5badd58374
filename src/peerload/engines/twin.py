"""What the offline models of vLLM and SGLang have in common: an operator's arguments, and memory where meta isn't enough."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError, LayoutError
from ..tracing.blame import told

log = logging.getLogger(__name__)

#: What engines raise for models, quantizations and hosts that they don't support.
FAILURES: Final = (ValueError, AssertionError, RuntimeError, AttributeError, TypeError, LookupError, ImportError)


def checked(
    engine: str, arguments: Mapping[str, object], kind: Callable[..., object], ours: Mapping[str, str]
) -> dict[str, object]:
    """The operator's arguments of an engine. ours: arguments that are set here -> how to say that instead. Raises ConfigError
    for one of those, and for a name that `kind`, which the engine makes its configuration with, doesn't take."""
    known = inspect.signature(kind).parameters
    for name in arguments:
        if name in ours:
            raise ConfigError(f"engine argument {name} is set by peerload itself", next_step=ours[name])
        if name not in known:
            like = difflib.get_close_matches(name, known, 3)
            raise ConfigError(f"{engine} has no argument {name}", next_step=f"did you mean {' or '.join(like)}?" if like else "")
    return dict(arguments)


def built(make: Callable[[str], nn.Module], engine: str) -> nn.Module:
    """`make("meta")`, a model without memory. Where its constructor needs values, which tensors on meta don't have, `make("cpu")`
    instead: in memory, most of which nobody touches. Raises what that raises, and LayoutError when it takes more than is free."""
    try:
        return make("meta")
    except FAILURES as error:
        problem = told(error)
    with _Bounded(_available_nbytes()) as made:
        try:
            model = make("cpu")
        except FAILURES as error:
            if made.nbytes > made.most or "can't allocate memory" in str(error):  # the first: whatever became of its error
                raise made.refusal() from None
            raise
    warn_once(f"{engine} can't build this model without memory, so it is built in {made.nbytes / 1e6:,.1f} MB of it ({problem})")
    return model


@cache
def warn_once(words: str) -> None:
    """A model is built for every rank and pass that is asked about; a warning about it is news once."""
    log.warning("%s", words)


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made under it, and refuses to go on when there are too many."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes, self.most = 0, most

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs))):
            self.nbytes += sum(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta)
            if self.nbytes > self.most:
                raise self.refusal()
        return out

    def refusal(self) -> LayoutError:
        return LayoutError(
            f"this model can only be built in memory, and takes more than the {self.most / 1e9:.1f} GB that are free here",
            next_step="cut it down with --layers N, or ask on a host with more memory",
        )


def _available_nbytes() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10
