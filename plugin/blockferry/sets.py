"""Sets in a list of snapshots: a share is no state of a volume, and may be all that is left of a backup that failed."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from blockferry.errors import UsageError

if TYPE_CHECKING:
    from blockferry.snapshot import Snapshot

_MAY_STILL_COME = datetime.timedelta(days=1)
"""How long after its last share a set may still be closed."""


def without_shares(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Return those that are a state of something: a share by itself is none."""
    return [each for each in snapshots if each.share_of is None]


def incomplete(snapshots: Sequence[Snapshot], now: str) -> list[Snapshot]:
    """Return the shares whose set is not there and will not be: the last one is a day old, or a later set is there."""
    closed = {each.id: each for each in snapshots if each.closing}
    left_over: dict[str | None, list[Snapshot]] = {}
    for each in snapshots:
        if each.share_of is not None and each.share_of not in closed:
            left_over.setdefault(each.share_of, []).append(each)
    found = []
    for shares in left_over.values():
        last = max(shares, key=lambda share: share.created)
        given_up = any((each.volume, each.created > last.created) == (last.volume, True) for each in closed.values())
        if given_up or _is_old(last.created, now):
            found += shares
    return found


def _is_old(created: str, now: str) -> bool:
    """Tell whether a set would be there by now; what is no time was never about to be."""
    try:
        return datetime.datetime.fromisoformat(now) - datetime.datetime.fromisoformat(created) > _MAY_STILL_COME
    except (ValueError, TypeError):
        return True


def refuse_share(snapshot: Snapshot) -> None:
    """Raise UsageError if a snapshot is but a share."""
    if snapshot.share_of is not None:
        raise UsageError(
            f"snapshot {snapshot.id} is a share of the set {snapshot.share_of}: some of a volume, of no one instant",
            remedy=f"Name the set: {snapshot.share_of}. If there is no such snapshot, its backup never came to an end.",
        )
