"""What the `blockferry` command calls: as little as can be, until Ctrl-C is in good hands."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run a command and leave with its exit code."""
    # Nothing has begun while the modules are read: Ctrl-C ends it there and then, without a traceback.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blockferry.cli.main import main as run_command  # noqa: PLC0415  # that is the point

    signal.signal(signal.SIGINT, previous)
    run_command()
