"""Stand-ins for what SGLang imports and a host without a GPU doesn't have: `sgl_kernel` and `torchvision`. FOR TESTS ONLY.

SGLang's loader, models, scheduler and process groups are the real ones with these; its kernels are not there: calling one
raises. `environment()` is for processes that run SGLang, `install()` for this one. In a production image the real
packages are installed, and nothing here is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

#: To be the first entry of a process's module path.
PATH = str(Path(__file__).parent)
#: What SGLang needs to be told on a CPU, and that it shall not look for models in the network.
SETTINGS: Mapping[str, str] = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`base`, changed so that a Python process in it finds the stand-ins and SGLang runs on the CPU."""
    before = base.get("PYTHONPATH", "")
    return {**base, **SETTINGS, "PYTHONPATH": os.pathsep.join(filter(None, (PATH, before)))}


def install() -> None:
    """Make `import sglang` work in this process. Before its first import; not undone."""
    if PATH not in sys.path:
        sys.path.insert(0, PATH)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
