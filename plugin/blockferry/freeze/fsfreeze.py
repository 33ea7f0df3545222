"""The mounted filesystems of a volume are frozen for the length of the backup, if the user allows it and for how long.

Every write to them waits meanwhile. What else could write to the volume (swap, a virtual machine on the raw device, a
dm or md device) must not be there: freezing a filesystem does not stop it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from blockferry.errors import VolumeError
from blockferry.freeze import CannotHoldError, entered
from blockferry.freeze.suspension import suspended
from blockferry.hookspecs import Declined, FreezeOptions, Frozen, hookimpl
from blockferry.inuse import InUseError, claim
from blockferry.snapshot import Stability
from blockferry.volume import Volume


@hookimpl
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Hold a volume still by freezing its filesystems."""
    if options.fsfreeze_seconds is None:
        declined("fsfreeze: freezing its filesystem was not allowed (--fsfreeze SECONDS)")
        return None
    return entered("fsfreeze", _held(volume, options.fsfreeze_seconds), declined)


@contextlib.contextmanager
def filesystems_frozen(volume: Volume, seconds: float) -> Iterator[tuple[str, Callable[[], None]]]:
    """Freeze every filesystem of a volume that is mounted read-write; give a description and a check.

    Raise CannotHoldError if there is none, if one cannot be frozen, or if something else can write to the volume.
    """
    mounts = [mount for mount in volume.users() if not mount.read_only]
    if not mounts:
        raise CannotHoldError("it is not mounted on this host: there is no filesystem to freeze")
    to_freeze = {mount.superblock for mount in mounts}
    with contextlib.ExitStack() as held:
        try:
            claimed = held.enter_context(
                claim(volume.path, lambda mount: mount.read_only or mount.superblock in to_freeze),
            )
        except InUseError as error:
            raise CannotHoldError(f"freezing its filesystem is not enough: {'; '.join(error.users)}") from None
        suspension = held.enter_context(suspended(mounts, seconds))
        claimed.begin()

        def check() -> None:
            suspension.check()
            try:
                claimed.check()
            except VolumeError:
                suspension.check(ask=True)  # tells more, if that is why
                raise

        yield f"fsfreeze of {', '.join(suspension.points)}", check


@contextlib.contextmanager
def _held(volume: Volume, seconds: float) -> Iterator[Frozen]:
    with filesystems_frozen(volume, seconds) as (method, check):
        yield Frozen(volume, Stability.FROZEN, method, check)
