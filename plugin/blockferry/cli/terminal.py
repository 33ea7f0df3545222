"""What a terminal shows besides lines: tables and progress bars. Read only when one is shown: rich is large."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from blockferry.repository import Advance

_UNWATCHED_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, which has no width to fit into."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; without columns' names, its first column names the rows."""
    table = Table(*columns, show_header=any(columns), box=None)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNWATCHED_WIDTH)
    console.print(table)


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[Advance]:
    """Show a bar on stderr, with rate and remaining time, until the context ends."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def counter(name: str) -> Iterator[Advance]:
    """Show on stderr how many there are so far, until the context ends."""
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda count: bar.advance(task, count)
