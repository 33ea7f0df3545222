"""What a tracker of the volume knows of a group: which bytes nobody wrote to since the group's last backup.

The time of change says which files were written to; a tracker says which of their blocks. Of a database that changed
in a few places, only these are read again. A group's checkpoints are its own: they bear its name, not the volume's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pluggy

from blockferry.checkpoints import Checkpoints, same_identity
from blockferry.extents import ExtentSet
from blockferry.groups.definition import Group
from blockferry.groups.place import Filesystem
from blockferry.hookspecs import ChangedBlocks
from blockferry.repository import Repository
from blockferry.snapshot import Record
from blockferry.volume import Volume

log = logging.getLogger(__name__)


class Tracking:
    """The trackers of the volume that a group is on."""

    def __init__(self, manager: pluggy.PluginManager, volume: Volume | None) -> None:
        self.method = ""
        """Who said what did not change, "" if nobody did."""
        self._manager = manager
        self._volume = volume
        self._checkpoints = Checkpoints(manager)

    @classmethod
    def of(cls, manager: pluggy.PluginManager, filesystem: Filesystem, group: Group) -> Tracking:
        """Return the trackers of the volume that a filesystem is on: none if files are not read from it."""
        volume = filesystem.volume
        return cls(manager, dataclasses.replace(volume, name=group.name) if volume else None)

    @contextlib.contextmanager
    def begun(self, snapshot: str, created: str, repository: Repository) -> Iterator[dict[str, dict[str, Any]]]:
        """Have the trackers make a checkpoint; give their states. If the context fails it is released."""
        if self._volume is None:
            yield {}
            return
        with self._checkpoints.begun(self._volume, snapshot, created, repository, "") as begun:
            yield begun.states

    def unchanged(self, base: Record) -> ExtentSet | None:
        """Return the bytes of the volume that nobody wrote to since a snapshot of the group; None if nobody knows."""
        if self._volume is None:
            return None
        reasons: list[str] = []
        for kept in self._checkpoints.of(self._volume):
            mine = kept.stored and kept.checkpoint.snapshot == base.snapshot and kept.size == self._volume.size
            same = base.checkpoints.get(kept.checkpoint.tracker) == kept.checkpoint.state
            if not (mine and same and same_identity(kept.identity, self._volume.identity)):
                continue
            changed: ChangedBlocks | None = self._manager.hook.blockferry_changed_extents(
                volume=self._volume, still=self._volume, since=kept.checkpoint, declined=reasons.append
            )
            if changed:
                self.method = changed.method
                return changed.extents.complement(self._volume.size)
        log.info("%s: every file that changed is read whole: %s", self._volume.name, "; ".join(reasons) or "no tracker")
        return None
