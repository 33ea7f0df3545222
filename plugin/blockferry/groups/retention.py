"""Which snapshots of a group may go: the newest of each period stay, as with borg prune and restic forget.

A group's snapshots do not lie on each other: each is whole, and any of them can be removed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence

from blockferry.snapshot import Snapshot

_PERIODS: dict[str, Callable[[datetime.datetime], str]] = {
    "keep_hourly": lambda time: time.strftime("%Y-%m-%d %H"),
    "keep_daily": lambda time: time.strftime("%Y-%m-%d"),
    "keep_weekly": lambda time: time.strftime("%G-%V"),
    "keep_monthly": lambda time: time.strftime("%Y-%m"),
    "keep_yearly": lambda time: time.strftime("%Y"),
}


def to_remove(snapshots: Sequence[Snapshot], keep: Mapping[str, int]) -> list[Snapshot]:
    """Return the snapshots of one group that no rule keeps, oldest first; without a rule none. Local time counts."""
    if not keep:
        return []
    newest_first = sorted(snapshots, key=lambda each: each.created, reverse=True)
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
    return [each for each in reversed(newest_first) if each.id not in stay]
