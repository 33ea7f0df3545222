"""What this host knows of its last exports of a volume: since which one the next lists what changed.

An export has no repository: what became of the job that read it is not known here, and does not matter. Each segment
carries a stamp that changes if and only if its content may have, whichever export somebody saw it in last. So all there
is to know is what was shown: record, block map and stamps, and of some pieces their hashes (`witnesses.py`). Losing it
costs new stamps for everything, never data.

    exported/volumes/VOLUME/SNAPSHOT    a line of JSON, then map and stamps in their stored forms
"""

from __future__ import annotations

import dataclasses
import json

from blockferry.blockmap import BlockMap
from blockferry.errors import DamagedSnapshotError
from blockferry.remembered import Remembered
from blockferry.repository import EXPORTED
from blockferry.segments import Stamps, segment_count, stamps_from_bytes, stamps_to_bytes, unit_for
from blockferry.snapshot import Record, Snapshot

_MOST = 3
"""Exports of a volume that are kept: the last one may have a checkpoint that is lost."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """What one export showed of a volume."""

    record: Record
    block_map: BlockMap
    stamps: Stamps
    image_stamp: int
    """The stamp of the image as one file, in ns since the epoch."""
    witnesses: tuple[tuple[int, int, str], ...] = ()
    """Start, length and hash of some pieces."""

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        block_map = self.block_map.to_bytes()
        head = {
            "record": dataclasses.asdict(self.record),
            "map": len(block_map),
            "image_stamp": self.image_stamp,
            "witnesses": self.witnesses,
        }
        return json.dumps(head).encode() + b"\n" + block_map + stamps_to_bytes(self.stamps)

    @classmethod
    def from_bytes(cls, stored: bytes, where: str) -> Shown:
        """Return what was stored; raise DamagedSnapshotError, naming `where`, if it cannot be read."""
        line, _, rest = stored.partition(b"\n")
        try:
            head = json.loads(line)
            record = Record.from_json(json.dumps(head["record"]).encode(), where)
            block_map = BlockMap.from_bytes(rest[: head["map"]])
            if block_map.size != record.size:
                raise ValueError("the map is of another size")
            stamps = stamps_from_bytes(rest[head["map"] :], segment_count(record.size, record.unit), where)
            witnesses = tuple((int(start), int(length), str(digest)) for start, length, digest in head["witnesses"])
            return cls(record, block_map, stamps, int(head["image_stamp"]), witnesses)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedSnapshotError(f"{where}: cannot be read: {error}") from None


class Memory:
    """The exports of one volume or group, each as a snapshot. Implements `blockferry.repository.Snapshots`."""

    reference = EXPORTED

    def __init__(self, name: str, *, kind: str = "volumes") -> None:
        self._files = Remembered("exported", kind, name)

    def unit(self, size: int) -> int:
        """Return the size of the segments of an image of `size` bytes."""
        return unit_for(size)

    def snapshots(self, *, about_to_store: bool = False) -> list[Snapshot]:
        """Return what is remembered, oldest first; what cannot be read is not."""
        del about_to_store
        found = []
        for name in self._files.names():
            try:
                found.append(Snapshot.of(self.load(name).record, name))
            except DamagedSnapshotError:
                continue
        return sorted(found, key=lambda snapshot: snapshot.created)

    def describe(self, snapshot: Snapshot) -> tuple[Record, BlockMap]:
        """Return the record and the block map of an export."""
        shown = self.load(snapshot.id)
        return shown.record, shown.block_map

    def load(self, snapshot: str) -> Shown:
        """Return all that is known of an export; DamagedSnapshotError if it cannot be read."""
        where = f"export {snapshot}"
        stored = self._files.get(snapshot)
        if stored is None:
            raise DamagedSnapshotError(f"{where}: is not remembered")
        return Shown.from_bytes(stored, where)

    def keep(self, shown: Shown) -> None:
        """Remember an export, and forget the oldest."""
        self._files.put(shown.record.snapshot, shown.to_bytes())
        self._files.keep(lambda _name: True, _MOST)
