"""A repository of borg 1.2 or 1.4, worked on through worker processes under borg's own interpreter."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from blockferry.blockmap import BlockMap
from blockferry.extents import ExtentSet
from blockferry.layers import Layer
from blockferry.repository import Advance, Base, plan
from blockferry.snapshot import MAP_NAME, RECORD_NAME, Record, Snapshot, Stored
from blockferry_borg.archives import (
    IMAGE_NAME,
    archive_name,
    comment_for,
    map_from,
    plain_volume,
    snapshot_from,
    unit_for,
)
from blockferry_borg.client import Worker
from blockferry_borg.environment import BorgEnvironment
from blockferry_borg.failures import without_credentials
from blockferry_borg.installation import Installation
from blockferry_borg.layer import MAP_LIMIT, RECORD_LIMIT, ImageLayer, OpenArchive
from blockferry_borg.sender import Content, Sender

log = logging.getLogger(__name__)


def _not_of_the_image(_count: int) -> None:
    """Progress counts the image's bytes only."""


class WorkerRepository:
    """Implements `blockferry.repository.Repository` by the worker."""

    capabilities = frozenset({"reuse", "merge"})

    def __init__(self, location: str, installation: Installation, environment: BorgEnvironment) -> None:
        """Work on the repository that borg calls `location`; it is not opened yet."""
        self.reference = self.named = f"borg:{without_credentials(location)}"
        self._location = location
        self._installation = installation
        self._environment = environment
        # It imports borg while whoever wants this repository looks at a volume.
        self._idle: Worker | None = Worker(installation, location, environment)
        self._closed = False

    def unit(self, size: int) -> int:
        """Return the size of the chunks that an image of `size` bytes is stored in."""
        return unit_for(size)

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return every complete snapshot, oldest first; costs one request an archive, all in flight at once."""
        with self._worker() as worker:
            listed = worker.ask(op="list")["archives"]
        found = [snapshot_from(archive["name"], archive["comment"]) for archive in listed]
        return sorted((snapshot for snapshot in found if snapshot), key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of a snapshot."""
        with self._worker() as worker:
            opened = OpenArchive(worker, snapshot.archive, (RECORD_NAME, MAP_NAME))
            record, block_map = self._read_description(opened)
            opened.close()
        return record, block_map

    def open(self, snapshot: Snapshot) -> ImageLayer:
        """Return the image for random access; the layer keeps a worker to itself, which holds no lock."""
        worker = self._take_worker()
        try:
            opened = OpenArchive(worker, snapshot.archive, (RECORD_NAME, MAP_NAME, IMAGE_NAME))
            record, block_map = self._read_description(opened)
            extents = block_map.extents(*record.stored_kinds)
            return ImageLayer(opened, IMAGE_NAME, extents, record.size, self._put_back)
        except BaseException:
            worker.close()
            raise

    def delete(self, snapshots: Sequence[Snapshot]) -> None:
        """Remove snapshots, in one transaction."""
        with self._worker() as worker:
            worker.ask(op="delete", archives=[snapshot.archive for snapshot in snapshots])

    def store(
        self, source: Layer, block_map: BlockMap, record: Record, *, bases: Sequence[Base], advance: Advance
    ) -> Stored:
        """Store an image as one archive; chunks that are the same are referred to by their ids."""
        planned = plan(block_map, record, bases)
        name, comment = archive_name(record, self._environment), comment_for(record)
        with self._worker() as worker:
            worker.ask(
                op="store",
                archive=name,
                volume=plain_volume(record),
                comment=comment,
                compression=self._environment.compression(),
                checkpoint=self._environment.checkpoint_interval(),
                unit=record.unit,
                bases=[base.snapshot.archive for base in bases],
            )
            sender = Sender(worker, record.unit)
            for item, content in ((RECORD_NAME, record.to_json()), (MAP_NAME, block_map.to_bytes())):
                whole = BlockMap.build(len(content), data=ExtentSet.whole(len(content)))
                sender.send_item(item, Content(content), whole, advance=_not_of_the_image)
            sender.send_item(IMAGE_NAME, source, planned, [base.extents for base in bases], advance=advance)
            stored = sender.finish()
        return Stored(Snapshot.of(record, name), stored)

    def close(self) -> None:
        """End the worker."""
        self._closed = True
        if self._idle:
            self._idle.close()
            self._idle = None

    def _read_description(self, opened: OpenArchive) -> tuple[Record, BlockMap]:
        """Read the record and the block map of an open archive; raise DamagedSnapshotError if they do not fit."""
        where = f"{self.reference}::{opened.archive}"
        record = Record.from_json(opened.read_item(RECORD_NAME, RECORD_LIMIT), where)
        block_map = map_from(opened.read_item(MAP_NAME, MAP_LIMIT), where)
        if block_map.size != record.size:
            raise opened.damaged(f"the map is of {block_map.size} bytes, the record of {record.size}")
        return record, block_map

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        """Give a worker for one operation; it is kept for the next one unless this one fails."""
        worker = self._take_worker()
        try:
            yield worker
        except BaseException:
            worker.close()
            raise
        self._put_back(worker)

    def _put_back(self, worker: Worker) -> None:
        """Keep a worker that has nothing to do; one is enough."""
        if self._idle or self._closed:
            worker.close()
        else:
            self._idle = worker

    def _take_worker(self) -> Worker:
        """Return the worker that idles, or a new one: whoever takes it closes it or gives it back."""
        worker, self._idle, self._closed = self._idle, None, False
        return worker or Worker(self._installation, self._location, self._environment)
