r"""SGLang instances that load from each other: `--load-format peerload`, once peerload is installed beside SGLang.

    python -m sglang.launch_server --model-path DIR --tp 2 --load-format peerload \
        --model-loader-extra-config '{"url": "coordinator:7070"}'

The JSON is a `peerload.config.Config`; without it $PEERLOAD_CONFIG counts, and then the defaults. `sgl.Engine` takes the same
two as `load_format=` and `model_loader_extra_config=`. There are no modes: an instance finds a peer or loads from disk, and
then is a seed itself. With any other load format nothing here does anything.

How it gets there, without patching SGLang: the entry point `sglang.srt.plugins` calls `register` in each of its processes.
That adds the choice to the command line (`add_load_format_choices` is an extension point) and hooks the check of
`LoadConfig.load_format`, which knows a closed list of names but takes a loader class as well: the name becomes the class.
`Loader` is SGLang's default loader, in which this rank's weights come from a `Worker`; building the model before and
post-processing after are SGLang's own. In a scheduler's process, hooks end the seed when the weights are about to be changed
or released, and when the scheduler ends. A process that is killed doesn't say goodbye: its lease runs out, and a target
that reads from it goes elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

#: What an operator says to SGLang.
LOAD_FORMAT: Final = "peerload"

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater"
#: What changes a serving model's weights or takes their memory away, in SGLang 0.5.23.
_CHANGES: Final = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "release_memory_occupation",
)


def register() -> None:
    """The entry point. SGLang calls it once in each process, before it reads its arguments or builds a model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if LOAD_FORMAT not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([LOAD_FORMAT])
    HookRegistry.register("sglang.srt.configs.load_config.LoadConfig._verify_load_format", _resolve, HookType.BEFORE)
    if _SCHEDULER in sys.modules:  # other processes hold no weights, and importing it there would cost seconds
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.run_event_loop", _run, HookType.AROUND)
        manager = getattr(sys.modules.get(_UPDATER), "SchedulerWeightUpdaterManager", None)
        for name in _CHANGES:
            if hasattr(manager, name):
                HookRegistry.register(f"{_UPDATER}.SchedulerWeightUpdaterManager.{name}", _withdraw, HookType.BEFORE)


def _resolve(config: LoadConfig) -> None:
    """Our name becomes our class, which SGLang instantiates by itself."""
    if config.load_format == LOAD_FORMAT:
        from .loader import Loader

        config.load_format = Loader


def _run(serve: Callable[[Scheduler], None], scheduler: Scheduler) -> None:
    try:
        serve(scheduler)
    finally:
        _close(scheduler, "the scheduler ends")


def _withdraw(manager: SchedulerWeightUpdaterManager, *_: object) -> None:
    _close(manager, "the weights are about to change")


def _close(owner: Scheduler | SchedulerWeightUpdaterManager, why: str) -> None:
    """End the seed of this process, if there is one. Nothing is imported for those who didn't ask for it."""
    ours = sys.modules.get(f"{__package__}.loader")
    loader = getattr(getattr(getattr(owner, "tp_worker", None), "model_runner", None), "loader", None)
    if ours is not None and isinstance(loader, ours.Loader):
        loader.close(why)
