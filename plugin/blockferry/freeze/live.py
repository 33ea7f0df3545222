"""Nothing holds the volume still, and the user said that this will do."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from blockferry.hookspecs import Declined, FreezeOptions, Frozen, hookimpl
from blockferry.snapshot import Stability
from blockferry.volume import Volume


@hookimpl
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Read the volume as it is, if that was allowed."""
    if options.allow_live:
        return contextlib.nullcontext(Frozen(volume, Stability.LIVE, "live"))
    points = sorted({mount.point for mount in volume.users() if not mount.read_only})
    use = f"mounted read-write at {', '.join(points)}" if points else "in use"
    declined(f"live: {use}, and reading it all the same was not allowed (--allow-live)")
    return None
