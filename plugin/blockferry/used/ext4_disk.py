"""The on-disk structures of ext2, ext3 and ext4: superblock, group descriptors, and where the fixed metadata lies.

From the kernel's Documentation/filesystems/ext4: super.rst, group_descr.rst, blockgroup.rst, bigalloc.rst and
checksums.rst. All numbers are little endian. What is read is untrusted: each number is checked against the others
before anything is allocated or read by it, and UnanswerableError says what was wrong.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import Layer
from blockferry.used.ext4_checksum import Rows, crc16, crc32c

SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_SIZE = 1024
_MAGIC = 0xEF53

VALID_STATE, ERROR_STATE, ORPHAN_STATE = 1, 2, 4


class UnanswerableError(Exception):
    """This is ext2, ext3 or ext4, and yet nobody could say which of its blocks are in use; the message says why."""


class Compat(enum.IntFlag):
    """The features of `s_feature_compat` that are known here. LAZY_BG and the snapshots' EXCLUDE_BITMAP are not."""

    DIR_PREALLOC = 0x1
    IMAGIC_INODES = 0x2
    HAS_JOURNAL = 0x4
    EXT_ATTR = 0x8
    RESIZE_INODE = 0x10
    DIR_INDEX = 0x20
    SPARSE_SUPER2 = 0x200
    FAST_COMMIT = 0x400
    STABLE_INODES = 0x800
    ORPHAN_FILE = 0x1000


