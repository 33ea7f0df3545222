"""The hooks, in the order in which a backup and then a restore call them. `docs/hooks.md` says the same for authors.

"Stops at the first answer" means: plugins are asked in turn, and None says "not mine". A plugin that knows why it
does not answer calls `declined(reason)` first; the reason reaches the user when the next step of the ladder is taken.
An exception aborts the whole command: it never counts as an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from blockferry.cluster.index import LogIndex
    from blockferry.config.configuration import Configuration
    from blockferry.errors import BlockferryError
    from blockferry.extents import ExtentSet
    from blockferry.hot.cache import RestoreCache
    from blockferry.hot.source import Source
    from blockferry.repository import Repository
    from blockferry.snapshot import Record, Snapshot, Stability
    from blockferry.volume import Mount, Volume

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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """From when on a tracker can say what changed: a moment right before a snapshot's own."""

    tracker: str
    """The plugin that made it, by the name that users know it by."""
    snapshot: str
    """The snapshot that it belongs to."""
    state: dict[str, Any]
    """What the tracker needs in order to answer later, and to know that it still can; JSON, never a secret."""
    keep: int = dataclasses.field(default=1, compare=False)
    """How many of a volume's checkpoints to keep for each repository: one where they take up space."""


@dataclasses.dataclass(frozen=True)
class ChangedBlocks:
    """The bytes of a volume that may differ from what they were at a checkpoint, and who says so."""

    extents: ExtentSet
    method: str


@dataclasses.dataclass(frozen=True)
class FilesOnDisk:
    """How the content of a mounted filesystem's files can be read from its device: where FIEMAP says that it lies."""

    device: str
    """The path of the block device, whose bytes the addresses count."""
    otherwise: Callable[[int], bool] | None = None
    """Tells of an open file whether its bytes on the device are not what a reader gets: it is read as a file."""


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """What a hot restore is of, and where its blocks are to be kept. Sizes in bytes."""

    name: str
    repository: str
    """The reference, without credentials."""
    snapshot: str
    target: str
    """The device or file that is to become the volume; "" if there is none."""
    block_size: int
    zeros_are_content: bool
    """Whether what the snapshot has no data of was zeros, not merely free."""
    force: bool = False
    buffer: str = ""
    """The directory for a buffer, where there is no target."""
    buffer_size: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What became of a backup within the job of another tool."""

    result: object
    """What `store` returned."""
    problem: BlockferryError | None = None
    """What went wrong after the snapshot was stored."""


# -- configuration -----------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_load_config(path: str) -> Configuration | None:
    """Return what a configuration file says. Stops at the first answer.

    :param path: the file, as the user named it after `--config`; it exists.
    """


# -- repositories ------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_open_repository(reference: str, environment: Mapping[str, str]) -> Repository | None:
    """Return the repository that a reference names. Stops at the first answer.

    :param reference: what the user wrote after `--repo`, for example `borg:ssh://nas/./vms` or `restic:/srv/restic`.
    :param environment: the variables that the repository's tool is to find, credentials among them: `os.environ`, or
        what another tool's configuration makes of it. Never to be shown.
    """


@hookspec(firstresult=True)
def blockferry_run_as_job(
    reference: str, environment: Mapping[str, str], volume: str, store: Callable[[Repository], object]
) -> Job | None:
    """Make a backup within the job of another tool, whose file names the repository. Stops at the first answer.

    The tool's hooks, monitoring and retention apply as its file says. Without an answer the repository is opened, and
    the backup made, by itself.

    :param reference: what the user wrote after `--repo`, for example `borgmatic:/etc/borgmatic/config.yaml#nas`.
    :param environment: what the tool is to find.
    :param volume: the name of the volume or group: its snapshots are a series of their own for retention.
    :param store: makes the backup in a repository. May be called again after it raised a RepositoryError, no longer
        once it returned. What it raises is raised by the plugin, once the tool's hooks for failures ran.
    """


# -- shared volumes ----------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_log_index(reference: str) -> LogIndex | None:
    """Return the log index that a reference names, opened: it answers, and can be used. Stops at the first answer.

    :param reference: as the user wrote it, for example `redis://nas:6379/0` or `sqlite:///var/lib/blockferry/index.db`.
    """


# -- backup ------------------------------------------------------------------------------------------------------------


@hookspec
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Begin to remember what is written to a volume, under a name that can be asked for later. All plugins are asked.

    Called before the volume is made to hold still: what is written between the two counts as changed at the next
    backup, though it may be in this one already. A tracker that cannot begin calls `declined`; this backup goes on.

    :param volume: the volume as the user named it.
    :param snapshot: the id of the snapshot that is about to be made.
    :param named: the only tracker that the user wants; "" for any: then one that slows the volume down does not begin.
    :param declined: called with the reason if this plugin would be the one to ask, and cannot do it.
    """


