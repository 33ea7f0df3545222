"""The blocks in use of an ext2, ext3 or ext4 filesystem that is not mounted for writing, from its block bitmaps.

In use are the blocks whose bit is set in a block bitmap; the fixed metadata (superblocks, group descriptors, bitmaps,
inode tables), which a group whose bitmap was never initialised may hold and does not list; what lies before the
first block; and every byte after the filesystem's end. The latter two belong to somebody else, so nobody can say that
they are not needed.

Bitmaps are believed only if everything that protects them agrees: the superblock's checksum and the numbers in it,
the checksum of each descriptor and bitmap, the count of free clusters in each descriptor, a state that is clean. A
feature that is not known here, damage or an error mark means: not answered for, the whole volume is in use.

A journal that has not been replayed
------------------------------------
It is what a crash leaves, and a copy of a volume in use. `journal.py` finds out which blocks a replay would
overwrite and where in the journal their new content lies, and this module reads superblock, descriptors and bitmaps
through that, as they will be once the journal is replayed, with every check as above. That is all a restore needs:

- What is read before the replay is the superblock, the descriptors, the journal's inode and its blocks. They are in
  use before and after: a journal is neither made nor moved while its filesystem is mounted, and a resize, the one
  thing that moves metadata, is recognised and declined.
- Replay makes exactly one state of the disk, because the log is accepted only if it is whole: all its checksums are
  right and each transaction is committed by a commit block alone. Where implementations could disagree on what the
  last transaction is, or apply more than copies of blocks (fast commits), it is declined.
- The bitmaps of that state are of one transaction with all that refers to blocks, so no block that is referred to
  has its bit cleared. Cleaning up orphans, which follows, only frees blocks.

The blocks in use by the bitmaps on the disk as they are, are added for tools that read without replaying (debugfs, a
mount with `noload`): they find as much as they would have found. These bitmaps and their descriptors may be of
different transactions, so in this second look alone the bitmaps are not checked; it can only add.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets
from blockferry.hookspecs import Declined, UsedBlocks, hookimpl
from blockferry.layers import Layer
from blockferry.used.checksum import Rows, crc32c
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.groups import Descriptors, fixed_metadata, read_descriptors
from blockferry.used.ext4.journal import pending_replay
from blockferry.used.ext4.superblock import (
    ERROR_STATE,
    ORPHAN_STATE,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE,
    VALID_STATE,
    Checksums,
    Layout,
    Superblock,
    UnanswerableError,
    has_magic,
    parse_superblock,
    raw_superblock,
)
from blockferry.volume import Volume

_BITMAPS_AT_ONCE = 8 << 20  # bytes; 256 GiB of filesystem in blocks of 4 KiB
_WORDS_AT_ONCE = 1 << 15


@hookimpl
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Answer for ext2, ext3 and ext4, mounted read-only or not at all."""
    with volume.open_data() as layer:
        raw = raw_superblock(layer)
        if not has_magic(raw):
            return None
        if any(not mount.read_only for mount in volume.mounts()):
            declined("ext4: mounted for writing, so that its bitmaps on disk are behind")
            return None
        try:
            return UsedBlocks(used_extents(layer), "ext4 bitmaps")
        except UnanswerableError as reason:
            declined(f"ext4: {reason}")
            return None


def used_extents(layer: Layer) -> ExtentSet:
    """Return the bytes in use of a volume with an ext2, ext3 or ext4 filesystem.

    Raise UnanswerableError if it is damaged, or has what is not known here.
    """
    superblock = parse_superblock(raw_superblock(layer), layer.size)
    layout = superblock.layout
    on_disk = BlockReader(layer, layout)
    _check_state(superblock)
    replay = pending_replay(on_disk, superblock)
    if replay is None:
        sets = list(_used_in_batches(on_disk, verify=True))
    else:
        replayed = BlockReader(layer, layout, replay)
        after = parse_superblock(replayed.superblock(), layer.size)
        if after.layout != layout:
            raise UnanswerableError("its journal holds a resize that has not been replayed; mount it or run e2fsck")
        _check_state(after)
        sets = [*_used_in_batches(replayed, verify=True), *_used_in_batches(on_disk, verify=False)]
    before = ExtentSet.from_pairs([(0, SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE)])
    behind = ExtentSet.from_pairs([(layout.bytes, layer.size - layout.bytes)])
    return before.union(behind, *sets)


def check_clean(layer: Layer) -> None:
    """Raise UnanswerableError unless it was unmounted, and is neither marked as damaged nor has what is not known here.

    Nothing is left to be done by a mount then, and no block belongs to several files.
    """
    superblock = parse_superblock(raw_superblock(layer), layer.size)
    if superblock.needs_recovery:
        raise UnanswerableError("its journal needs recovery")
    _check_state(superblock)
    if superblock.state & ORPHAN_STATE:
        raise UnanswerableError("it has files that are to be removed")
    if superblock.shares_blocks:
        raise UnanswerableError("its files share blocks")


