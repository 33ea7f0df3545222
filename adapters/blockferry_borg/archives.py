"""What an archive of ours is called, says in its comment and holds, whatever the borg."""

from __future__ import annotations

import json
import logging
import re

from blockferry.blockmap import BlockMap
from blockferry.errors import DamagedSnapshotError
from blockferry.snapshot import Record, Snapshot
from blockferry_borg.environment import NAME_VARIABLE, BorgEnvironment
from blockferry_borg.naming import named

log = logging.getLogger(__name__)

IMAGE_NAME = "volume.img"
_COMMENT = "blockferry "
_LISTED = ("snapshot", "volume", "tier", "size", "base", "part", "state_of", "share_of", "closing", "created")

_MOST_CHUNKS = 1 << 22
_UNITS = (1 << 20, 4 << 20, 16 << 20)


def unit_for(size: int) -> int:
    """Return the chunk size for an image of `size` bytes.

    1 MiB is the compromise between a hot restore, which fetches whole chunks, and a chunk list that borg reads into
    memory at about 200 bytes a chunk whenever it extracts, mounts or deletes an archive. Where that list would have
    more than 4 Mi entries (from 4 TiB, from 16 TiB) chunks are larger. 16 MiB is the largest that borg takes.
    """
    return next((unit for unit in _UNITS if size <= unit * _MOST_CHUNKS), _UNITS[-1])


def is_unfinished(name: str) -> bool:
    """Tell whether an archive is a checkpoint, by the name that borg gives to those."""
    return re.search(r"\.checkpoint(\.\d+)?\Z", name) is not None


def plain_volume(record: Record) -> str:
    """Return a volume's name as archives carry it: of characters that mean nothing to any borg."""
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", record.volume)


def archive_name(record: Record, environment: BorgEnvironment) -> str:
    """Return what the archive of a snapshot is called.

    A share's name does not begin with the volume's: `borg prune --glob-archives 'VOLUME-*'` is to leave it alone.
    """
    if record.share_of:
        return f"blockferry-share-{plain_volume(record)}-{record.created[:19]}-{record.snapshot}"
    if template := environment.variables.get(NAME_VARIABLE):
        return named(template, environment.variables, volume=plain_volume(record), snapshot=record.snapshot)
    return f"{plain_volume(record)}-{record.created[:19]}-{record.snapshot}"


def comment_for(record: Record) -> str:
    """Return an archive's comment: what listing snapshots has to know."""
    listed = {name: getattr(record, name) for name in _LISTED}
    return _COMMENT + json.dumps(listed, separators=(",", ":"))


def snapshot_from(name: str, comment: str) -> Snapshot | None:
    """Return the snapshot that an archive's comment describes; None if it is not of blockferry's making."""
    if not comment.startswith(_COMMENT):
        return None
    try:
        told = json.loads(comment.removeprefix(_COMMENT))
        texts = [told[key] for key in ("snapshot", "volume", "created", "tier")]
        texts += [told.get("share_of") or ""]
        if not all(isinstance(text, str) for text in texts) or not isinstance(told["size"], int):
            raise TypeError
        return Snapshot(
            id=told["snapshot"],
            archive=name,
            volume=told["volume"],
            created=told["created"],
            size=told["size"],
            tier=told["tier"],
            base=told.get("base"),
            part=told.get("part") is True,
            state_of=told.get("state_of"),
            share_of=told.get("share_of"),
            closing=told.get("closing") is True,
        )
    except (ValueError, KeyError, TypeError):
        log.warning("archive %s: its comment begins like one of ours and is none; left out", name)
        return None


def map_from(stored: bytes, where: str) -> BlockMap:
    """Return the block map of its stored form; raise DamagedSnapshotError, naming `where`, if it is none."""
    try:
        return BlockMap.from_bytes(stored)
    except ValueError as error:
        raise DamagedSnapshotError(f"{where}: {error}", remedy="Check it with `borg check`.") from None
