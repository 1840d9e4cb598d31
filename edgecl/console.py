"""What the commands share: results on stdout as text, progress on stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgecl import tables

Step = Callable[[str, int, int], None]
"""Tells what runs, how much of it is done, and how much there is."""


def silent(text: str, done: int, total: int) -> None:
    """Tells nothing."""


NARROWEST = 20
"""Columns that a table has at least, whatever a terminal or COLUMNS says: a width of 0 would show nothing."""


def console() -> Console:
    """Results on stdout, at the terminal's width; a pipe gets room for every table. Names of the user's are no markup."""
    screen = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, markup=False, emoji=False)
    screen.width = max(screen.width, NARROWEST)
    return screen


def show(*results: Table) -> None:
    """Print tables to stdout, each as wide as fits."""
    screen = console()
    for i, table in enumerate(results):
        if i:
            screen.print()
        screen.print(tables.fit(table, screen.width))


def show_rows(result: tables.Row, *ends: str) -> None:
    """Print a comparison of learners: its table, the legend, the verdict, and lines to end with.

    Args:
        result: As :func:`edgecl.tables.demo_table` takes it.
        ends: The last lines.
    """
    screen = console()
    table = tables.demo_table(result, screen.width)
    screen.print(table)
    screen.print()
    screen.print(tables.demo_legend(result, table))
    screen.print()
    for line in [*tables.verdict(result), *ends]:
        screen.print(line, highlight=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Step]:
    """A line on stderr that says what runs and how far it is: a bar on a terminal, else a plain line for everything new."""
    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        seen: set[str] = set()

        def line(text: str, done: int, total: int) -> None:
            if not quiet and text not in seen:
                seen.add(text)
                print(f"{text} ({done} of {total})" if total > 1 else text, file=sys.stderr, flush=True)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
