"""The ladder: which blocks of a volume a backup has to read, and why not fewer.

Used-block readers are asked through the hook `blockferry_used_extents`, a filesystem's own before the general ones.
No answer means everything: then the whole volume is in use, and whoever declined says why.
"""

from __future__ import annotations

import dataclasses

import pluggy

from blockferry.extents import ExtentSet
from blockferry.hookspecs import UsedBlocks
from blockferry.snapshot import SPARSE, WHOLE, Tier
from blockferry.volume import Volume


def used_blocks(manager: pluggy.PluginManager, volume: Volume) -> tuple[UsedBlocks, Tier, str]:
    """Return the blocks of a volume in use, the step of the ladder that this is, and why it is not a better one.

    The extents lie within the volume. The step is `used` if somebody knows what the blocks mean, and `whole` if
    nobody does, even if a sparse file's holes are left out. The reason also tells what kept a reader from answering
    where another one answered instead; it is empty if nothing did.
    """
    reasons: list[str] = []
    answer: UsedBlocks | None = manager.hook.blockferry_used_extents(volume=volume, declined=reasons.append)
    if answer is None:
        answer = UsedBlocks(ExtentSet.whole(volume.size), WHOLE)
    clipped = dataclasses.replace(answer, extents=answer.extents.clip(0, volume.size))
    if answer.method not in (WHOLE, SPARSE):
        return clipped, Tier.USED, "; ".join(reasons)
    return clipped, Tier.WHOLE, "; ".join(reasons or [_nobody_knows(volume)])


def _nobody_knows(volume: Volume) -> str:
    """Return the reason where no reader gave one."""
    what = f"the filesystem {volume.filesystem}" if volume.filesystem else "what is on it"
    return f"no plugin knows {what}"
