"""The write road: volume -> freeze -> used and changed blocks -> block map -> repository."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.checkpoints import Begun, Checkpoints
from blockferry.difference import Choice, Difference, compare_sample, distrusted
from blockferry.errors import BaseUnusableError, DamagedSnapshotError
from blockferry.freeze import hold_still
from blockferry.hookspecs import FreezeOptions, Frozen, UsedBlocks
from blockferry.layers import CheckedLayer, CutLayer, FileLayer
from blockferry.progress import Progress
from blockferry.repository import Repository, Snapshots, plan
from blockferry.snapshot import Record, Snapshot, Stability, Stored, Tier, new_snapshot_id, now
from blockferry.state import exclusive
from blockferry.survey import Plan, survey
from blockferry.systemd import journal
from blockferry.volume import Volume

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a backup did."""

    snapshot: Snapshot
    record: Record
    repository: str
    """The reference, without credentials."""
    bytes_read: int
    bytes_compared: int
    """How much of what was said not to have changed was compared with the earlier snapshot."""
    bytes_stored: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures that `backup --json` prints; sizes in bytes."""
        return {
            "version": 1,
            "snapshot": self.snapshot.id,
            "archive": self.snapshot.archive,
            "repository": self.repository,
            "volume": self.record.volume,
            "tier": self.record.tier.value,
            "tier_reason": self.record.tier_reason,
            "method": self.record.method,
            "tracker": self.record.tracker,
            "base": self.record.base,
            "part": self.record.part,
            "stability": self.record.stability.value,
            "bytes_volume": self.record.size,
            "bytes_used": self.record.bytes_used,
            "bytes_changed": self.record.bytes_changed,
            "bytes_read": self.bytes_read,
            "bytes_compared": self.bytes_compared,
            "bytes_stored": self.bytes_stored,
            "seconds": round(self.seconds, 3),
        }


def back_up(
    manager: pluggy.PluginManager,
    volume: Volume,
    repository: Repository,
    *,
    freeze: FreezeOptions,
    choice: Choice,
    progress: Progress,
) -> Result:
    """Store a volume as one snapshot: the blocks in use, as far as they changed. All or nothing.

    Raise UnstableVolumeError if nothing holds the volume still, NotNowError if another backup of it runs, TrackerError
    if a tracker is caught lying, and whatever the repository raises.
    """
    began = time.monotonic()
    checkpoints = Checkpoints(manager)
    snapshot, created = new_snapshot_id(), now()
    journal.about(volume=volume.name, snapshot=snapshot)
    with (
        exclusive(volume),
        # Before the freeze: what is written between the two counts as changed at the next backup.
        checkpoints.begun(volume, snapshot, created, repository, choice.tracker) as begun,
        hold_still(manager, volume, freeze) as frozen,
    ):
        found = survey(manager, checkpoints, repository, volume, frozen, choice, begun.reasons)
        record = describe(snapshot, created, volume, frozen, found.used, begun, repository)
        with frozen.volume.open_data() as disk:
            run = _Run(frozen, disk, found.used, repository, record, progress)
            try:
                chosen = found.choose(repository, choice)
                with distrusted(checkpoints, volume, chosen.difference.tracker if chosen.difference else ""):
                    stored, record, compared = run.store(chosen, choice.sample)
            except (BaseUnusableError, DamagedSnapshotError) as error:
                log.warning("%s; reading every block in use", error.message)
                stored, record, compared = run.store(found.everything(error.message), choice.sample)
            read = disk.bytes_read
    seconds = time.monotonic() - began
    result = Result(stored.snapshot, record, repository.reference, read, compared, stored.bytes_stored, seconds)
    manager.hook.blockferry_snapshot_stored(snapshot=stored.snapshot, record=record, statistics=result.as_json())
    return result


@dataclasses.dataclass(frozen=True)
class _Run:
    """One backup, from the moment that the volume holds still."""

    frozen: Frozen
    disk: FileLayer
    used: UsedBlocks
    repository: Repository
    record: Record
    """As far as it is known before anything is stored."""
    progress: Progress

    def store(self, chosen: Plan, sample: int) -> tuple[Stored, Record, int]:
        """Store what was planned; return the record that says so as well, and how many bytes were compared."""
        difference = chosen.difference
        record = dataclasses.replace(
            self.record,
            tier=chosen.tier,
            tier_reason=chosen.reason,
            bytes_changed=chosen.block_map.extents(Kind.DATA).total,
            base=difference.chain.newest.snapshot.id if difference else None,
            part=chosen.part,
            tracker=difference.changed.method if difference else "",
        )
        work = plan(chosen.block_map, record, chosen.bases).extents(Kind.DATA).total
        with self._comparing(chosen, sample) as compared, self.progress.task("backup", work) as advance:
            # Nothing that is read is handed on before the sample is known to be right.
            source = CheckedLayer(CutLayer(self.disk, self.used.extents), self.frozen.check, compared)
            stored = self.repository.store(source, chosen.block_map, record, bases=chosen.bases, advance=advance)
            with _taken_back(self.repository, stored.snapshot):
                self.frozen.check()  # some ways to hold a volume still notice only now that it did not
                return stored, record, compared()

    @contextlib.contextmanager
    def _comparing(self, chosen: Plan, sample: int) -> Iterator[Callable[[], int]]:
        """Compare the sample, beside what the context does where the repository can be read meanwhile, else before it.

        Give what waits for the outcome: how many bytes are the same; it raises what was wrong.
        """
        compare = functools.partial(self._compare, chosen.difference, chosen.block_map, sample)
        if "parallel" in self.repository.capabilities and chosen.block_map.extents(Kind.DATA):
            with ThreadPoolExecutor(1, thread_name_prefix="sample") as pool:
                yield pool.submit(compare).result
        else:
            compared = compare()
            yield lambda: compared

    def _compare(self, difference: Difference | None, block_map: BlockMap, pieces: int) -> int:
        """Compare some of what is the same with what the repository has; return the bytes."""
        same = block_map.extents(Kind.SAME)
        if not difference or not same or not pieces or self.frozen.stability is Stability.LIVE:
            return 0  # what is not held still may differ although nobody lied
        with (
            self.frozen.volume.open_data() as disk,
            contextlib.closing(difference.chain.open(self.repository)) as image,
        ):
            return compare_sample(CheckedLayer(disk, self.frozen.check), image, same, pieces)


@contextlib.contextmanager
def _taken_back(repository: Repository, snapshot: Snapshot) -> Iterator[None]:
    """Take a snapshot back if the context fails."""
    try:
        yield
    except BaseException:
        repository.delete([snapshot])
        raise


def describe(
    snapshot: str,
    created: str,
    volume: Volume,
    frozen: Frozen,
    used: UsedBlocks,
    begun: Begun,
    repository: Snapshots,
) -> Record:
    """Return the record of a snapshot that is about to be stored, before it is known how."""
    still = frozen.volume
    return Record(
        snapshot=snapshot,
        created=created,
        host=socket.gethostname(),
        volume=volume.name,
        path=volume.path,
        size=still.size,
        block_size=volume.block_size,
        filesystem=still.filesystem,
        identity=volume.identity,
        tier=Tier.WHOLE,
        tier_reason="",
        method=used.method,
        stability=frozen.stability,
        freeze=frozen.method,
        unit=repository.unit(still.size),
        bytes_used=used.extents.total,
        bytes_changed=used.extents.total,
        checkpoints=begun.states,
        blockferry=importlib.metadata.version("blockferry"),
    )