@hookspec(firstresult=True)
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Return a context in which the volume holds still. Stops at the first answer.

    :param volume: the volume as the user named it.
    :param options: what the user allows.
    :param declined: called with the reason if this plugin could not do it.
    """


@hookspec
def blockferry_thaw(path: str) -> None:
    """Take away what a process that was killed has left of holding a volume still. All plugins are told.

    Nothing may be left, and what another process holds still now stays as it is. Not called after a backup that was
    killed: the next `blockferry_freeze` of the volume does the same.

    :param path: the volume's, as the user named it. It may be gone.
    """


@hookspec(firstresult=True)
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Return every byte that any tool would read after a restore. Stops at the first answer.

    More is allowed, less never. A format, version or feature flag that the plugin does not know is "not mine".

    :param volume: the volume, already holding still.
    :param declined: called with the reason if it is of this plugin's kind and yet cannot be answered for.
    """


@hookspec(firstresult=True)
def blockferry_group_extents(mount: Mount, declined: Declined) -> FilesOnDisk | None:
    """Return how files of a mounted filesystem can be read by their places on its device. Stops at the first answer.

    Without an answer the files of a group are read one by one. What FIEMAP itself marks (inline, compressed, not yet
    written, ...) is read as a file in any case.

    :param mount: where the filesystem is mounted, of what type it is, and with what options.
    :param declined: called with the reason if this plugin would be the one to ask, and cannot do it.
    """


@hookspec(firstresult=True)
def blockferry_changed_extents(
    volume: Volume, still: Volume, since: Checkpoint, declined: Declined
) -> ChangedBlocks | None:
    """Return every byte that may have been written since a checkpoint. Stops at the first answer.

    More is allowed, less never: after any event that the tracker cannot be sure to have seen (a reboot, a full map, a
    device that was swapped), it calls `declined` and returns None. Discarded and zeroed bytes count as written.

    :param volume: the volume as the user named it.
    :param still: the volume as it holds still: what is written after that need not be in the answer.
    :param since: a checkpoint that was made on this host, of a volume of this name and size.
    :param declined: called with the reason if the checkpoint is this plugin's and yet it cannot answer.
    """


@hookspec
def blockferry_release_checkpoint(checkpoint: Checkpoint) -> None:
    """Forget a checkpoint, and free what it takes up. All plugins are told; whose it is acts, also a second time.

    :param checkpoint: as `blockferry_checkpoint` returned it. The volume may be gone.
    """


@hookspec
def blockferry_snapshot_stored(snapshot: Snapshot, record: Record, statistics: dict[str, Any]) -> None:
    """Learn that a snapshot was stored. All plugins are told.

    :param snapshot: the snapshot, as its repository lists it.
    :param record: what the archive says of itself.
    :param statistics: the figures that `backup --json` prints.
    """


@hookspec
def blockferry_backup_failed(volume: str, repository: str, error: BaseException) -> None:
    """Learn that a backup failed, and left nothing behind. All plugins are told.

    :param volume: the name of the volume or group, which may not even have been found.
    :param repository: the reference, without credentials; it may be one that could not be opened.
    :param error: why; a NotNowError is one that may go well later, without anybody's doing.
    """


@hookspec
def blockferry_export_released(statistics: dict[str, Any], failed: bool) -> None:
    """Learn that another tool's job is over, and the export for it. All plugins are told.

    :param statistics: the figures that `release --json` prints of it; of one that was killed only who was in it.
    :param failed: whether the job said that it failed. If it did not, what it read may still not be all: `failure`.
    """


# -- hot restore -------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def blockferry_restore_cache(source: Source, options: CacheOptions) -> AbstractContextManager[RestoreCache] | None:
    """Return a context in which a hot restore's blocks are cached. Stops at the first answer.

    :param source: what is in the repository, fetched by units.
    :param options: what is restored, and where its blocks are to be kept.
    """


@hookspec
def blockferry_restore_progress(statistics: dict[str, Any], ended: bool) -> None:
    """Learn how far a hot restore is: when it has begun, every few seconds, and when it ends. All plugins are told.

    :param statistics: the figures that `status NAME --json` prints; of one whose process was killed only the `name`.
    :param ended: whether its disk is taken away, be it complete or not: nothing more will be told of it.
    """


# -- restore -----------------------------------------------------------------------------------------------------------


@hookspec
def blockferry_restore_finished(snapshot: Snapshot, target: str, statistics: dict[str, Any]) -> None:
    """Learn that a snapshot was restored. All plugins are told.

    :param snapshot: the snapshot that was restored.
    :param target: the path of the device or file that was written.
    :param statistics: the figures that `restore --json` prints.
    """
