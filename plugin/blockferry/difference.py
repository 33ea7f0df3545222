"""What changed since an earlier snapshot: the first step of the ladder, and everything that guards it.

A difference starts at a snapshot in the repository whose checkpoint this host remembers, and whose tracker can still
answer. The trackers are asked when the volume holds still already; what they leave out is taken from the earlier
snapshot, so it is compared with that in a sample: a tracker that says of a block that it is as it was, and lies, is
caught there with the probability that `docs/safety.md` gives, and is not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pluggy

from blockferry.blockmap import BlockMap, Kind
from blockferry.chain import Chain, trace
from blockferry.checkpoints import NO_TRACKER, Checkpoints, Kept
from blockferry.errors import DamagedSnapshotError, TrackerError, UsageError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks
from blockferry.layers import CutLayer, Layer
from blockferry.repository import Base, Repository, Snapshots
from blockferry.sets import without_shares
from blockferry.snapshot import Snapshot, find
from blockferry.volume import Volume

LATEST, NONE = "latest", "none"
PIECE = 1 << 20
"""Bytes that are compared at each place of the sample."""
_MOST_REASONS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the user wants: from which snapshot on, by which tracker ("": any), as a part, how many pieces compared."""

    since: str = LATEST
    tracker: str = ""
    incremental: bool = False
    sample: int = 16


@dataclasses.dataclass(frozen=True)
class Difference:
    """What changed since the newest snapshot of a chain, who says so, and why it is not another snapshot."""

    chain: Chain
    changed: ChangedBlocks
    tracker: str
    remark: str

    def block_map(self, used: ExtentSet, *, zeros_are_content: bool) -> BlockMap:
        """Return what every byte of the volume is.

        What is used now and was not at the base is read even if nobody wrote to it since.
        """
        newest = self.chain.newest
        size, unit = newest.record.size, newest.record.unit
        changed = self.changed.extents.clip(0, size)
        if zeros_are_content:
            changed = changed.align(unit, size)  # a hole that was punched into a chunk is a change of that chunk
        before = newest.block_map.extents(Kind.DATA, Kind.SAME)
        same = used.intersection(before).difference(changed)
        return BlockMap.build(size, data=used.difference(same), same=same)


def find_difference(
    manager: pluggy.PluginManager,
    checkpoints: Checkpoints,
    repository: Snapshots,
    volume: Volume,
    still: Volume,
    choice: Choice,
) -> tuple[Difference | None, str]:
    """Return what changed on a volume, or None and the reason why nobody can say it.

    Raise UsageError if the user named a snapshot of another volume, SnapshotNotFoundError if there is none.
    """
    if choice.since == NONE:
        return None, "no earlier snapshot is to be used (--since none)"
    if choice.tracker == NO_TRACKER:
        return None, "no tracker is to be used (--tracker none)"
    kept = [each for each in checkpoints.of(volume) if choice.tracker in ("", each.checkpoint.tracker)]
    if choice.since == LATEST and not kept:
        return None, f"no tracker{choice.tracker and f' {choice.tracker}'} remembers an earlier snapshot of it"
    snapshots = repository.snapshots(about_to_store=True)
    reasons: list[str] = []
    for number, candidate in enumerate(_candidates(snapshots, volume, choice.since)):
        answer = _ask(manager, repository, snapshots, candidate, kept, (volume, still), reasons)
        if answer:
            remark = (
                "" if number == 0 else f"changes since snapshot {candidate.id}, as for a better one: {_few(reasons)}"
            )
            return dataclasses.replace(answer, remark=remark), ""
    return None, _few(reasons) or "no earlier snapshot of it is in the repository"


def reusable(chain: Chain, block_map: BlockMap, used: ExtentSet, repository: Repository) -> tuple[BlockMap, list[Base]]:
    """Return the bases of a whole image, and its map: what the repository cannot take from them is to be read."""
    newest = chain.newest.record
    bases = chain.bases(block_map.on_grid(newest.unit).extents(Kind.SAME))
    if "merge" not in repository.capabilities:
        bases = sorted(bases, key=lambda base: base.extents.total)[-1:]
    if "reuse" not in repository.capabilities:
        bases = []
    taken = ExtentSet.empty().union(*(base.extents for base in bases))
    same = block_map.extents(Kind.SAME).intersection(taken)
    return BlockMap.build(newest.size, data=used.difference(same), same=same), bases