def _check_state(superblock: Superblock) -> None:
    """Raise UnanswerableError if bitmaps may be behind what refers to blocks: only a check could tell."""
    if superblock.state & ERROR_STATE:
        raise UnanswerableError("it is marked as having errors; run e2fsck")
    if superblock.state & ~ORPHAN_STATE != VALID_STATE:
        raise UnanswerableError("it was not unmounted cleanly and has no journal to mend that; run e2fsck")


def _used_in_batches(reader: BlockReader, *, verify: bool) -> Iterator[ExtentSet]:
    """Yield the bytes in use, by bitmaps and as fixed metadata, some groups at a time."""
    layout = reader.layout
    step = max(_BITMAPS_AT_ONCE // layout.block_size, 1)
    for first in range(0, layout.groups, step):
        descriptors = read_descriptors(reader, first, min(first + step, layout.groups))
        yield fixed_metadata(layout, descriptors)
        if descriptors.initialised.any():
            yield _used_by_bitmaps(reader, descriptors, verify=verify)


def _used_by_bitmaps(reader: BlockReader, descriptors: Descriptors, *, verify: bool) -> ExtentSet:
    """Return the bytes of the clusters whose bits are set; with `verify`, UnanswerableError for a damaged bitmap."""
    layout = reader.layout
    per_group = layout.clusters_per_group
    descriptors = descriptors.of_initialised()
    bitmaps = reader.read(descriptors.block_bitmap)[:, : per_group // 8]
    starts, ends = set_runs(bitmaps.reshape(-1))
    # Neighbours here need not be neighbours on the disk: no run may go on from one bitmap into the next.
    seams = np.arange(1, descriptors.groups.size) * per_group
    run = np.searchsorted(starts, seams) - 1
    seams = seams[(run >= 0) & (ends[run] > seams)]
    starts, ends = np.sort(np.concatenate([starts, seams])), np.sort(np.concatenate([ends, seams]))
    bitmap = starts // per_group
    # From bits of these bitmaps to clusters of the filesystem. The bits behind its last cluster are set for nothing.
    distance = (descriptors.groups[bitmap] - bitmap) * per_group
    starts, ends = np.minimum(starts + distance, layout.clusters), np.minimum(ends + distance, layout.clusters)
    if verify:
        used = np.bincount(bitmap, ends - starts, descriptors.groups.size).astype(np.int64)
        _check_bitmaps(layout, descriptors, bitmaps, used)
    begin, cluster = layout.first_block * layout.block_size, layout.blocks_per_cluster * layout.block_size
    return ExtentSet.from_ranges(begin + starts * cluster, np.minimum(begin + ends * cluster, layout.bytes))


def set_runs(bitmap: npt.NDArray[np.uint8]) -> tuple[Offsets, Offsets]:
    """Return the runs of set bits, `[starts[i], ends[i])`, of a bitmap whose bytes begin with the least bit.

    Where a run begins or ends, a bit differs from the one before. Whole words are compared with themselves shifted by
    a bit; only those that hold such a place, few in any bitmap but the most ragged, are taken apart.
    """
    words = np.zeros(bitmap.size // 8 + 1, "<u8")  # never full: every run ends within
    words.view(np.uint8)[: bitmap.size] = bitmap
    edges = words ^ (words << np.uint64(1))
    edges[1:] ^= words[:-1] >> np.uint64(63)
    places = np.flatnonzero(edges)
    found = []
    for first in range(0, places.size, _WORDS_AT_ONCE):
        some = places[first : first + _WORDS_AT_ONCE]
        bits = np.flatnonzero(np.unpackbits(edges[some].view(np.uint8), bitorder="little"))
        found.append(some[bits >> 6] * 64 + (bits & 63))
    changes = np.concatenate(found) if found else np.empty(0, np.int64)
    return changes[0::2], changes[1::2]


def _check_bitmaps(layout: Layout, descriptors: Descriptors, bitmaps: Rows, used: Offsets) -> None:
    """Raise UnanswerableError if a bitmap's checksum, or the count of its free clusters, is not its descriptor's."""
    clusters = np.minimum(layout.clusters - descriptors.groups * layout.clusters_per_group, layout.clusters_per_group)
    wrong = clusters - used != descriptors.free_clusters
    if layout.checksums is Checksums.CRC32C:
        # A descriptor of 32 bytes has no room for the upper half.
        mask = 0xFFFFFFFF if layout.descriptor_size >= 64 else 0xFFFF
        wrong |= crc32c().rows(bitmaps, layout.checksum_seed) & mask != descriptors.bitmap_checksum
    if wrong.any():
        group = descriptors.groups[np.argmax(wrong)]
        raise UnanswerableError(f"group {group}: the block bitmap is damaged; run e2fsck")
