"""The write road: volume -> freeze -> used blocks -> block map -> repository."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet
from blockferry.freeze import hold_still
from blockferry.hookspecs import FreezeOptions, Frozen
from blockferry.ladder import used_blocks
from blockferry.layers import BaseLayer, CutLayer, Layer
from blockferry.progress import Progress
from blockferry.repository import Repository
from blockferry.snapshot import Record, Snapshot, Tier, new_snapshot_id, now
from blockferry.state import exclusive
from blockferry.volume import Volume

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a backup did."""

    snapshot: Snapshot
    record: Record
    bytes_read: int
    bytes_stored: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures that `backup --json` prints; sizes in bytes."""
        return {
            "version": 1,
            "snapshot": self.snapshot.id,
            "archive": self.snapshot.archive,
            "volume": self.record.volume,
            "tier": self.record.tier.value,
            "tier_reason": self.record.tier_reason,
            "method": self.record.method,
            "stability": self.record.stability.value,
            "bytes_volume": self.record.size,
            "bytes_used": self.record.bytes_used,
            "bytes_changed": self.record.bytes_changed,
            "bytes_read": self.bytes_read,
            "bytes_stored": self.bytes_stored,
            "seconds": round(self.seconds, 3),
        }


def back_up(
    manager: pluggy.PluginManager,
    volume: Volume,
    repository: Repository,
    *,
    freeze: FreezeOptions,
    progress: Progress,
) -> Result:
    """Store the blocks in use of a volume as one snapshot. All or nothing.

    Raise UnstableVolumeError if nothing holds the volume still, NotNowError if another backup of it runs, and
    whatever the repository raises.
    """
    began = time.monotonic()
    with exclusive(volume), hold_still(manager, volume, freeze) as frozen:
        log.info("%s: %s by %s", volume.path, frozen.stability.value, frozen.method)
        used, tier, reason = used_blocks(manager, frozen.volume)
        log.info("%s: %d bytes in use, says %s", volume.path, used.extents.total, used.method)
        record = _describe(volume, frozen, tier, reason, used.method, used.extents, repository)
        block_map = BlockMap.build(frozen.volume.size, data=used.extents)
        with frozen.volume.open_data() as disk:
            source = CheckedLayer(CutLayer(disk, used.extents), frozen.check)
            work = block_map.on_grid(record.unit).extents(Kind.DATA).total
            with progress.task("backup", work) as advance:
                stored = repository.store(source, block_map, record, base=None, advance=advance)
            _confirm(frozen, repository, stored.snapshot)
            result = Result(stored.snapshot, record, disk.bytes_read, stored.bytes_stored, time.monotonic() - began)
    manager.hook.blockferry_snapshot_stored(snapshot=stored.snapshot, record=record, statistics=result.as_json())
    return result


class CheckedLayer(BaseLayer):
    """A layer whose every read is followed by a check that what was read is still what it was."""

    def __init__(self, layer: Layer, check: Callable[[], None]) -> None:
        self.layer = layer
        self.check = check
        self.size = layer.size
        self.extents = layer.extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read, then make sure that nobody wrote meanwhile."""
        self.layer.read_into(offset, buffer)
        self.check()


def _confirm(frozen: Frozen, repository: Repository, snapshot: Snapshot) -> None:
    """Take a snapshot back if the volume did not hold still after all: some ways notice it only a moment later."""
    try:
        frozen.check()
    except BaseException:
        repository.delete([snapshot])
        raise


def _describe(
    volume: Volume,
    frozen: Frozen,
    tier: Tier,
    reason: str,
    method: str,
    used: ExtentSet,
    repository: Repository,
) -> Record:
    """Return the record of a snapshot that is about to be stored."""
    still = frozen.volume
    return Record(
        snapshot=new_snapshot_id(),
        created=now(),
        host=socket.gethostname(),
        volume=volume.name,
        path=volume.path,
        size=still.size,
        block_size=volume.block_size,
        filesystem=volume.filesystem,
        identity=volume.identity,
        tier=tier,
        tier_reason=reason,
        method=method,
        stability=frozen.stability,
        freeze=frozen.method,
        unit=repository.unit(still.size),
        bytes_used=used.total,
        bytes_changed=used.total,
        blockferry=importlib.metadata.version("blockferry"),
    )
