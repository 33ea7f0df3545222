"""The write road for another tool's job: volume -> freeze -> used and changed blocks -> stamps -> files to read.

It is that of a backup, up to where a repository would store: what changed is told by the stamps of the segments, and
whoever runs the job decides what to read. The volume holds still until the context ends; its checkpoints are kept from
the moment on at which the stamps are, so that whatever becomes of the job the next export goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import pluggy

from blockferry.backup import describe
from blockferry.blockmap import BlockMap, Kind
from blockferry.checkpoints import Checkpoints
from blockferry.difference import Choice, Difference, distrusted
from blockferry.errors import BaseUnusableError, UnstableVolumeError
from blockferry.export import witnesses
from blockferry.export.memory import Memory, Shown
from blockferry.export.view import View
from blockferry.freeze import hold_still
from blockferry.hookspecs import FreezeOptions, Frozen, UsedBlocks
from blockferry.layers import CheckedLayer, CutLayer
from blockferry.segments import Segments, new_stamp
from blockferry.snapshot import Record, Stability, Tier, new_snapshot_id, now, zeros_are_content
from blockferry.state import exclusive
from blockferry.survey import joined, survey
from blockferry.volume import Volume

log = logging.getLogger(__name__)


@contextlib.contextmanager
def shown(manager: pluggy.PluginManager, volume: Volume, *, allow_live: bool, choice: Choice) -> Iterator[View]:
    """Hold a volume still, and give what is to be shown of it, for the length of the context.

    Raise UnstableVolumeError if nothing can hold it for so long, NotNowError if a backup of it runs, TrackerError if a
    tracker is caught lying.
    """
    checkpoints, memory = Checkpoints(manager), Memory(volume.name)
    snapshot, created = new_snapshot_id(), now()
    with contextlib.ExitStack() as held:
        held.enter_context(exclusive(volume))
        # Before the freeze: what is written between the two counts as changed at the next export.
        with checkpoints.begun(volume, snapshot, created, memory, choice.tracker) as begun:
            frozen = held.enter_context(_held(manager, volume, allow_live))
            found = survey(manager, checkpoints, memory, volume, frozen, choice, begun.reasons)
            used = found.used
            disk = held.enter_context(frozen.volume.open_data())
            content = CheckedLayer(CutLayer(disk, used.extents), frozen.check)
            record = dataclasses.replace(
                describe(snapshot, created, volume, frozen, used, begun, memory),
                tier=found.tier,
                tier_reason=joined(found.why, found.reason),
            )
            made = None
            if found.difference:
                with distrusted(checkpoints, volume, found.difference.tracker):
                    made = _changed(memory, found.difference, frozen, used, content, record, found.reason)
            made = made or _all_new(record, used)
            if frozen.stability is not Stability.LIVE:  # else it may differ although nobody lied
                made = dataclasses.replace(made, witnesses=tuple(witnesses.draw(content)))
            memory.keep(made)
        yield View(made, content, frozen.check)


@contextlib.contextmanager
def _held(manager: pluggy.PluginManager, volume: Volume, allow_live: bool) -> Iterator[Frozen]:
    """Hold a volume still by what can do so for hours: freezing its filesystem cannot."""
    with contextlib.ExitStack() as held:
        try:
            yield held.enter_context(hold_still(manager, volume, FreezeOptions(allow_live=allow_live)))
        except UnstableVolumeError as error:
            raise UnstableVolumeError(
                error.message,
                remedy="A filesystem cannot be frozen for as long as another tool's job may take. Have the volume on "
                "LVM, or the image on a filesystem that shares blocks (XFS, btrfs); stop what uses it meanwhile; or "
                "accept blocks of different instants (--allow-live).",
            ) from None


def _changed(
    memory: Memory,
    difference: Difference,
    frozen: Frozen,
    used: UsedBlocks,
    content: CheckedLayer,
    record: Record,
    reason: str,
) -> Shown | None:
    """Return what is shown where it is known what changed; None if the earlier stamps are not to be had after all."""
    before = memory.load(difference.chain.newest.snapshot.id)
    block_map = difference.block_map(used.extents, zeros_are_content=zeros_are_content(used.method))
    if Stability.LIVE not in (frozen.stability, before.record.stability):
        witnesses.compare(content, before, block_map)
    block_map = _freed_is_changed(block_map, before, record.unit)
    try:
        segments = Segments.plan(block_map.on_grid(record.unit), record.unit, new_stamp(), before.stamps)
    except BaseUnusableError as error:
        log.warning("%s; all counts as changed", error.message)
        return None
    record = dataclasses.replace(
        record,
        tier=Tier.CHANGED,
        tier_reason=joined(difference.remark, reason),
        bytes_changed=block_map.extents(Kind.DATA).total,
        tracker=difference.changed.method,
    )
    is_as_before = bool((segments.stamps == before.stamps).all())
    return Shown(record, block_map, segments.stamps, before.image_stamp if is_as_before else new_stamp())


def _freed_is_changed(block_map: BlockMap, before: Shown, unit: int) -> BlockMap:
    """Return the map in which a segment that has lost blocks is data: they read as zeros from now on."""
    used, same = block_map.extents(Kind.DATA, Kind.SAME), block_map.extents(Kind.SAME)
    freed = before.block_map.extents(Kind.DATA, Kind.SAME).difference(used)
    same = same.difference(freed.align(unit, block_map.size))
    return BlockMap.build(block_map.size, data=used.difference(same), same=same)


def _all_new(record: Record, used: UsedBlocks) -> Shown:
    """Return what is shown where everything in use counts as changed."""
    block_map = BlockMap.build(record.size, data=used.extents)
    segments = Segments.plan(block_map.on_grid(record.unit), record.unit, new_stamp(), None)
    return Shown(record, block_map, segments.stamps, new_stamp())
