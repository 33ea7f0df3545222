"""Tracing a snapshot back: a part lies on its base, which may be a part itself, down to a whole image or to a set.

A part's block map says of every byte of the volume where it is: data is in the part, same is in what it lies on, zero
is not in use. So the state of the volume is the stack of all images, each cut to what it has, the newest on top.

A set is what was stored of a volume that was written to meanwhile: shares, which are disjoint and of no one instant,
and over them the entire log, which has of every block that was written to what was there before. The log is the
snapshot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.extents import ExtentSet, overlaps
from blockferry.layers import CutLayer, Layer, Stack
from blockferry.repository import Base, Repository, Snapshots
from blockferry.sets import refuse_share, without_shares
from blockferry.shares import SharesLayer
from blockferry.snapshot import Record, Snapshot

_ANOTHER = "Restore another snapshot: `blockferry snapshots` lists them."


@dataclasses.dataclass(frozen=True)
class Link:
    """One snapshot of a chain."""

    snapshot: Snapshot
    record: Record
    block_map: BlockMap

    @property
    def stored(self) -> ExtentSet:
        """What the snapshot's own image has."""
        return self.block_map.extents(*self.record.stored_kinds)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A snapshot and those that it lies on, the newest first; the last one is whole.

    Or the last ones are the log of a set, and then its shares in any order.
    """

    links: tuple[Link, ...]

    @property
    def newest(self) -> Link:
        """The snapshot whose state of the volume this is."""
        return self.links[0]

    @property
    def states(self) -> tuple[Link, ...]:
        """The links but for shares: each is a state of the volume."""
        return tuple(link for link in self.links if link.record.share_of is None)

    @property
    def shares(self) -> tuple[Link, ...]:
        """The shares of the set at the end, if one is there."""
        return tuple(link for link in self.links if link.record.share_of is not None)

    def open(self, repository: Repository) -> Layer:
        """Return the volume as it was at the newest snapshot, for random access."""
        if len(self.links) == 1:
            return repository.open(self.newest.snapshot)
        size = self.newest.record.size
        layers: list[Layer] = []
        with contextlib.ExitStack() as opened:
            for link in self.states:
                layers.append(repository.open(link.snapshot))
                opened.callback(layers[-1].close)
            if self.shares:
                shares = [(link.stored, functools.partial(repository.open, link.snapshot)) for link in self.shares]
                layers.append(SharesLayer(shares, size, when_read="parallel" in repository.capabilities))
            opened.pop_all()
        used = self.newest.block_map.extents(Kind.DATA, Kind.SAME)
        return CutLayer(Stack(layers, size), used)

    def bases(self, wanted: ExtentSet) -> list[Base]:
        """Return which link's image has the newest state of which chunks, of those that `wanted` touches.

        A chunk that a part has any byte of is in its image whole, as it was then. That is not so in a set, where an
        image has nothing but its own bytes: a chunk of which the log or a second share has any is in none whole.
        """
        unit, size = self.newest.record.unit, self.newest.record.size
        left = wanted.align(unit, size)
        shares = [link.stored.align(unit, size) for link in self.shares]
        found = []
        for link in self.links:
            taken = left.intersection(link.stored.align(unit, size))
            left = left.difference(taken)
            if link.record.closing:
                left = left.difference(overlaps(shares))
            elif taken:
                found.append(Base(link.snapshot, taken))
        return found


def trace(repository: Snapshots, snapshot: Snapshot, among: Sequence[Snapshot] | None = None) -> Chain:
    """Return the chain of a snapshot; `among` is the repository's list, if somebody has it already.

    Raise DamagedSnapshotError, naming it, if a snapshot of the chain is gone or does not fit.
    """
    refuse_share(snapshot)
    links = [Link(snapshot, *repository.describe(snapshot))]
    by_id: dict[str, Snapshot] = {}
    while links[-1].record.part:
        by_id = by_id or {each.id: each for each in (repository.snapshots() if among is None else among)}
        above = links[-1]
        if above.record.closing:
            shares = _shares(repository, above, by_id)
            check_set(above, shares)
            return Chain((*links, *shares))
        base = by_id.pop(above.record.base or "", None)  # popped: no chain goes in circles
        if base is None:
            raise DamagedSnapshotError(
                f"{repository.reference}: snapshot {snapshot.id} needs snapshot {above.record.base}, which is gone",
                remedy=_ANOTHER,
            )
        links.append(Link(base, *repository.describe(base)))
        _check_fit(above, links[-1])
    return Chain(tuple(links))


def check_set(log: Link, shares: Sequence[Link]) -> None:
    """Raise DamagedSnapshotError, naming it, if a share does not belong under a log, or if some of it is nowhere."""
    closing = log.record
    for link in shares:
        share = link.record
        if (share.snapshot, share.share_of) != (link.snapshot.id, closing.snapshot):
            raise _does_not_belong(link, closing, f"it is of {share.share_of or 'no set'}")
        for name in ("volume", "size", "unit"):
            mine, wanted = getattr(share, name), getattr(closing, name)
            if mine != wanted:
                raise _does_not_belong(link, closing, f"its {name} is {mine}, not {wanted}")
    has = [link.stored for link in shares]
    if overlaps(has):
        raise DamagedSnapshotError(f"set {closing.snapshot}: two of its shares have the same blocks", remedy=_ANOTHER)
    missing = log.block_map.extents(Kind.SAME).difference(ExtentSet.empty().union(*has))
    if missing:
        raise DamagedSnapshotError(
            f"set {closing.snapshot}: no share has the bytes at {int(missing.starts[0])}, nor {missing.total} in all",
            remedy=_ANOTHER,
        )


def needed(snapshots: Iterable[Snapshot], victims: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the snapshots that are to stay and need one of the victims, directly or by way of others."""
    gone = {victim.id for victim in victims}
    stay = [each for each in snapshots if each.id not in gone and each.part]
    torn = {victim.share_of for victim in victims if victim.share_of}
    found = [each for each in stay if each.closing and each.id in torn]
    lost = gone | {each.id for each in found}
    while more := [each for each in stay if each.base in lost and each not in found]:
        found += more
        lost |= {each.id for each in more}
    return found


