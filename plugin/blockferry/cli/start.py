"""What the `blockferry` command calls: as little as can be, until Ctrl-C is in good hands."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NoReturn


def main() -> NoReturn:
    """Run a command and leave with its exit code."""
    # Nothing has begun while the modules are read: Ctrl-C ends it there and then, without a traceback.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with _no_algebra():
        from blockferry.cli.main import main as run_command  # noqa: PLC0415  # that is the point

    signal.signal(signal.SIGINT, previous)
    run_command()


@contextlib.contextmanager
def _no_algebra() -> Iterator[None]:
    """Have numpy's OpenBLAS, as it is loaded, start no threads: they spin beside a backup, and nobody multiplies.

    What we start, such as the commands of a user's job, does not inherit that.
    """
    from blockferry.programs import NO_ALGEBRA  # noqa: PLC0415  # as little as can be, before Ctrl-C is seen to

    missing = {name: value for name, value in NO_ALGEBRA.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
