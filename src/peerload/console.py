"""What a person sees: progress on standard error, and at the end either a table or one JSON document on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import PeerloadError, PlanError, printable

#: Columns of a table that goes to a file or a pipe.
WIDTH = 170


class Console:
    """With json=True, standard output carries exactly one JSON document and nothing else. Names and reasons that are a peer's
    words reach the terminal as `printable` text."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self._told = False
        self.out = RichConsole(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
        self.err = RichConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line of progress, for people."""
        self.err.print(printable(text))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A live display on a terminal; nothing where standard error is a file."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as progress:
            yield progress

    @contextmanager
    def rank_progress(self) -> Iterator[Callable[[int, int, int], None]]:
        """A bar for each rank: yields show(rank, done, total), which any thread may call."""
        with self.progress() as progress:
            bars: dict[int, TaskID] = {}

            def show(rank: int, done: int, total: int) -> None:
                if rank not in bars:
                    bars[rank] = progress.add_task(f"rank {rank}", total=total)
                progress.update(bars[rank], completed=done)

            yield show

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> None:
        """Numbers to the right, words to the left. Printed only for people."""
        if self.json:
            return
        title, caption = printable(title), printable(caption)
        table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left", box=SIMPLE_HEAD)
        for i, column in enumerate(columns):
            numeric = all(_is_number(row[i]) for row in rows)
            table.add_column(printable(column), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
        for row in rows:
            table.add_row(*(printable(cell).replace("\n", r"\n") if isinstance(cell, str) else f"{cell:,}" for cell in row))
        self.out.print(table)

    def text(self, text: str) -> None:
        """A line of the result, for people."""
        if not self.json:
            self.out.print(printable(text))

    def document(self, document: Mapping[str, object]) -> None:
        """The result, for machines. Only the first counts: what goes wrong after it is told on standard error."""
        if self.json and not self._told:
            self._told = True
            sys.stdout.write(json.dumps(document) + "\n")
            sys.stdout.flush()

    def fail(self, error: PeerloadError) -> None:
        details: dict[str, object] = {"error": type(error).__name__, "message": error.message, "exit_code": error.exit_code}
        if error.next_step:
            details["next_step"] = error.next_step
        if isinstance(error, PlanError):
            details["holes"] = [h._asdict() for h in error.holes]
            details["refusals"] = [r._asdict() for r in error.refusals]
        self.document(details)
        self.err.print(f"peerload: {type(error).__name__}: {indented(error.message)}", style="bold red")
        if error.next_step:
            self.err.print(f"  next: {indented(error.next_step)}")


def indented(text: str) -> str:
    """Lines after the first begin with blanks, so that nobody takes them for a message of their own."""
    first, *rest = text.split("\n")
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in rest)])


def _is_number(cell: object) -> bool:
    """12, "1.5", "1.000x" and "98%" stand right-aligned; so does nothing else."""
    try:
        float(str(cell).rstrip("x%"))
    except ValueError:
        return False
    return True
