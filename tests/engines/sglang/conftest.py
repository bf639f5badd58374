"""SGLang runs here without a GPU: with stand-ins for its kernels, which other engines' tests must not find."""

from __future__ import annotations

import importlib.util

from peerload.testing import sglang_stubs

if importlib.util.find_spec("sglang") is not None:
    sglang_stubs.install()
