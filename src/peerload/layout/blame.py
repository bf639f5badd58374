"""Where an engine's code raised: its own line, for messages about code that isn't ours."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import torch

#: Longest text of an engine's error that is passed on.
_MOST: Final = 600
_PACKAGES: Final = ("site-packages", "dist-packages")
#: Code that an engine's error may have come through, but which isn't the engine's.
_OTHERS: Final = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")
_STANDARD: Final = sysconfig.get_path("stdlib")


def engine_frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of a traceback that run neither our code, nor torch's, nor the standard library's, with their lines; the last
    one first."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        standard = name.startswith(_STANDARD) and not any(package in name for package in _PACKAGES)
        if not standard and not name.startswith(_OTHERS):
            yield frame, line


def told(error: BaseException) -> str:
    """An engine's error in one line: its kind, its words, and which line of the engine raised it, as in
    `AssertionError at vllm/model_executor/models/llama.py:142 (assert heads % tp_size == 0)`."""
    words = " ".join(str(error).split())
    text = type(error).__name__ + (f": {words[:_MOST]}{'...' if len(words) > _MOST else ''}" if words else "")
    for frame, line in engine_frames(error):
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        inside = next((i + 1 for i in range(len(parts) - 1, -1, -1) if parts[i] in _PACKAGES), max(0, len(parts) - 3))
        source = linecache.getline(str(path), line).strip()
        return f"{text} at {'/'.join(parts[inside:])}:{line}" + (f" ({source})" if source else "")
    return text
