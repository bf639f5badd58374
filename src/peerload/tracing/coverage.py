"""The gate after a trace: has the engine's loader lost checkpoint tensors on the way?

A loader that doesn't know a name skips it without a word, and the parameter it was meant for keeps what its constructor put
there. An engine that loads from disk serves garbage then; nothing shows it but garbage. (SGLang 0.5.23 renames the
`weight_scale_inv` of a dense Llama in FP8 blocks to `weight_scale`, a name that its own layers don't have.)
"""

from __future__ import annotations

from torch import nn

from ..errors import LayoutError
from .trace import Traced


def dropped(traced: Traced, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameters of `model`, which was traced, in which the checkpoint has no part -> skipped checkpoint tensors that look like
    theirs: inside the same module, or of the same name in a neighbouring one (`q_proj` in place of `qkv_proj`)."""
    homes: dict[tuple[str, str], list[str]] = {}
    for name in traced.layout.ignored:
        module, _, last = name.rpartition(".")
        homes.setdefault((module.rpartition(".")[0], last), []).append(name)
        while module:
            homes.setdefault((module, ""), []).append(name)
            module = module.rpartition(".")[0]
    lost: dict[str, tuple[str, ...]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in filter(parameters.__contains__, traced.made):
        module, _, last = path.rpartition(".")
        names = {*homes.get((module, ""), ()), *homes.get((module.rpartition(".")[0], last), ())}
        if names:
            lost[path] = tuple(sorted(names))
    return lost


def require_covered(traced: Traced, model: nn.Module, engine: str) -> None:
    """Raise LayoutError, naming parameter and tensors, if anything was dropped."""
    lost = dropped(traced, model)
    if lost:
        path, names = next(iter(lost.items()))
        more = f" ({len(lost) - 1} more parameters like it)" if len(lost) > 1 else ""
        raise LayoutError(
            f"{path}: {engine}'s loader doesn't write it, and skips {', '.join(names[:3])}{more}",
            next_step="the engine itself doesn't load this checkpoint whole; what it would serve is undefined",
        )
