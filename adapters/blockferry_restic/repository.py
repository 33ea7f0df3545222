"""A restic repository that holds snapshots of volumes. `segments.py` says how an image lies in one."""

from __future__ import annotations

import datetime
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from blockferry.blockmap import BlockMap
from blockferry.errors import BaseUnusableError, DamagedSnapshotError, RepositoryError
from blockferry.fuse import mounted
from blockferry.layers import Layer
from blockferry.repository import Advance, Base, plan
from blockferry.segments import (
    STAMPS_NAME,
    Segments,
    Stamps,
    check_complete,
    new_stamp,
    segment_count,
    stamps_from_bytes,
    unit_for,
)
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot, Stored
from blockferry_restic.archive import Archive, LocalArchive, RemoteArchive
from blockferry_restic.command import Restic, Running
from blockferry_restic.format import RepositoryReader, listing
from blockferry_restic.layer import ReadAheadLayer
from blockferry_restic.location import password
from blockferry_restic.memory import Entry, Memory
from blockferry_restic.tree import SegmentTree

log = logging.getLogger(__name__)

_Read = Callable[[str, int], bytes]
"""Takes the name of a file at the root of a snapshot and the most bytes that it may have; returns its content."""
_TAG = "blockferry"
_SEGMENTS_AT_ONCE = "8"
"""restic's own default of 2 leaves it waiting between our small files: 8 took a tenth of the time off on two cores."""
_LARGEST_RECORD = 64 << 20
_LARGEST_MAP = 1 << 30


