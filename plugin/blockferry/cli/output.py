"""What a person or a program sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.filesize import decimal

from blockferry.errors import BlockferryError
from blockferry.repository import Advance
from blockferry.service import notify_systemd
from blockferry.systemd import journal

if TYPE_CHECKING:
    from blockferry.picture import Shade

log = logging.getLogger("blockferry")

_SECONDS_BETWEEN_LINES = 10.0


class Listing(NamedTuple):
    """Rows for a person to read, under the names of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Bar(NamedTuple):
    """Words for a person to read, and below them a volume of `size` bytes as a picture of characters."""

    words: str
    size: int
    shades: Sequence[Shade]


class Output:
    """How one command speaks: JSON or words, a progress bar or log lines. Implements `Progress`."""

    def __init__(self, *, as_json: bool, log_json: bool, verbosity: int) -> None:
        """Take 1 and up for more words, -1 for errors only."""
        self.as_json = as_json
        self.log_json = log_json
        self.verbosity = verbosity
        self._journal = not log_json and journal.is_ours(sys.stderr)
        self._set_up_logging()

    def result(self, data: object, render: Callable[[], str | Listing | Bar]) -> None:
        """Print a result: `data` as JSON, or what `render` makes of it for a person."""
        if self.as_json:
            click.echo(json.dumps(data, indent=1, sort_keys=True))
            return
        shown = render()
        if isinstance(shown, str) and self._journal and self.verbosity >= 0 and journal.is_ours(sys.stdout):
            log.info("%s", shown, extra={"fields": data})
        elif isinstance(shown, str):
            click.echo(shown)
        elif isinstance(shown, Bar):
            from blockferry.cli.bar import print_bar  # noqa: PLC0415  # see terminal.py

            click.echo(shown.words)
            print_bar(shown)
        else:
            from blockferry.cli.terminal import print_table  # noqa: PLC0415  # see there

            print_table(*shown)

    def error(self, error: BlockferryError) -> None:
        """Say what went wrong, where, and what to do."""
        if self.log_json:
            self._line("error", message=error.message, remedy=error.remedy, exit_code=error.exit_code)
            return
        if self._journal:
            log.error("%s", error, extra={"fields": {"remedy": error.remedy, "exit_code": error.exit_code}})
            return
        click.echo(f"blockferry: {error.message}", err=True)
        if error.remedy:
            click.echo(f"  {error.remedy}", err=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show the progress of a task of `total` bytes: a bar on a terminal, lines elsewhere."""
        if self.verbosity < 0:
            yield lambda _count: None
        elif sys.stderr.isatty() and not self.log_json:
            from blockferry.cli.terminal import progress_bar  # noqa: PLC0415  # see there

            with progress_bar(name, total) as advance:
                yield advance
        else:
            lines = _ProgressLines(name, total, self)
            yield lines.advance
            lines.finish()

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[Advance]:
        """Show how many there are so far: on a terminal as they are found, elsewhere at the end."""
        if self.verbosity >= 0 and sys.stderr.isatty() and not self.log_json:
            from blockferry.cli.terminal import counter  # noqa: PLC0415  # see there

            with counter(name) as advance:
                yield advance
            return
        found = [0]

        def advance_silently(count: int) -> None:
            found[0] += count

        yield advance_silently
        log.info("%s: %d", name, found[0])

    def progress_line(self, name: str, done: int, total: int, seconds: float) -> None:
        """Say in one line how far a task is."""
        rate = done / seconds if seconds else 0.0
        remaining = (total - done) / rate if rate else None
        if self.log_json:
            self._line("progress", operation=name, done=done, total=total, rate=round(rate), remaining=remaining)
            return
        share = 100 * done // total if total else 100
        line = f"{name}: {share} %, {decimal(done)} of {decimal(total)}, {decimal(int(rate))}/s"
        # `systemctl status` shows it; the journal need not keep each.
        log.log(logging.DEBUG if self._journal else logging.INFO, "%s", line)
        notify_systemd(f"STATUS={line}")

    def _line(self, kind: str, **fields: Any) -> None:
        click.echo(json.dumps({"type": kind, "time": time.time(), **fields}, sort_keys=True), err=True)

    def _set_up_logging(self) -> None:
        handler: logging.Handler = _JsonHandler(self._line)
        if not self.log_json:
            handler = journal.JournalHandler() if self._journal else logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(message)s"))
        # The journal keeps what is of no importance too, and shows it to who asks.
        levels = {-1: logging.ERROR, 0: logging.INFO if self._journal else logging.WARNING, 1: logging.INFO}
        log.handlers = [handler]
        log.propagate = False
        log.setLevel(levels.get(self.verbosity, logging.DEBUG))


class _ProgressLines:
    """Progress as lines, one every few seconds."""

    def __init__(self, name: str, total: int, output: Output) -> None:
        self.name, self.total, self.output = name, total, output
        self.done = 0
        self.began = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.output.progress_line(self.name, self.done, self.total, self.last - self.began)

    def finish(self) -> None:
        self.output.progress_line(self.name, self.done, self.total, time.monotonic() - self.began)


class _JsonHandler(logging.Handler):
    """Log records as JSON lines."""

    def __init__(self, line: Callable[..., None]) -> None:
        super().__init__()
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        self.line("log", level=record.levelname.lower(), logger=record.name, message=record.getMessage())
