"""Where an engine's code raised: its own line, for messages about code that isn't ours."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

#: Longest text of an engine's error that is passed on.
_MOST: Final = 600
_INSTALLED: Final = ("site-packages", "dist-packages")
#: Packages that an engine's error may have come through.
_PASSED: Final = ("torch", "pydantic")
_OWN: Final = str(Path(__file__).parents[1])
_STANDARD: Final = sysconfig.get_path("stdlib")


def engine_frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of a traceback that run neither our code, nor torch's, nor the standard library's, with their lines; the last
    one first."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        if not name.startswith((_OWN, "<")):
            place = _inside(name)
            if (place is None and not name.startswith(_STANDARD)) or (place is not None and place[0] not in _PASSED):
                yield frame, line


def told(error: BaseException) -> str:
    """An engine's error in one line: its kind, its words, and which line of the engine raised it, as in `AssertionError at
    vllm/model_executor/models/llama.py:142 (assert heads % tp_size == 0)`. The line itself is shown where there are no words."""
    words = " ".join(str(error).split())
    text = type(error).__name__ + (f": {words[:_MOST]}{'...' if len(words) > _MOST else ''}" if words else "")
    for frame, line in engine_frames(error):
        name = frame.f_code.co_filename
        source = "" if words else linecache.getline(name, line).strip()
        return f"{text} at {'/'.join(_inside(name) or Path(name).parts[-3:])}:{line}" + (f" ({source})" if source else "")
    return text


def _inside(name: str) -> tuple[str, ...] | None:
    """The path of an installed package's file from the package on; None for other files."""
    parts = Path(name).parts
    found = [i for i, part in enumerate(parts) if part in _INSTALLED]
    return parts[found[-1] + 1 :] if found else None
