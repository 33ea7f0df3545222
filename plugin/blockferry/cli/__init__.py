"""The command line. `main` is what the `blockferry` command calls."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run a command and leave with its exit code."""
    # Nothing has begun while the modules are read: Ctrl-C ends it there and then, without a traceback.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blockferry.cli import main as command  # noqa: PLC0415  # that is the point

    signal.signal(signal.SIGINT, previous)
    command.main()
