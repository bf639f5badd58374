"""What `seed` and `pull` share: the layouts of the ranks that they play, worked out in time."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

from ..console import Console
from ..deadline import Deadline
from ..errors import DeadlineExceeded
from ..manifest import Catalog, Layout, Parallel

if TYPE_CHECKING:
    from ..engines.checkpoint import ModelFiles

_AGAIN_S: Final = 0.2
_LONGEST_S: Final = 1e6  # a timer of the kernel has bounds


def layouts_of(
    files: ModelFiles, parallel: Parallel, ranks: Sequence[int], catalog: Catalog, deadline: Deadline, console: Console
) -> list[Layout]:
    """By transformers, one after the other, with progress. Raises what `layout_for` raises, and DeadlineExceeded. Needs the main
    thread."""
    doing = f"working out what {len(ranks)} ranks of {parallel} hold"
    layouts = []
    with console.progress() as progress, interrupted(deadline, doing):
        from ..engines.transformers import layout_for  # takes seconds, which count

        bar = progress.add_task(doing, total=len(ranks))
        for rank in ranks:
            layouts.append(layout_for(files, parallel, rank, catalog))
            progress.advance(bar)
    return layouts


@contextmanager
def interrupted(deadline: Deadline, doing: str) -> Iterator[None]:
    """Whatever Python code the block runs, the main thread leaves it at the deadline. Raises DeadlineExceeded."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        deadline.check(doing)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        first_s = min(max(deadline.remaining_s, _AGAIN_S), _LONGEST_S)
        signal.setitimer(signal.ITIMER_REAL, first_s, _AGAIN_S)  # again and again: the code may swallow the first
        yield
    except DeadlineExceeded:
        raise
    except Exception:
        deadline.check(doing)  # the code may also have made another error of it
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    deadline.check(doing)
