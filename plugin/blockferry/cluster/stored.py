"""What a backup of a shared volume stores: shares, and last of all the log that makes a set of them.

A common record says what is the same of all: its `snapshot` is the set's id, its `created` the instant. Nothing is a
snapshot for the user before the log is there.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence

from blockferry.blockmap import BlockMap
from blockferry.chain import Link, check_set
from blockferry.extents import ExtentSet
from blockferry.layers import CutLayer, Layer
from blockferry.repository import Advance, Repository
from blockferry.snapshot import Record, Snapshot, Stored, new_snapshot_id, now


def store_share(repository: Repository, source: Layer, extents: ExtentSet, record: Record, advance: Advance) -> Stored:
    """Store some extents of a volume, which may be written to meanwhile, as a share of the set `record.snapshot`.

    Raise ValueError if the source or the volume does not have them. All or nothing, as `Repository.store`.
    """
    if extents.difference(source.extents) or extents.end > record.size:
        raise ValueError("the source does not have all of the share")
    share = dataclasses.replace(
        _in_a_set(record),
        snapshot=new_snapshot_id(),
        created=now(),
        host=socket.gethostname(),
        bytes_used=extents.total,
        bytes_changed=extents.total,
        checkpoints={},
        share_of=record.snapshot,
    )
    block_map = BlockMap.build(record.size, data=extents)
    # Nothing but its own: what the next share has of a chunk is not to be in two images, of two instants.
    return repository.store(CutLayer(source, extents), block_map, share, bases=[], advance=advance)


def close_set(
    repository: Repository,
    log: Layer,
    shares: Sequence[Snapshot],
    used: ExtentSet,
    record: Record,
    advance: Advance,
) -> Stored:
    """Store the entire log, whose extents are what it has, over the shares: from then on there is a snapshot.

    `used` is what was in use at the instant; what the log has of other blocks is left out. The shares are looked up in
    `repository`: where the log goes to another one than theirs, that is a JoinedRepository with the log's first.

    Raise DamagedSnapshotError if a share is not of this set, or two have the same blocks, and ValueError if shares and
    log do not have all that is in use, or shares have more. All or nothing.
    """
    data = log.extents.intersection(used)
    links = [Link(share, *repository.describe(share)) for share in shares]
    copied = ExtentSet.empty().union(*(link.stored for link in links))
    if used.end > record.size or copied.difference(used) or used.difference(data).difference(copied):
        raise ValueError("the shares and the log do not have exactly what is in use")
    closing = dataclasses.replace(
        _in_a_set(record),
        bytes_used=used.total,
        bytes_changed=data.total,
        shares=[share.id for share in shares],
    )
    block_map = BlockMap.build(record.size, data=data, same=used)
    check_set(Link(Snapshot.of(closing, ""), closing, block_map), links)
    return repository.store(CutLayer(log, data), block_map, closing, bases=[], advance=advance)


def _in_a_set(record: Record) -> Record:
    """Return a record of something that is only some of a snapshot."""
    return dataclasses.replace(record, part=True, base=None, share_of=None, shares=None)
