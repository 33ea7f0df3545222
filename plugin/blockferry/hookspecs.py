"""The hooks, in the order in which a backup and then a restore call them. `docs/hooks.md` says the same for authors.

"Stops at the first answer" means: plugins are asked in turn, and None says "not mine". A plugin that knows why it
does not answer calls `declined(reason)` first; the reason reaches the user when the next step of the ladder is taken.
An exception aborts the whole command: it never counts as an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from blockferry.extents import ExtentSet
    from blockferry.repository import Repository
    from blockferry.snapshot import Record, Snapshot, Stability
    from blockferry.volume import Volume

PROJECT = "blockferry"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Declined = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FreezeOptions:
    """What the user allows to make a volume hold still."""

    fsfreeze_seconds: float | None = None
    """Freeze a mounted filesystem for at most so long; None: not at all."""
    allow_live: bool = False
    """Read a volume that nothing holds still."""


def _nothing_to_check() -> None:
    """Nothing can go wrong with what holds the volume still."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A volume that holds still: what to read, how still it is, and by what means."""

    volume: Volume
    stability: Stability
    method: str
    check: Callable[[], None] = _nothing_to_check
    """Raise BlockferryError if what was read until now may be of different instants. Cheap: called at every read."""


@dataclasses.dataclass(frozen=True)
class UsedBlocks:
    """The bytes of a volume that are in use, and who says so."""

    extents: ExtentSet
    method: str


# -- repositories ------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_open_repository(reference: str) -> Repository | None:
    """Return the repository that a reference names. Stops at the first answer.

    :param reference: what the user wrote after `--repo`, for example `borg:ssh://nas/./vms` or `restic:/srv/restic`.
    """


# -- backup ------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Return a context in which the volume holds still. Stops at the first answer.

    :param volume: the volume as the user named it.
    :param options: what the user allows.
    :param declined: called with the reason if this plugin could not do it.
    """


@hookspec(firstresult=True)
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Return every byte that any tool would read after a restore. Stops at the first answer.

    More is allowed, less never. A format, version or feature flag that the plugin does not know is "not mine".

    :param volume: the volume, already holding still.
    :param declined: called with the reason if it is of this plugin's kind and yet cannot be answered for.
    """


@hookspec
def blockferry_snapshot_stored(snapshot: Snapshot, record: Record, statistics: dict[str, Any]) -> None:
    """Learn that a snapshot was stored. All plugins are told.

    :param snapshot: the snapshot, as its repository lists it.
    :param record: what the archive says of itself.
    :param statistics: the figures that `backup --json` prints.
    """


# -- restore -----------------------------------------------------------------------------------------------------------


@hookspec
def blockferry_restore_finished(snapshot: Snapshot, target: str, statistics: dict[str, Any]) -> None:
    """Learn that a snapshot was restored. All plugins are told.

    :param snapshot: the snapshot that was restored.
    :param target: the path of the device or file that was written.
    :param statistics: the figures that `restore --json` prints.
    """