def broken(repository: Repository, snapshots: Sequence[Snapshot]) -> dict[str, str]:
    """Return the snapshots that cannot be restored as somebody else's `prune` took what they need: id and reason.

    Of a set the record is read, as no list has its shares.
    """
    there = {each.id for each in snapshots}
    lost: dict[str, str] = {}
    parts = [each for each in without_shares(snapshots) if each.part]
    for each in parts:
        needs = repository.describe(each)[0].shares if each.closing else [each.base]
        gone = [name for name in needs or () if name not in there]
        if gone:
            lost[each.id] = f"needs {gone[0]}, which is gone"
    while more := {each.id: each.base for each in parts if each.id not in lost and each.base in lost}:
        lost |= {name: f"needs {base}, which cannot be restored" for name, base in more.items()}
    return lost


def delete(repository: Repository, victims: Sequence[Snapshot]) -> None:
    """Remove snapshots, a set with its shares; raise UsageError, with the list, if others that stay need them."""
    snapshots = repository.snapshots()
    parts = needed(snapshots, victims)
    if parts:
        named = ", ".join(each.id for each in parts)
        raise UsageError(
            f"{', '.join(each.id for each in victims)}: needed by {named}",
            remedy="Delete those as well, or merge the newest first: `blockferry merge SNAPSHOT`.",
        )
    gone = {victim.id for victim in victims}
    shares = [each for each in snapshots if each.share_of in gone and each.id not in gone]
    # What looks complete goes first: whatever ends this early, no set is left that lacks a share.
    repository.delete([*sorted(victims, key=lambda victim: victim.share_of is not None), *shares])


def _shares(repository: Snapshots, log: Link, by_id: Mapping[str, Snapshot]) -> list[Link]:
    """Return the shares of a set; raise DamagedSnapshotError, naming it, if one is gone."""
    found = []
    for name in log.record.shares or ():
        share = by_id.get(name)
        if share is None:
            raise DamagedSnapshotError(
                f"{repository.reference}: set {log.snapshot.id} needs its share {name}, which is gone",
                remedy="If its log is kept apart: --repo is the shares' repository and --log-repo that of the log. "
                + _ANOTHER,
            )
        found.append(Link(share, *repository.describe(share)))
    return found


def _does_not_belong(share: Link, closing: Record, why: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(
        f"snapshot {share.snapshot.id} is said to be a share of the set {closing.snapshot}, and is not: {why}",
        remedy=_ANOTHER,
    )


def _check_fit(above: Link, below: Link) -> None:
    """Raise DamagedSnapshotError unless a part can lie on what it names as its base."""
    part, base = above.record, below.record
    has = below.block_map.extents(Kind.DATA, Kind.SAME)
    fits = (part.volume, part.size, part.unit) == (base.volume, base.size, base.unit)
    if not fits or above.block_map.extents(Kind.SAME).difference(has):
        raise DamagedSnapshotError(
            f"snapshot {part.snapshot} does not fit snapshot {base.snapshot}, on which it is said to lie",
            remedy=_ANOTHER,
        )
