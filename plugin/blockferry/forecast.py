"""What a backup would do: its road up to where something would be stored, and no step further.

The volume is held still, and asked, as for a backup. No checkpoint is made, nothing is read but what tells the blocks
in use, and nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.checkpoints import Checkpoints
from blockferry.difference import Choice
from blockferry.errors import BaseUnusableError, DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry.freeze import hold_still
from blockferry.hookspecs import FreezeOptions
from blockferry.picture import Shade
from blockferry.repository import Repository
from blockferry.snapshot import Tier
from blockferry.state import exclusive
from blockferry.survey import Plan, Survey, survey
from blockferry.volume import Volume


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a backup would do. The figures are those that it would print; sizes in bytes."""

    figures: dict[str, Any]
    size: int
    shades: list[Shade]
    """What is where on the volume; empty if that is not known."""

    def as_json(self) -> dict[str, Any]:
        """Return what `backup --dry-run --json` prints."""
        return {"version": 1, "dry_run": True, **self.figures}


def forecast(
    manager: pluggy.PluginManager,
    volume: Volume,
    repository: Repository,
    *,
    freeze: FreezeOptions,
    choice: Choice,
) -> Forecast:
    """Return what a backup of a volume would do now; raise what it would raise before it stores anything."""
    began = time.monotonic()
    checkpoints = Checkpoints(manager)
    with exclusive(volume), hold_still(manager, volume, freeze) as frozen:
        found = survey(manager, checkpoints, repository, volume, frozen, choice)
        try:
            chosen = found.choose(repository, choice)
        except (BaseUnusableError, DamagedSnapshotError) as error:
            chosen = found.everything(error.message)
        frozen.check()
    difference = chosen.difference
    figures = {
        "volume": volume.name,
        "repository": repository.reference,
        "tier": chosen.tier.value,
        "tier_reason": chosen.reason,
        "method": found.used.method,
        "tracker": difference.changed.method if difference else "",
        "base": difference.chain.newest.snapshot.id if difference else None,
        "part": chosen.part,
        "stability": frozen.stability.value,
        "freeze": frozen.method,
        "bytes_volume": found.size,
        "bytes_used": found.used.extents.total,
        "bytes_changed": chosen.block_map.extents(Kind.DATA).total,
        "bytes_read": to_read(chosen.block_map, repository.unit(found.size)).intersection(found.used.extents).total,
        "seconds": round(time.monotonic() - began, 3),
    }
    return Forecast(figures, found.size, _shades(found, chosen))


def to_read(block_map: BlockMap, unit: int) -> ExtentSet:
    """Return the chunks of `unit` bytes that are read: all of which any byte is to be."""
    return block_map.extents(Kind.DATA).align(unit, block_map.size)


def _shades(found: Survey, chosen: Plan) -> list[Shade]:
    """Return what of a volume changed and what is in use, as far as it is known."""
    data = chosen.block_map.extents(Kind.DATA)
    if chosen.tier is not Tier.CHANGED:
        return [Shade("used", "in use: is read", data)]
    same = found.used.extents.difference(data)
    return [Shade("changed", "changed: is read", data), Shade("used", "in use, as before", same)]
