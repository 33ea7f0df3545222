"""Tracing a snapshot back: a part lies on its base, which may be a part itself, down to a whole image.

A part's block map says of every byte of the volume where it is: data is in the part, same is in what it lies on, zero
is not in use. So the state of the volume is the stack of all images, each cut to what it has, the newest on top.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.extents import ExtentSet
from blockferry.layers import CutLayer, Layer, Stack
from blockferry.repository import Base, Repository
from blockferry.snapshot import Record, Snapshot


@dataclasses.dataclass(frozen=True)
class Link:
    """One snapshot of a chain."""

    snapshot: Snapshot
    record: Record
    block_map: BlockMap


@dataclasses.dataclass(frozen=True)
class Chain:
    """A snapshot and those that it lies on, the newest first; the last one is whole."""

    links: tuple[Link, ...]

    @property
    def newest(self) -> Link:
        """The snapshot whose state of the volume this is."""
        return self.links[0]

    def open(self, repository: Repository) -> Layer:
        """Return the volume as it was at the newest snapshot, for random access."""
        if len(self.links) == 1:
            return repository.open(self.newest.snapshot)
        layers: list[Layer] = []
        with contextlib.ExitStack() as opened:
            for link in self.links:
                layers.append(repository.open(link.snapshot))
                opened.callback(layers[-1].close)
            opened.pop_all()
        used = self.newest.block_map.extents(Kind.DATA, Kind.SAME)
        return CutLayer(Stack(layers, self.newest.record.size), used)

    def bases(self, wanted: ExtentSet) -> list[Base]:
        """Return which link's image has the newest state of which chunks, of those that `wanted` touches.

        A chunk that a part has any byte of is in its image whole, as it was then.
        """
        unit, size = self.newest.record.unit, self.newest.record.size
        left = wanted.align(unit, size)
        found = []
        for link in self.links:
            has = link.block_map.extents(*link.record.stored_kinds).align(unit, size)
            taken = left.intersection(has)
            if taken:
                found.append(Base(link.snapshot, taken))
                left = left.difference(taken)
        return found


def trace(repository: Repository, snapshot: Snapshot, among: Sequence[Snapshot] | None = None) -> Chain:
    """Return the chain of a snapshot; `among` is the repository's list, if somebody has it already.

    Raise DamagedSnapshotError, naming it, if a snapshot of the chain is gone or does not fit.
    """
    links = [Link(snapshot, *repository.describe(snapshot))]
    by_id: dict[str, Snapshot] = {}
    while links[-1].record.part:
        by_id = by_id or {each.id: each for each in (repository.snapshots() if among is None else among)}
        above = links[-1]
        base = by_id.pop(above.record.base or "", None)  # popped: no chain goes in circles
        if base is None:
            raise DamagedSnapshotError(
                f"{repository.reference}: snapshot {snapshot.id} needs snapshot {above.record.base}, which is gone",
                remedy="Restore another snapshot: `blockferry snapshots` lists them.",
            )
        links.append(Link(base, *repository.describe(base)))
        _check_fit(above, links[-1])
    return Chain(tuple(links))


def needed(snapshots: Iterable[Snapshot], victims: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the snapshots that are to stay and need one of the victims, directly or by way of others."""
    gone = {victim.id for victim in victims}
    stay = [each for each in snapshots if each.id not in gone and each.part]
    found: list[Snapshot] = []
    lost = set(gone)
    while more := [each for each in stay if each.base in lost and each not in found]:
        found += more
        lost |= {each.id for each in more}
    return found


def delete(repository: Repository, victims: Sequence[Snapshot]) -> None:
    """Remove snapshots; raise UsageError, with the list, if others that stay need them."""
    parts = needed(repository.snapshots(), victims)
    if parts:
        named = ", ".join(each.id for each in parts)
        raise UsageError(
            f"{', '.join(each.id for each in victims)}: needed by the parts {named}",
            remedy="Delete those as well, or merge the newest first: `blockferry merge SNAPSHOT`.",
        )
    repository.delete(victims)


def _check_fit(above: Link, below: Link) -> None:
    """Raise DamagedSnapshotError unless a part can lie on what it names as its base."""
    part, base = above.record, below.record
    has = below.block_map.extents(Kind.DATA, Kind.SAME)
    fits = (part.volume, part.size, part.unit) == (base.volume, base.size, base.unit)
    if not fits or above.block_map.extents(Kind.SAME).difference(has):
        raise DamagedSnapshotError(
            f"snapshot {part.snapshot} does not fit snapshot {base.snapshot}, on which it is said to lie",
            remedy="Restore another snapshot: `blockferry snapshots` lists them.",
        )