class ResticRepository:
    """A repository by way of restic's command line; a local one is read directly. See `blockferry.repository`."""

    capabilities = frozenset({"reuse", "concurrent", "parallel"})

    def __init__(self, restic: Restic) -> None:
        self.reference = self.named = restic.location.reference
        self._restic = restic
        self._memory = Memory(restic.location.reference)
        self._reader: RepositoryReader | None = None
        self._unlocking = threading.Lock()

    def unit(self, size: int) -> int:
        """Return the size of the segments for an image of `size` bytes."""
        return unit_for(size)

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Have restic back up the tree of the image's segments. `advance` is called about once a second, from here.

        restic takes segments over from one base at most: its parent snapshot.

        Its counts add up to the bytes of the segments that hold any data. Whatever ends this early, be it an error of
        the source or of restic, or an exception such as KeyboardInterrupt: restic ends first, and a snapshot that it
        made all the same is removed.
        """
        stamp = new_stamp()
        planned = plan(block_map, record, bases)
        base = bases[0].snapshot if bases else None
        stamps = self._base_stamps(base, planned, record.unit) if base else None
        segments = Segments.plan(planned, record.unit, stamp, stamps)
        tree = SegmentTree(source, segments, record=record.to_json(), block_map=block_map.to_bytes(), stamp=stamp)
        # Without a base nothing is to be skipped, whatever restic finds.
        parent = ["--parent", base.archive] if base else ["--force"]
        tags = [*_tags(record, len(tree)), *self._restic.location.tags]
        options = ["--json", "--no-scan", "--host", record.host]
        if record.state_of:
            options += ["--time", _local(record.created)]  # retention goes by the age of the state
        if "RESTIC_READ_CONCURRENCY" not in self._restic.location.variables:
            options += ["--read-concurrency", _SEGMENTS_AT_ONCE]
        with (
            mounted(tree, name=_series(record)) as path,
            self._restic.start("backup", *options, *parent, *_tagged(tags), ".", directory=str(path)) as running,
        ):
            tree.on_failure = running.interrupt
            summary = self._follow(running, tree, advance)
        log.debug("restic: %s", summary)
        self._remember(summary, tags, tree.files)
        return Stored(Snapshot.of(record, summary["snapshot_id"]), int(summary["data_added_packed"]))

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return every complete snapshot with our tags, oldest first."""
        directory = self._repository_directory()
        if not about_to_store:
            self._local_reader()  # with a wrong password nothing is listed, even if it is remembered
        entries = self._local_entries(directory) if directory else self._remote_entries()
        found = [snapshot for snapshot in map(_snapshot, entries) if snapshot]
        return sorted(found, key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot."""
        return self._describe(self._recall(snapshot), snapshot)

    def open(self, snapshot: Snapshot) -> Layer:
        """Return the image of a snapshot whose segments are all there."""
        archive = self._archive(snapshot)
        record, block_map = self._describe(archive.file, snapshot)  # not from memory: who opens it wants it sound
        stored = BlockMap.build(record.size, data=block_map.extents(*record.stored_kinds))
        complete = functools.partial(check_complete, stored, record.unit, where=self._name(snapshot))
        image = archive.image(record.size, record.unit, complete)
        return ReadAheadLayer(image, block_map.extents(*record.stored_kinds))

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Have restic forget snapshots; `restic prune` frees the space."""
        if snapshots:
            self._forget([snapshot.archive for snapshot in snapshots])

    def close(self) -> None:
        """Forget the keys: nothing else is held between calls."""
        self._reader = None

    def _follow(self, running: Running, tree: SegmentTree, advance: Advance) -> dict[str, Any]:
        """Follow a running backup to its end and return restic's summary of it; all or nothing."""
        summary: dict[str, Any] = {}
        told = 0
        try:
            for message in running.messages():
                match message:
                    case {"message_type": "summary"}:
                        summary = message
                served = tree.served
                advance(served - told)
                told = served
            if tree.failure is not None:
                raise tree.failure
            running.check("backup")
            if summary.get("total_files_processed") != len(tree) or not summary.get("snapshot_id"):
                raise RepositoryError(
                    f"{self.reference}: restic says that it stored {summary.get('total_files_processed')} files"
                    f" of {len(tree)}",
                    remedy="Nothing was kept; run the backup again.",
                )
            advance(tree.segments.data_bytes - told)
        except BaseException as error:
            running.terminate()
            tree.source.give_up(error)  # restic ends when its reads do
            self._undo([summary, *running.stop()])
            raise
        return summary

    def _undo(self, messages: list[Any]) -> None:
        """Remove the snapshot that a failed backup made all the same, if it did."""
        for message in messages:
            match message:
                case {"message_type": "summary", "snapshot_id": str(made)} if made:
                    try:
                        self._forget([made], "--retry-lock", "1m")
                    except RepositoryError as error:
                        # It will not be listed as ours: its files do not add up to its own tags.
                        log.error("%s: the incomplete snapshot %s is still there: %s", self.reference, made, error)

    def _forget(self, archives: list[str], *options: str) -> None:
        for _message in self._restic.each("forget", "--json", *options, *archives):
            pass

    def _archive(self, snapshot: Snapshot) -> Archive:
        """Return a way to read a snapshot: our own for a repository in a local directory, else restic's."""
        if reader := self._local_reader():
            return LocalArchive(reader, snapshot.archive)
        return RemoteArchive(self._restic, snapshot.archive)

    def _local_entries(self, directory: Path) -> list[Entry]:
        """Return what `restic snapshots` would list of a local repository; only what is new there is decrypted."""
        known, names = self._memory.entries(), listing(directory / "snapshots")
        found = {name: known[name] for name in names if name in known}
        if len(found) < len(names) and (reader := self._local_reader()):
            found |= reader.snapshots([name for name in names if name not in known], _TAG)
        if found != known:
            self._memory.keep_entries(found)
        return [entry for entry in found.values() if entry]

    def _remote_entries(self) -> list[Entry]:
        """Return what `restic snapshots` lists."""
        entries: list[Entry] = []
        for listed in self._restic.each("snapshots", "--json", "--no-lock", "--tag", _TAG):
            entries += listed or []
        return entries

    def _remember(self, summary: dict[str, Any], tags: list[str], files: Mapping[str, bytes]) -> None:
        """Keep what the next backup will want to know of the snapshot that was stored just now."""
        made = summary["snapshot_id"]
        entry = {"id": made, "tags": tags, "summary": {"total_files_processed": summary["total_files_processed"]}}
        self._memory.keep_entries(self._memory.entries() | {made: entry})
        for name, content in files.items():
            self._memory.keep(made, name, content)

    def _repository_directory(self) -> Path | None:
        """Return where the repository is, if that is a local directory."""
        directory = self._restic.location.directory
        return directory if directory is not None and (directory / "config").is_file() else None

    def _local_reader(self) -> RepositoryReader | None:
        """Return what reads a repository in a local directory; its key is unlocked once."""
        with self._unlocking:
            if self._reader is None and (directory := self._repository_directory()):
                self._reader = RepositoryReader(directory, password(self._restic.location.variables))
            return self._reader

    def _recall(self, snapshot: Snapshot) -> _Read:
        """Return what reads files at the root of a snapshot from memory, else from its archive, opened only then."""
        archive = functools.cache(lambda: self._archive(snapshot))

        def read(name: str, limit: int) -> bytes:
            content = self._memory.file(snapshot.archive, name)
            if content is None:
                content = archive().file(name, limit)
                self._memory.keep(snapshot.archive, name, content)
            return content

        return read

    def _describe(self, read: _Read, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map that are read; DamagedSnapshotError if they do not fit each other."""
        name = self._name(snapshot)
        record = Record.from_json(read(RECORD_NAME, _LARGEST_RECORD), name)
        try:
            block_map = BlockMap.from_bytes(read(MAP_NAME, _LARGEST_MAP))
            if block_map.size != record.size or record.snapshot != snapshot.id:
                raise ValueError("it is of another snapshot than the record")
        except ValueError as error:
            raise DamagedSnapshotError(
                f"{name}: the block map cannot be read: {error}", remedy="Take another snapshot."
            ) from None
        return record, block_map

    def _base_stamps(self, base: Snapshot, block_map: BlockMap, unit: int) -> Stamps:
        """Return the stamps of the base's segments, if they are the same segments as the new snapshot's."""
        read = self._recall(base)
        record, _map = self._describe(read, base)
        if (record.size, record.unit) != (block_map.size, unit):
            raise BaseUnusableError(
                f"{self._name(base)}: has {record.size} bytes in segments of {record.unit}, the volume now"
                f" {block_map.size} in segments of {unit}",
                remedy="Make a full backup.",
            )
        stored = read(STAMPS_NAME, _LARGEST_RECORD)
        return stamps_from_bytes(stored, segment_count(block_map.size, unit), self._name(base))

    def _name(self, snapshot: Snapshot) -> str:
        return f"{self.reference}, snapshot {snapshot.id}"


def _tagged(tags: Sequence[str]) -> list[str]:
    """Return the words of a command line that give a snapshot its tags."""
    return [word for tag in tags for word in ("--tag", tag)]


def _tags(record: Record, files: int) -> Iterator[str]:
    """Yield the tags from which `snapshots` makes its list. restic splits tags at commas: values are URL-quoted."""
    yield _TAG
    values = {
        "snapshot": record.snapshot,
        "volume": record.volume,
        "tier": record.tier.value,
        "size": str(record.size),
        "files": str(files),
        "base": record.base,
        "part": "1" if record.part else "",
        "state": record.state_of,
        "share": record.share_of,
        "closing": "1" if record.closing else "",
        "created": record.created,
    }
    for name, value in values.items():
        if value:
            yield f"{name}={quote(value, safe='')}"


def _series(record: Record) -> str:
    """Return the name that ends up in the snapshot's path, by which `restic forget` tells series from each other.

    A share is a series of its own: it stays as long as its set.
    """
    return f"{record.volume}-{record.snapshot}" if record.share_of else record.volume


def _snapshot(entry: Entry) -> Snapshot | None:
    """Return the snapshot that an entry of `restic snapshots` is, None if it is not a complete one of ours."""
    tags = dict(tag.split("=", 1) for tag in entry.get("tags") or [] if "=" in tag)
    values = {name: unquote(value) for name, value in tags.items()}
    # restic made it although some files could not be read, and nobody was left to remove it.
    stored = entry.get("summary", {}).get("total_files_processed")
    try:
        if stored is not None and stored != int(values["files"]):
            raise ValueError("it is incomplete")
        return Snapshot(
            id=values["snapshot"],
            archive=entry["id"],
            volume=values["volume"],
            created=values["created"],
            size=int(values["size"]),
            tier=values["tier"],
            base=values.get("base"),
            part=values.get("part") == "1",
            state_of=values.get("state"),
            share_of=values.get("share"),
            closing=values.get("closing") == "1",
        )
    except (KeyError, ValueError) as error:
        log.warning("restic snapshot %s is left out: %s", str(entry.get("id"))[:8], error)
        return None


def _local(created: str) -> str:
    """Return a record's time as `restic backup --time` takes it: in the time zone of this host."""
    return datetime.datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
