"""What a backup of a group would do: its files are walked and packed, and none is read."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt
import pluggy

from blockferry.extents import ExtentSet
from blockferry.forecast import Forecast
from blockferry.groups.backup import GroupPlan, Job, find_earlier
from blockferry.groups.definition import Group
from blockferry.groups.place import Filesystem
from blockferry.groups.scope import Scope
from blockferry.groups.table import BESIDE
from blockferry.groups.tracking import Tracking
from blockferry.ladder import used_blocks
from blockferry.picture import Shade
from blockferry.progress import Progress
from blockferry.repository import Repository
from blockferry.snapshot import now
from blockferry.state import locked


def forecast(
    manager: pluggy.PluginManager, group: Group, repository: Repository, *, since: str, progress: Progress
) -> Forecast:
    """Return what a backup of a group would do now; raise what it would raise before it stores anything."""
    began = time.monotonic()
    scope = Scope.of(group)
    filesystem = Filesystem.of(manager, scope.root)
    tracking = Tracking.of(manager, filesystem, group)
    named = {"snapshot": "", "created": now(), "checkpoints": {}}
    with locked(f"group-{group.name}", f"{group.name}: a backup of this group is running"):
        job = Job(group, repository, scope, filesystem, tracking, named, progress)
        with job.planned(*find_earlier(repository, group, filesystem, since)) as planned:
            shades = _shades(planned, used_blocks(manager, filesystem.volume)[0].extents) if filesystem.volume else []
    record = planned.record
    problems = (*scope.missing(), *planned.walked.problems)
    figures = {
        "volume": group.name,
        "repository": repository.reference,
        "group": group.name,
        "tier": record.tier.value,
        "tier_reason": record.tier_reason,
        "method": record.method,
        "tracker": record.tracker,
        "base": record.base,
        "part": False,
        "stability": record.stability.value,
        "freeze": record.freeze,
        "bytes_volume": record.size,
        "bytes_used": record.bytes_used,
        "bytes_changed": record.bytes_changed,
        "bytes_read": record.bytes_changed,
        "entries": len(planned.packed.table),
        "problems": [{"path": os.fsdecode(path), "reason": reason} for path, reason in problems],
        "seconds": round(time.monotonic() - began, 3),
    }
    return Forecast(figures, filesystem.volume.size if filesystem.volume else 0, shades)


def _shades(planned: GroupPlan, used: ExtentSet) -> list[Shade]:
    """Return where on the volume the group's files are, which of that is read, and what else is in use."""
    read, mine = _on_disk(planned.packed.runs), _on_disk(planned.packed.table.extents)
    return [
        Shade("changed", "of the group: is read", read),
        Shade("group", "of the group, as before", mine.difference(read)),
        Shade("used", "in use by others", used.difference(mine.union(read))),
    ]


def _on_disk(pieces: npt.NDArray[np.void]) -> ExtentSet:
    """Return the places on the volume of extents of files, or of runs."""
    there = pieces[pieces["address"] != BESIDE]
    return ExtentSet.from_ranges(there["address"], there["address"] + there["length"])
