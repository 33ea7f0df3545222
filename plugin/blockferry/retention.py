"""Which snapshots of a volume or group may go: the newest of each period stay, as with borg prune and restic forget.

Unlike those it knows what lies on what: what a snapshot that stays needs stays too, and one that cannot be restored
any more takes no other's place.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence

from blockferry.chain import broken, delete
from blockferry.repository import Repository
from blockferry.sets import incomplete, without_shares
from blockferry.snapshot import Snapshot, now

_PERIODS: dict[str, Callable[[datetime.datetime], str]] = {
    "keep_hourly": lambda time: time.strftime("%Y-%m-%d %H"),
    "keep_daily": lambda time: time.strftime("%Y-%m-%d"),
    "keep_weekly": lambda time: time.strftime("%G-%V"),
    "keep_monthly": lambda time: time.strftime("%Y-%m"),
    "keep_yearly": lambda time: time.strftime("%Y"),
}
KEEPS = ("keep_last", *_PERIODS)


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What is to become of the snapshots of one volume or group."""

    stay: Sequence[Snapshot]
    go: Sequence[Snapshot]
    broken: Mapping[str, str]
    """By id: why one that is there cannot be restored. It neither stays nor goes."""
    left_over: Sequence[Snapshot]
    """Shares of sets that were never completed, or are gone."""


def look_over(repository: Repository, volume: str, keep: Mapping[str, int]) -> Pruning:
    """Say what the rules make of the snapshots of a volume."""
    listed = repository.snapshots()
    mine = [each for each in listed if each.volume == volume]
    lost = broken(repository, listed)
    usable = [each for each in without_shares(mine) if each.id not in lost]
    go = to_remove(usable, keep)
    return Pruning(
        stay=[each for each in usable if each not in go],
        go=go,
        broken={each.id: lost[each.id] for each in mine if each.id in lost},
        left_over=incomplete(mine, now()),
    )


def carry_out(repository: Repository, pruning: Pruning, *, remove_broken: bool = False) -> list[Snapshot]:
    """Remove what goes, and what is left over; return what is gone."""
    named = {each.id: each for each in repository.snapshots()}
    lost = [named[each] for each in pruning.broken if each in named] if remove_broken else []
    gone = [*pruning.go, *lost, *pruning.left_over]
    if gone:
        delete(repository, gone)
    return gone


def to_remove(snapshots: Sequence[Snapshot], keep: Mapping[str, int]) -> list[Snapshot]:
    """Return which of these, of one volume, no rule keeps, oldest first; without a rule none. Local time counts."""
    if not keep:
        return []
    # Of a part and what was merged of it, which are of one time, the one that needs no other is to stay.
    newest_first = sorted(snapshots, key=lambda each: (each.created, not each.part))[::-1]
    stay = {each.id for each in newest_first[: keep.get("keep_last", 0)]}
    for rule, period in _PERIODS.items():
        kept: set[str] = set()
        for each in newest_first:
            when = period(datetime.datetime.fromisoformat(each.created).astimezone())
            if len(kept) < keep.get(rule, 0) and when not in kept:
                kept.add(when)
                stay.add(each.id)
    # Whatever the rules say, the newest is what the next backup goes on from.
    stay |= {each.id for each in newest_first[:1]}
    while needed := {each.base for each in newest_first if each.part and each.base and each.id in stay} - stay:
        stay |= needed
    return [each for each in reversed(newest_first) if each.id not in stay]