class Incompat(enum.IntFlag):
    """The features of `s_feature_incompat` that are known here. COMPRESSION and Lustre's DIRDATA are not."""

    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    SIXTY_FOUR_BIT = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class RoCompat(enum.IntFlag):
    """The features of `s_feature_ro_compat` that are known here. BTREE_DIR, HAS_SNAPSHOT and REPLICA are not."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    READONLY = 0x1000
    PROJECT = 0x2000
    SHARED_BLOCKS = 0x4000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


class Checksums(enum.Enum):
    """What protects group descriptors, and with CRC32C also bitmaps, inodes and the superblock."""

    NONE = enum.auto()
    CRC16 = enum.auto()
    CRC32C = enum.auto()


class Backups(enum.Enum):
    """Which groups keep a copy of the superblock and of the group descriptors."""

    ALL = enum.auto()
    SPARSE = enum.auto()
    """Groups 0 and 1 and the powers of 3, 5 and 7."""
    NAMED = enum.auto()
    """Group 0 and the two that the superblock names (`sparse_super2`)."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a filesystem keeps what: all of the superblock that does not change while nobody resizes it."""

    block_size: int
    blocks: int
    first_block: int
    """1 if a block has 1 KiB (the superblock lies in it), else 0."""
    blocks_per_cluster: int
    """1 without bigalloc: a bit of a block bitmap stands for so many blocks."""
    clusters_per_group: int
    inodes_per_group: int
    inode_size: int
    descriptor_size: int
    reserved_descriptor_blocks: int
    first_meta_group: int
    """From this block of descriptors on, each lies in the groups that it describes (`meta_bg`)."""
    backups: Backups
    backup_groups: tuple[int, int]
    checksums: Checksums
    checksum_seed: int
    uuid: bytes

    @property
    def blocks_per_group(self) -> int:
        """The blocks of every group but the last, which may have fewer."""
        return self.clusters_per_group * self.blocks_per_cluster

    @property
    def groups(self) -> int:
        """The number of block groups."""
        return -(-(self.blocks - self.first_block) // self.blocks_per_group)

    @property
    def clusters(self) -> int:
        """The number of clusters, and so of valid bits in all block bitmaps."""
        return -(-(self.blocks - self.first_block) // self.blocks_per_cluster)

    @property
    def descriptors_per_block(self) -> int:
        """Also the number of groups in a meta group."""
        return self.block_size // self.descriptor_size

    @property
    def descriptor_blocks(self) -> int:
        """The blocks of one copy of all group descriptors."""
        return -(-self.groups // self.descriptors_per_block)

    @property
    def inode_table_blocks(self) -> int:
        """The blocks of one group's inode table."""
        return -(-self.inodes_per_group * self.inode_size // self.block_size)

    @property
    def bytes(self) -> int:
        """The size of the filesystem."""
        return self.blocks * self.block_size

    def first_blocks(self, groups: Offsets) -> Offsets:
        """Return the block with which each group's superblock or descriptors, if it keeps any, begin."""
        first = self.first_block + groups * self.blocks_per_group
        # bigalloc with blocks of 1 KiB: group 0 begins at block 0, the superblock lies in block 1 all the same.
        return np.where((first == 0) & (self.block_size == SUPERBLOCK_OFFSET), 1, first)

    def keeps_superblock(self, groups: Offsets) -> npt.NDArray[np.bool_]:
        """Tell which groups keep a copy of the superblock."""
        match self.backups:
            case Backups.ALL:
                return np.ones(groups.shape, bool)
            case Backups.NAMED:
                return np.isin(groups, [0, *self.backup_groups])
            case Backups.SPARSE:
                return np.isin(groups, _sparse_groups(self.groups))

    def descriptor_locations(self, indexes: Offsets) -> Offsets:
        """Return where each block of the primary group descriptors lies."""
        groups = indexes * self.descriptors_per_block
        within = self.first_blocks(groups) + self.keeps_superblock(groups)
        in_a_row = int(self.first_blocks(np.zeros(1, np.int64))[0]) + 1 + indexes
        return np.where(indexes < self.first_meta_group, in_a_row, within)


@functools.cache
def _sparse_groups(groups: int) -> list[int]:
    """Return the groups below `groups` that keep a superblock under `sparse_super`."""
    found = {0, 1}
    for base in (3, 5, 7):
        power = base
        while power < groups:
            found.add(power)
            power *= base
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Superblock:
    """The layout, and what of the superblock does change while a filesystem is in use."""

    layout: Layout
    state: int
    needs_recovery: bool
    has_journal: bool
    fast_commit: bool
    journal_inode: int
    """0: the journal is on another device, or there is none."""


class _Fields:
    """The numbers at their offsets in a superblock."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.raw, offset)[0])

    def u32(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.raw, offset)[0])


def has_magic(raw: bytes) -> bool:
    """Tell whether the 1,024 bytes at offset 1,024 of a volume are a superblock of the ext family."""
    return len(raw) == SUPERBLOCK_SIZE and _Fields(raw).u16(0x38) == _MAGIC


def parse_superblock(raw: bytes, volume_size: int) -> Superblock:
    """Return what the superblock says; raise UnanswerableError if it is damaged or has a feature not known here."""
    fields = _Fields(raw)
    if not has_magic(raw):
        raise UnanswerableError("the journal holds a superblock without its magic number")
    compat, incompat, ro_compat = _features(fields)
    if RoCompat.METADATA_CSUM in ro_compat and (raw[0x175] != 1 or crc32c().of(raw[:0x3FC]) != fields.u32(0x3FC)):
        raise UnanswerableError("the superblock's checksum is wrong")
    layout = _layout(fields, compat, incompat, ro_compat)
    _check_layout(layout, fields.u32(0x0), volume_size)
    external = fields.raw[0xD0:0xE0] != bytes(16)
    return Superblock(
        layout=layout,
        state=fields.u16(0x3A),
        needs_recovery=Incompat.RECOVER in incompat,
        has_journal=Compat.HAS_JOURNAL in compat,
        fast_commit=Compat.FAST_COMMIT in compat,
        journal_inode=0 if external else fields.u32(0xE0),
    )


def _features(fields: _Fields) -> tuple[Compat, Incompat, RoCompat]:
    """Return the feature sets; revision 0 has none."""
    if fields.u32(0x4C) > 1:
        raise UnanswerableError(f"revision {fields.u32(0x4C)} of the format is not known")
    words = [fields.u32(offset) if fields.u32(0x4C) else 0 for offset in (0x5C, 0x60, 0x64)]
    sets = Compat(words[0]), Incompat(words[1]), RoCompat(words[2])
    for name, found in zip(("compat", "incompat", "ro_compat"), sets, strict=True):
        unknown = int(found) & ~sum(type(found))
        if unknown:
            raise UnanswerableError(f"unknown {name} feature flags {unknown:#x}")
    if Incompat.JOURNAL_DEV in sets[1]:
        raise UnanswerableError("it is the journal of another filesystem")
    return sets


def _layout(fields: _Fields, compat: Compat, incompat: Incompat, ro_compat: RoCompat) -> Layout:
    """Return the layout, none of whose numbers is zero where that would divide."""
    dynamic, wide = fields.u32(0x4C) > 0, Incompat.SIXTY_FOUR_BIT in incompat
    log_block, log_cluster = fields.u32(0x18), fields.u32(0x1C)
    per_group, clusters_per_group, inodes_per_group = fields.u32(0x20), fields.u32(0x24), fields.u32(0x28)
    # 64 KiB is the largest block, 512 MiB the largest cluster of e2fsprogs.
    if log_block > 6 or not log_block <= log_cluster <= 19 + 10:
        raise UnanswerableError("damaged superblock: impossible block size")
    if log_cluster != log_block and RoCompat.BIGALLOC not in ro_compat:
        raise UnanswerableError("damaged superblock: clusters without bigalloc")
    block_size, blocks_per_cluster = 1024 << log_block, 1 << (log_cluster - log_block)
    descriptor_size = fields.u16(0xFE) if wide else 32
    if descriptor_size not in ([64, 128, 256, 512, 1024] if wide else [32]):
        raise UnanswerableError("damaged superblock: impossible size of group descriptors")
    # mke2fs makes no group smaller than 256 blocks; the bitmap of the largest fills a block.
    if per_group != clusters_per_group * blocks_per_cluster or per_group < 256 or not inodes_per_group:
        raise UnanswerableError("damaged superblock: impossible block groups")
    uuid, checksums = fields.raw[0x68:0x78], _checksums(ro_compat)
    layout = Layout(
        block_size=block_size,
        blocks=fields.u32(0x4) | (fields.u32(0x150) << 32 if wide else 0),
        first_block=fields.u32(0x14),
        blocks_per_cluster=blocks_per_cluster,
        clusters_per_group=clusters_per_group,
        inodes_per_group=inodes_per_group,
        inode_size=fields.u16(0x58) if dynamic else 128,
        descriptor_size=descriptor_size,
        reserved_descriptor_blocks=fields.u16(0xCE),
        first_meta_group=0,
        backups=_backups(compat, ro_compat),
        backup_groups=(fields.u32(0x24C), fields.u32(0x250)) if Compat.SPARSE_SUPER2 in compat else (0, 0),
        checksums=checksums,
        checksum_seed=fields.u32(0x270) if Incompat.CSUM_SEED in incompat else crc32c().of(uuid),
        uuid=uuid,
    )
    first_meta_group = fields.u32(0x104) if Incompat.META_BG in incompat else layout.descriptor_blocks
    return dataclasses.replace(layout, first_meta_group=first_meta_group)


def _checksums(ro_compat: RoCompat) -> Checksums:
    if RoCompat.METADATA_CSUM in ro_compat:
        return Checksums.CRC32C
    return Checksums.CRC16 if RoCompat.GDT_CSUM in ro_compat else Checksums.NONE


def _backups(compat: Compat, ro_compat: RoCompat) -> Backups:
    if Compat.SPARSE_SUPER2 in compat:
        return Backups.NAMED
    return Backups.SPARSE if RoCompat.SPARSE_SUPER in ro_compat else Backups.ALL


def _check_layout(layout: Layout, inodes: int, volume_size: int) -> None:
    """Raise UnanswerableError if the layout's numbers contradict each other or the volume's size."""
    first_block = 1 if layout.block_size == 1024 and layout.blocks_per_cluster == 1 else 0
    inodes_fit = layout.inodes_per_group <= 8 * layout.block_size and inodes == layout.groups * layout.inodes_per_group
    damage = {
        "bitmaps that are larger than a block": layout.clusters_per_group > 8 * layout.block_size,
        "bitmaps that end within a byte": layout.clusters_per_group % 8 != 0,
        "the first block": layout.first_block != first_block or layout.blocks <= first_block,
        "the number of inodes": not inodes_fit,
        "the size of inodes": layout.inode_size not in [1 << power for power in range(7, 17)]
        or layout.inode_size > layout.block_size,
        "the reserved descriptor blocks": layout.reserved_descriptor_blocks > layout.block_size // 4,
        "the meta block groups": layout.first_meta_group > layout.descriptor_blocks,
    }
    for what, wrong in damage.items():
        if wrong:
            raise UnanswerableError(f"damaged superblock: {what}")
    if layout.bytes > volume_size:
        raise UnanswerableError(f"the filesystem has {layout.bytes} bytes, the volume only {volume_size}")


class Relocation(Protocol):
    """What says that blocks are to be read elsewhere: a journal that has not been replayed."""

    def places(self, blocks: Offsets) -> Offsets:
        """Return the block in which each of `blocks` is to be read."""

    def mend(self, blocks: Offsets, rows: Rows) -> None:
        """Undo, in what was read for `blocks`, what it takes to keep a block elsewhere."""


class BlockReader:
    """The blocks of a filesystem, as they lie on the disk or as `relocation` says."""

    def __init__(self, layer: Layer, layout: Layout, relocation: Relocation | None = None) -> None:
        self.layer = layer
        self.layout = layout
        self.relocation = relocation

    def read(self, blocks: Offsets) -> Rows:
        """Return the blocks as rows of bytes; neighbours in the list that are neighbours on disk are read together.

        Raise UnanswerableError for a block that the filesystem does not have.
        """
        rows = np.empty((blocks.size, self.layout.block_size), np.uint8)
        if not blocks.size:
            return rows
        places = self.relocation.places(blocks) if self.relocation else blocks
        if int(places.min()) < 0 or int(places.max()) >= self.layout.blocks:
            raise UnanswerableError("metadata lies outside the filesystem")
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), blocks.size], strict=True):
            self.layer.read_into(int(places[first]) * self.layout.block_size, rows[first:last].reshape(-1).data)
        if self.relocation:
            self.relocation.mend(blocks, rows)
        return rows

    def superblock(self) -> bytes:
        """Return the superblock's 1,024 bytes."""
        block, offset = divmod(SUPERBLOCK_OFFSET, self.layout.block_size)
        return self.read(np.array([block]))[0, offset : offset + SUPERBLOCK_SIZE].tobytes()


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
