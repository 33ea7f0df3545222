"""What of a volume that holds still is to be stored: the ladder, from the blocks that changed up to all of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.checkpoints import Checkpoints
from blockferry.difference import Choice, Difference, find_difference, reusable
from blockferry.errors import BaseUnusableError
from blockferry.hookspecs import Frozen, UsedBlocks
from blockferry.ladder import used_blocks
from blockferry.repository import Base, Repository, Snapshots
from blockferry.snapshot import Tier, zeros_are_content
from blockferry.volume import Volume

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be stored: which step of the ladder that is, and why it is not a better one."""

    tier: Tier
    reason: str
    block_map: BlockMap
    bases: Sequence[Base] = ()
    difference: Difference | None = None
    part: bool = False


@dataclasses.dataclass(frozen=True)
class Survey:
    """What there is to know of a volume that holds still, before it is known what of it will be stored."""

    size: int
    used: UsedBlocks
    tier: Tier
    reason: str
    """Why the blocks in use are not known better."""
    difference: Difference | None
    why: str
    """Why it is not known what changed, or will not be at the next backup."""

    def choose(self, repository: Repository, choice: Choice) -> Plan:
        """Return what to store; raise BaseUnusableError if the repository cannot take over what did not change."""
        if self.difference is None:
            return self.everything(self.why)
        return _take_over(self.difference, self.used, self.reason, repository, part=choice.incremental)

    def everything(self, why: str) -> Plan:
        """Return how to store all that is in use, and why not less."""
        return Plan(self.tier, joined(why, self.reason), BlockMap.build(self.size, data=self.used.extents))


def survey(
    manager: pluggy.PluginManager,
    checkpoints: Checkpoints,
    repository: Snapshots,
    volume: Volume,
    frozen: Frozen,
    choice: Choice,
    reasons: Sequence[str] = (),
) -> Survey:
    """Return which blocks of a volume are in use and which changed; `reasons` say why trackers did not begin."""
    log.info("%s: %s by %s", volume.path, frozen.stability.value, frozen.method)
    used, tier, reason = used_blocks(manager, frozen.volume)
    log.info("%s: %d bytes in use, says %s", volume.path, used.extents.total, used.method)
    difference, why = find_difference(manager, checkpoints, repository, volume, frozen.volume, choice)
    log.info("%s: %s", volume.path, difference.changed.method if difference else why)
    return Survey(frozen.volume.size, used, tier, reason, difference, joined(why, *reasons))


def _take_over(difference: Difference, used: UsedBlocks, reason: str, repository: Repository, *, part: bool) -> Plan:
    """Return what to store of what changed: a part, or a whole image that takes the rest over from earlier ones.

    Raise BaseUnusableError if the repository cannot do that.
    """
    block_map = difference.block_map(used.extents, zeros_are_content=zeros_are_content(used.method))
    bases: list[Base] = []
    if part and "merge" in repository.capabilities:
        bases = difference.chain.bases(block_map.extents(Kind.SAME))
    if not part and block_map.extents(Kind.SAME):
        block_map, bases = reusable(difference.chain, block_map, used.extents, repository)
        if not bases:
            raise BaseUnusableError("nothing can be taken over from an earlier snapshot in this repository")
    return Plan(Tier.CHANGED, joined(difference.remark, reason), block_map, bases, difference, part)


def joined(*reasons: str) -> str:
    """Return the reasons that there are, each once."""
    return "; ".join(dict.fromkeys(filter(None, reasons)))
