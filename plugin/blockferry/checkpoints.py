"""The checkpoints of this host: since when which tracker can say what changed on which volume.

A checkpoint lies in the record of its snapshot, and in a file here; only if the two agree is it asked for. What is
here is bound to the snapshot, the volume's name, size and identity, and the repository. It is one small JSON file a
checkpoint, `checkpoints/SNAPSHOT.TRACKER.json` in the state directory: losing it costs one full read, never data.

A checkpoint is made before the volume is made to hold still, and `stored` once its snapshot is in the repository. One
that never was (the backup failed, or was killed) is released, at the latest by the next backup of the same volume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy

from blockferry.hookspecs import Checkpoint
from blockferry.repository import Snapshots
from blockferry.snapshot import Record
from blockferry.state import state_directory
from blockferry.volume import Volume

NO_TRACKER = "none"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A checkpoint and what it is bound to."""

    checkpoint: Checkpoint
    volume: str
    path: str
    size: int
    identity: dict[str, str]
    repository: str
    created: str
    stored: bool = False

    def mismatch(self, record: Record, volume: Volume) -> str:
        """Return why the difference between a snapshot and a volume cannot be had from it; "" if it can."""
        stored = record.checkpoints.get(self.checkpoint.tracker)
        if stored != self.checkpoint.state or self.checkpoint.snapshot not in (record.snapshot, record.state_of):
            return "the checkpoint in the repository is not the one that this host remembers"
        if not self.volume == record.volume == volume.name or not self.size == record.size == volume.size:
            return "it is of another volume, or the volume has changed its size"
        if not same_identity(self.identity, volume.identity) or not same_identity(record.identity, volume.identity):
            return "it is of another volume, or the volume was formatted anew"
        return ""


def same_identity(one: dict[str, str], other: dict[str, str]) -> bool:
    """Tell whether two identities can be of one volume: udev may have known less of it, or more, at another time."""
    shared = one.keys() & other.keys()
    key = "filesystem_uuid"
    return all(one[name] == other[name] for name in shared) and (key in one) == (key in other)


class Checkpoints:
    """The files of the checkpoints, and the hooks that make and release them."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self.manager = manager
        self.directory = state_directory() / "checkpoints"
        self.directory.mkdir(mode=0o700, exist_ok=True)

    @contextlib.contextmanager
    def begun(self, volume: Volume, snapshot: str, created: str, repository: Snapshots, named: str) -> Iterator[Begun]:
        """Have the tracker that is named, or all, make a checkpoint.

        If the context fails they are released, else those that they supersede.

        Whoever calls holds the volume's lock.
        """
        for orphan in self.of(volume):
            if not orphan.stored:
                self.release(orphan)
        reasons: list[str] = []
        hook = self.manager.hook.blockferry_checkpoint
        made: list[Checkpoint] = []
        if named != NO_TRACKER:
            made = hook(volume=volume, snapshot=snapshot, named=named, declined=reasons.append)
        kept = [
            Kept(each, volume.name, volume.path, volume.size, volume.identity, repository.reference, created)
            for each in made
        ]
        try:
            for each in kept:
                self._write(each)
            yield Begun({each.tracker: each.state for each in made}, reasons)
        except BaseException:
            for each in kept:
                self.release(each)
            raise
        for each in kept:
            self._write(dataclasses.replace(each, stored=True))
            self._release_superseded(volume, each)

    def of(self, volume: Volume) -> list[Kept]:
        """Return the checkpoints of a volume, by its name and path, oldest first."""
        found = filter(None, map(_read, self.directory.glob("*.json")))
        mine = [each for each in found if (each.volume, each.path) == (volume.name, volume.path)]
        return sorted(mine, key=lambda each: each.created)

    def distrust(self, volume: Volume, tracker: str) -> None:
        """Release every checkpoint of a tracker that was caught lying about a volume."""
        for each in self.of(volume):
            if each.checkpoint.tracker == tracker:
                self.release(each)

    def release(self, kept: Kept) -> None:
        """Have a checkpoint's tracker forget it; one that cannot is told of, and the next backup tries again."""
        try:
            self.manager.hook.blockferry_release_checkpoint(checkpoint=kept.checkpoint)
        except Exception as error:
            log.warning("checkpoint %s of %s is still there: %s", kept.checkpoint.snapshot, kept.volume, error)
            self._write(dataclasses.replace(kept, stored=False))
            return
        self._path(kept.checkpoint).unlink(missing_ok=True)

    def _release_superseded(self, volume: Volume, newest: Kept) -> None:
        tracker, repository = newest.checkpoint.tracker, newest.repository
        others = [each for each in self.of(volume) if each.checkpoint != newest.checkpoint]
        older = [each for each in others if (each.checkpoint.tracker, each.repository) == (tracker, repository)]
        for each in older[: max(0, len(older) + 1 - newest.checkpoint.keep)]:
            self.release(each)

    def _path(self, checkpoint: Checkpoint) -> Path:
        tracker = re.sub(r"[^A-Za-z0-9_-]+", "-", checkpoint.tracker)
        return self.directory / f"{checkpoint.snapshot}.{tracker}.json"

    def _write(self, kept: Kept) -> None:
        path = self._path(kept.checkpoint)
        unfinished = path.with_suffix(".new")
        with unfinished.open("w") as file:
            json.dump(dataclasses.asdict(kept), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)


@dataclasses.dataclass(frozen=True)
class Begun:
    """The checkpoints of a backup that has begun: their states by tracker, and why others are missing."""

    states: dict[str, dict[str, Any]]
    reasons: list[str]


def _read(path: Path) -> Kept | None:
    """Return what a file says; None, and a line in the log, if it is not one of ours any more."""
    try:
        fields = json.loads(path.read_bytes())
        made = Checkpoint(**fields["checkpoint"])
        kept = Kept(**fields | {"checkpoint": made})
        texts = (made.tracker, made.snapshot, kept.volume, kept.path, kept.repository, kept.created)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name is not a text")
        if not isinstance(kept.identity, dict) or not isinstance(made.state, dict):
            raise TypeError("an identity or a state is not what it should be")
        return kept
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s: the checkpoint cannot be read: %s", path, error)
        return None
