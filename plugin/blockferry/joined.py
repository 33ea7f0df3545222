"""Several repositories as one: a set whose log is kept apart from its shares."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pluggy

from blockferry.blockmap import BlockMap
from blockferry.errors import BaseUnusableError
from blockferry.layers import Layer
from blockferry.manager import repository_named
from blockferry.repository import Advance, Base, Repository
from blockferry.snapshot import Record, Snapshot, Stored


class JoinedRepository:
    """Implements `blockferry.repository.Repository`: what any of them holds is here, what is new goes to the first.

    Of two snapshots with one id that of the earlier repository counts.
    """

    def __init__(self, first: Repository, *others: Repository) -> None:
        """Take repositories over: they are closed with this one."""
        self.reference = first.reference
        self.named = first.named
        self.capabilities = first.capabilities
        if not all("parallel" in each.capabilities for each in others):
            self.capabilities -= {"parallel"}
        self._first = first
        self._repositories = (first, *others)
        self._places: dict[str, Repository] = {}

    def unit(self, size: int) -> int:
        """Return what the first says."""
        return self._first.unit(size)

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Store in the first; raise BaseUnusableError if a base is in another one."""
        for base in bases:
            place = self._place(base.snapshot)
            if place is not self._first:
                raise BaseUnusableError(
                    f"snapshot {base.snapshot.id} is in {place.reference}, from where nothing is taken"
                )
        stored = self._first.store(source, block_map, record, bases=bases, advance=advance)
        self._places[stored.snapshot.id] = self._first
        return stored

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return the snapshots of all, oldest first."""
        found: dict[str, Snapshot] = {}
        places: dict[str, Repository] = {}
        for repository in self._repositories:
            for snapshot in repository.snapshots(about_to_store=about_to_store):
                found.setdefault(snapshot.id, snapshot)
                places.setdefault(snapshot.id, repository)
        self._places = places
        return sorted(found.values(), key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot."""
        return self._place(snapshot).describe(snapshot)

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image of a snapshot."""
        return self._place(snapshot).open(snapshot)

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots, in each repository all of its own, in the order in which they are first named."""
        by_place: dict[int, list[Snapshot]] = {}
        places = {id(each): each for each in self._repositories}
        for snapshot in snapshots:
            by_place.setdefault(id(self._place(snapshot)), []).append(snapshot)
        for place, mine in by_place.items():
            places[place].delete(mine)

    def close(self) -> None:
        """Close all."""
        for each in self._repositories:
            each.close()

    def _place(self, snapshot: Snapshot) -> Repository:
        """Return where a snapshot is; one that is in no list any more was in the first."""
        if snapshot.id not in self._places:
            self.snapshots()
        return self._places.get(snapshot.id, self._first)


def repository_with_log(manager: pluggy.PluginManager, reference: str, log_reference: str | None) -> Repository:
    """Return the repository that a reference names, joined with that of logs if one is named."""
    with contextlib.ExitStack() as on_failure:
        repository = repository_named(manager, reference)
        on_failure.callback(repository.close)
        if log_reference:
            repository = JoinedRepository(repository, repository_named(manager, log_reference))
        on_failure.pop_all()
    return repository
