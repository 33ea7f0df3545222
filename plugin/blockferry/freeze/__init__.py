"""Making a volume hold still for the length of a backup: one module a way.

    hold_still -> hook blockferry_freeze -> offline, lvm, reflink, fsfreeze, live: the first that can

A way is a context manager that raises `CannotHoldError` on entering where it is not the way for a volume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType

import pluggy

from blockferry.errors import UnstableVolumeError
from blockferry.hookspecs import Declined, FreezeOptions, Frozen
from blockferry.volume import Volume


class CannotHoldError(Exception):
    """This way cannot hold this volume still; the message says why, in a phrase."""


@contextlib.contextmanager
def hold_still(manager: pluggy.PluginManager, volume: Volume, options: FreezeOptions) -> Iterator[Frozen]:
    """Hold a volume still by the first plugin that can, for as long as the context lasts.

    Raise UnstableVolumeError, with every plugin's reason, if none can. Call `Frozen.check` after reading and before
    anything is committed: what was read counts only if it does not raise.
    """
    reasons: list[str] = []
    held = manager.hook.blockferry_freeze(volume=volume, options=options, declined=reasons.append)
    if held is None:
        raise UnstableVolumeError(
            f"{volume.path}: in use, and nothing can make it hold still:\n"
            + "\n".join(f"- {each}" for each in reasons),
            remedy="Unmount it or stop what uses it; or freeze its filesystem for the length of the backup "
            "(--fsfreeze SECONDS); or accept blocks of different instants (--allow-live).",
        )
    with held as frozen:
        yield frozen


def entered(
    name: str, way: AbstractContextManager[Frozen], declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Enter a way to hold a volume still, at once; return what is left to do: to leave it again.

    Return None, after telling `declined` its name and why, if it is not the way.
    """
    with contextlib.ExitStack() as stack:
        try:
            frozen = stack.enter_context(way)
        except CannotHoldError as reason:
            declined(f"{name}: {reason}")
            return None
        return _Held(frozen, stack.pop_all())


class _Held(AbstractContextManager[Frozen]):
    """A way that was entered already."""

    def __init__(self, frozen: Frozen, way: contextlib.ExitStack) -> None:
        self.frozen = frozen
        self.way = way

    def __enter__(self) -> Frozen:
        return self.frozen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.way.__exit__(kind, error, trace)
