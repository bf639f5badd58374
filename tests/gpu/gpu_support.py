"""What the tests of this folder share. They run where there are GPUs:

python -m pytest tests/gpu            (several at a time: -n 8, with pytest-xdist)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peerload.testing.gpu import why_not


def needs_gpus(count: int = 1) -> Callable[[object], object]:
    reason = why_not(count)
    return pytest.mark.skipif(bool(reason), reason=reason)
