"""The block groups of ext2, ext3 and ext4: their descriptors, and the metadata whose place is fixed.

From the kernel's Documentation/filesystems/ext4: group_descr.rst, blockgroup.rst and checksums.rst.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets
from blockferry.used.checksum import Rows, crc16, crc32c
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.superblock import Checksums, Layout, UnanswerableError


@dataclasses.dataclass(frozen=True)
class Descriptors:
    """The group descriptors of consecutive groups: an array each, an entry a group."""

    groups: Offsets
    block_bitmap: Offsets
    inode_bitmap: Offsets
    inode_table: Offsets
    free_clusters: Offsets
    bitmap_checksum: npt.NDArray[np.uint32]
    initialised: npt.NDArray[np.bool_]
    """False: the block bitmap on disk means nothing, no block but fixed metadata is in use (BLOCK_UNINIT)."""

    def of_initialised(self) -> Descriptors:
        """Return the descriptors of the groups whose block bitmap means something."""
        arrays = {field.name: getattr(self, field.name)[self.initialised] for field in dataclasses.fields(self)}
        return Descriptors(**arrays)


_BLOCK_UNINIT = 0x2
_LOW = {
    "block_bitmap": ("<u4", 0x0),
    "inode_bitmap": ("<u4", 0x4),
    "inode_table": ("<u4", 0x8),
    "free_clusters": ("<u2", 0xC),
    "flags": ("<u2", 0x12),
    "bitmap_checksum": ("<u2", 0x18),
    "checksum": ("<u2", 0x1E),
}
_HIGH = {
    "block_bitmap_high": ("<u4", 0x20),
    "inode_bitmap_high": ("<u4", 0x24),
    "inode_table_high": ("<u4", 0x28),
    "free_clusters_high": ("<u2", 0x2C),
    "bitmap_checksum_high": ("<u2", 0x38),
}


def read_descriptors(reader: BlockReader, first: int, last: int) -> Descriptors:
    """Return the descriptors of groups `[first, last)`; raise UnanswerableError if one is damaged."""
    layout = reader.layout
    per_block = layout.descriptors_per_block
    indexes = np.arange(first // per_block, -(-last // per_block))
    rows = reader.read(layout.descriptor_locations(indexes)).reshape(-1, layout.descriptor_size)
    rows = rows[first - int(indexes[0]) * per_block :][: last - first]
    fields = _LOW | (_HIGH if layout.descriptor_size >= 64 else {})
    raw = rows.view(
        np.dtype(
            {
                "names": list(fields),
                "formats": [form for form, _ in fields.values()],
                "offsets": [offset for _, offset in fields.values()],
                "itemsize": layout.descriptor_size,
            }
        )
    )[:, 0]
    groups = np.arange(first, last)
    _check_descriptors(layout, groups, rows, raw["checksum"])

    def whole(name: str, shift: int) -> Offsets:
        high = raw[f"{name}_high"].astype(np.int64) if f"{name}_high" in fields else np.int64(0)
        number: Offsets = raw[name].astype(np.int64) | high << shift
        return number

    tables = {name: whole(name, 32) for name in ("block_bitmap", "inode_bitmap", "inode_table")}
    for name, blocks in tables.items():
        end = layout.blocks - (layout.inode_table_blocks - 1 if name == "inode_table" else 0)
        wrong = np.flatnonzero((blocks <= layout.first_block) | (blocks >= end))
        if wrong.size:
            raise UnanswerableError(f"group {groups[wrong[0]]}: the {name.replace('_', ' ')} lies outside")
    unused = (
        (raw["flags"] & _BLOCK_UNINIT) != 0 if layout.checksums is not Checksums.NONE else np.zeros(groups.size, bool)
    )
    return Descriptors(
        groups=groups,
        free_clusters=whole("free_clusters", 16),
        bitmap_checksum=whole("bitmap_checksum", 16).astype(np.uint32),
        initialised=~unused,
        **tables,
    )


def _check_descriptors(layout: Layout, groups: Offsets, rows: Rows, stored: npt.NDArray[np.uint16]) -> None:
    """Raise UnanswerableError if a descriptor's checksum, over the group's number and all but itself, is wrong."""
    numbers = groups.astype("<u4").view(np.uint8).reshape(-1, 4)
    match layout.checksums:
        case Checksums.NONE:
            return
        case Checksums.CRC32C:
            blank = np.zeros((groups.size, 2), np.uint8)
            summed = np.concatenate([numbers, rows[:, :0x1E], blank, rows[:, 0x20:]], axis=1)
            computed = crc32c().rows(summed, layout.checksum_seed)
        case Checksums.CRC16:
            uuids = np.broadcast_to(np.frombuffer(layout.uuid, np.uint8), (groups.size, 16))
            summed = np.concatenate([uuids, numbers, rows[:, :0x1E], rows[:, 0x20:]], axis=1)
            computed = crc16().rows(summed, 0xFFFF)
    wrong = np.flatnonzero((computed & 0xFFFF) != stored)
    if wrong.size:
        raise UnanswerableError(f"group {groups[wrong[0]]}: the descriptor's checksum is wrong")


def fixed_metadata(layout: Layout, descriptors: Descriptors) -> ExtentSet:
    """Return the bytes of what lies where it does from the filesystem's making on, used or not.

    For the described groups: bitmaps, inode tables, copies of the superblock and of the group descriptors with the
    blocks reserved for more of them. It is all there is in a group whose block bitmap is not initialised.
    """
    groups = descriptors.groups
    first, kept = layout.first_blocks(groups), layout.keeps_superblock(groups)
    meta_group, within = np.divmod(groups, layout.descriptors_per_block)
    in_a_row = meta_group < layout.first_meta_group
    described = ~in_a_row & np.isin(within, [0, 1, layout.descriptors_per_block - 1])
    old = np.where(in_a_row, layout.first_meta_group + layout.reserved_descriptor_blocks, 0)
    head = np.where(kept, 1 + old, 0) + described
    starts = np.concatenate([first, descriptors.block_bitmap, descriptors.inode_bitmap, descriptors.inode_table])
    ones = np.ones(groups.size, np.int64)
    lengths = np.concatenate([head, ones, ones, ones * layout.inode_table_blocks])
    in_bytes = ExtentSet.from_ranges(starts * layout.block_size, (starts + lengths) * layout.block_size)
    # A cluster is in use as a whole. With bigalloc the first block is 0, so that clusters are aligned.
    return in_bytes.align(layout.block_size * layout.blocks_per_cluster, layout.bytes).clip(0, layout.bytes)
