"""The write road for a volume that several hosts share: hold -> instant -> copy in shares -> entire log -> one set.

All hosts hold their writes for a moment, and go on; what they overwrite is logged first. The copy that is read
meanwhile is of no one instant. With the log over it, it is of that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pluggy

from blockferry.cluster import copying
from blockferry.cluster.coordinator import Coordinator, coordinated
from blockferry.cluster.engines import Engine
from blockferry.cluster.index import LogIndex
from blockferry.cluster.log import LogLayer
from blockferry.cluster.stored import close_set
from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import UsedBlocks
from blockferry.joined import JoinedRepository
from blockferry.ladder import used_blocks
from blockferry.progress import Progress
from blockferry.repository import Repository
from blockferry.snapshot import WHOLE, Record, Snapshot, Stability, Stored, Tier, new_snapshot_id, now
from blockferry.state import exclusive, state_directory
from blockferry.systemd import journal
from blockferry.volume import Volume

log = logging.getLogger(__name__)

_SECONDS_TO_LIST = 2.0
"""How long listing the blocks in use may take, while every host's users wait."""


@dataclasses.dataclass(frozen=True)
class SharedResult:
    """What a backup of a shared volume did."""

    snapshot: Snapshot
    record: Record
    repository: str
    """The reference of that with the log, without credentials."""
    hosts: tuple[str, ...]
    shares: int
    bytes_logged: int
    bytes_stored: int
    seconds_held: float
    """For which users may have had to wait, at most."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures that `cluster backup --json` prints; sizes in bytes."""
        return {
            "version": 1,
            "snapshot": self.snapshot.id,
            "archive": self.snapshot.archive,
            "repository": self.repository,
            "volume": self.record.volume,
            "tier": self.record.tier.value,
            "tier_reason": self.record.tier_reason,
            "method": self.record.method,
            "hosts": list(self.hosts),
            "shares": self.shares,
            "bytes_volume": self.record.size,
            "bytes_used": self.record.bytes_used,
            "bytes_logged": self.bytes_logged,
            "bytes_stored": self.bytes_stored,
            "seconds_held": round(self.seconds_held, 3),
            "seconds": round(self.seconds, 3),
        }


def back_up_shared(
    manager: pluggy.PluginManager,
    volume: Volume,
    repositories: tuple[Repository, Repository],
    index: LogIndex,
    *,
    hosts: Sequence[str],
    engine: Engine,
    progress: Progress,
) -> SharedResult:
    """Store a shared volume as it is at one instant, as one set. All or nothing.

    `repositories` are that of the copy and that of the log, which may be the same; `hosts` have to take part, and all
    others that have a guard do too. Raise EpochError if one of them failed, NotNowError if another backup of the volume
    runs, and whatever a repository raises.
    """
    began = time.monotonic()
    copies, logs = repositories
    with exclusive(volume), coordinated(index, volume.name, volume.size, hosts) as coordinator:
        coordinator.hold()
        used, tier, reason = _used_within(manager, volume, _SECONDS_TO_LIST)
        record = _describe(volume, used, tier, reason, copies, still=coordinator.filesystems_still)
        coordinator.open()
        journal.about(volume=volume.name, snapshot=record.snapshot)
        seconds_held = time.monotonic() - coordinator.began
        log.info("%s: as at %s, held for %.3f s", volume.path, record.created, seconds_held)
        with _taken_back(copies) as stored:
            for each in _copied(coordinator, record, used.extents, copies, engine, progress):
                stored.append(each)
            coordinator.seal()
            with _entire_log(coordinator, record.snapshot, progress) as logged:
                snapshots = [each.snapshot for each in stored]
                work = logged.extents.intersection(used.extents).align(record.unit, record.size).total
                with progress.task("the log", work) as advance:
                    joined = logs if logs is copies else JoinedRepository(logs, copies)
                    closing = close_set(joined, logged, snapshots, used.extents, record, advance)
    result = SharedResult(
        closing.snapshot,
        record,
        logs.reference,
        coordinator.epoch.hosts,
        len(stored),
        logged.extents.total,
        closing.bytes_stored + sum(each.bytes_stored for each in stored),
        seconds_held,
        time.monotonic() - began,
    )
    manager.hook.blockferry_snapshot_stored(snapshot=closing.snapshot, record=record, statistics=result.as_json())
    return result


def _copied(
    coordinator: Coordinator,
    record: Record,
    used: ExtentSet,
    repository: Repository,
    engine: Engine,
    progress: Progress,
) -> Iterator[Stored]:
    """Have the shares copied; yield each that is stored."""
    cut = copying.cut(used, engine.shares, record.unit, record.size)
    jobs = [copying.job_for(share, record, repository.named) for share in cut]
    with progress.task("backup", used.align(record.unit, record.size).total) as advance:
        yield from engine.copy(jobs, repository, coordinator.check, advance)


@contextlib.contextmanager
def _entire_log(coordinator: Coordinator, snapshot: str, progress: Progress) -> Iterator[LogLayer]:
    """Give the logs of all hosts, edited to one, in a file that lasts as long as the context."""
    spool = state_directory() / "cluster"
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = spool / f"{snapshot}.log"
    try:
        with progress.count("bytes of logs") as advance, contextlib.closing(coordinator.gather(path, advance)) as layer:
            yield layer
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _taken_back(repository: Repository) -> Iterator[list[Stored]]:
    """Give a list for what is stored; all of it is taken back if the context fails."""
    stored: list[Stored] = []
    try:
        yield stored
    except BaseException:
        try:
            repository.delete([each.snapshot for each in stored])
        except BlockferryError as error:
            log.error("shares of a set that was not completed stay in the repository: %s", error.message)
        raise


def _used_within(manager: pluggy.PluginManager, volume: Volume, seconds: float) -> tuple[UsedBlocks, Tier, str]:
    """Return the blocks in use; all of them if that cannot be told in the time that users can be made to wait."""
    found: list[tuple[UsedBlocks, Tier, str]] = []
    failures: list[BlockferryError] = []

    def look() -> None:
        try:
            found.append(used_blocks(manager, volume))
        except BlockferryError as error:
            failures.append(error)

    looking = threading.Thread(target=look, name="used", daemon=True)
    looking.start()
    looking.join(seconds)
    if failures:
        raise failures[0]
    if found:
        return found[0]
    everything = UsedBlocks(ExtentSet.whole(volume.size), WHOLE)
    return everything, Tier.WHOLE, f"listing the blocks in use took longer than {seconds:g} s, while all hosts waited"


def _describe(
    volume: Volume, used: UsedBlocks, tier: Tier, reason: str, repository: Repository, *, still: bool
) -> Record:
    """Return the record of the set that is about to be stored."""
    return Record(
        snapshot=new_snapshot_id(),
        created=now(),
        host=socket.gethostname(),
        volume=volume.name,
        path=volume.path,
        size=volume.size,
        block_size=volume.block_size,
        filesystem=volume.filesystem,
        identity=volume.identity,
        tier=tier,
        tier_reason=reason,
        method=used.method,
        stability=Stability.FROZEN if still else Stability.CRASH_CONSISTENT,
        freeze="guards on all hosts",
        unit=repository.unit(volume.size),
        bytes_used=used.extents.total,
        bytes_changed=used.extents.total,
        blockferry=importlib.metadata.version("blockferry"),
    )
