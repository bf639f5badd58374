"""vLLM on a CPU, offline and quietly. It reads these when it is imported; without it nothing is set."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("vllm") is not None:
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