def compare_sample(disk: Layer, image: Layer, same: ExtentSet, count: int) -> int:
    """Compare `count` pieces of what is said to be the same, at random places; return the bytes.

    Raise TrackerError if one differs.
    """
    now, then = CutLayer(disk, same), CutLayer(image, same)
    compared = 0
    for start, length in pieces(same, count, PIECE):
        here, there = bytearray(length), bytearray(length)
        now.read_into(start, memoryview(here))
        then.read_into(start, memoryview(there))
        if here != there:
            raise TrackerError(
                f"{length} bytes at {start} are said not to have changed, and differ from the earlier snapshot",
                remedy="Nothing was stored, and the tracker is not asked again: the next backup reads every block in "
                "use. Look at the earlier snapshots with `blockferry verify --against`: they may lack changes too.",
            )
        compared += same.clip(start, start + length).total
    return compared


def pieces(extents: ExtentSet, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of pieces of `size` bytes on a grid, in order, drawn so that every byte is as likely."""
    ends = np.cumsum(extents.ends - extents.starts)
    chosen = random.SystemRandom()
    places = set()
    for _ in range(min(count, extents.total)):
        place = chosen.randrange(extents.total)
        number = int(np.searchsorted(ends, place, side="right"))
        places.add((int(extents.ends[number]) - (int(ends[number]) - place)) // size)
    for place in sorted(places):
        yield place * size, min(size, extents.end - place * size)


def _candidates(snapshots: Sequence[Snapshot], volume: Volume, since: str) -> list[Snapshot]:
    """Return the snapshots that a difference may start at, the one that is wanted first, then the nearest to it."""
    mine = [each for each in without_shares(snapshots) if each.volume == volume.name]
    if since == LATEST:
        return mine[::-1]
    wanted = find(snapshots, since)
    if wanted.volume != volume.name or wanted.size != volume.size:
        raise UsageError(
            f"snapshot {wanted.id} is of {wanted.volume} ({wanted.size} bytes), not of {volume.name} ({volume.size})",
            remedy="Name a snapshot of the same volume: `blockferry snapshots --volume NAME` lists them.",
        )
    place = mine.index(wanted)
    return [wanted, *mine[place + 1 :], *mine[:place][::-1]]


def _ask(
    manager: pluggy.PluginManager,
    repository: Snapshots,
    snapshots: Sequence[Snapshot],
    candidate: Snapshot,
    kept: Sequence[Kept],
    volumes: tuple[Volume, Volume],
    reasons: list[str],
) -> Difference | None:
    """Return the difference since one snapshot if a tracker has it, else None, with the reasons added."""
    volume, still = volumes
    mine = [each for each in kept if each.checkpoint.snapshot in (candidate.id, candidate.state_of)]
    if not mine:
        reasons.append(f"no tracker remembers snapshot {candidate.id}")
        return None
    try:
        chain = trace(repository, candidate, snapshots)
    except DamagedSnapshotError as error:
        reasons.append(error.message)
        return None
    if chain.newest.record.unit != repository.unit(volume.size):
        reasons.append(f"snapshot {candidate.id} is stored in chunks of another size")
        return None
    for each in mine:
        reason = each.mismatch(chain.newest.record, volume)
        if reason:
            reasons.append(f"snapshot {candidate.id}: {reason}")
            continue
        changed: ChangedBlocks | None = manager.hook.blockferry_changed_extents(
            volume=volume, still=still, since=each.checkpoint, declined=reasons.append
        )
        if changed:
            return Difference(chain, changed, each.checkpoint.tracker, "")
    return None


def _few(reasons: Sequence[str]) -> str:
    """Return the first reasons, each once."""
    return "; ".join(list(dict.fromkeys(reasons))[:_MOST_REASONS])


@contextlib.contextmanager
def distrusted(checkpoints: Checkpoints, volume: Volume, tracker: str) -> Iterator[None]:
    """Have a tracker that is caught in the context never be asked for what it has said so far."""
    try:
        yield
    except TrackerError as error:
        checkpoints.distrust(volume, tracker)
        raise TrackerError(f"{volume.path}: tracker {tracker}: {error.message}", remedy=error.remedy) from None
