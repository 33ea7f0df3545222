"""The superblock of ext2, ext3 and ext4, and what follows from it: where the filesystem keeps what.

From the kernel's Documentation/filesystems/ext4: super.rst, blockgroup.rst, bigalloc.rst and checksums.rst. All
numbers are little endian. What is read is untrusted: each number is checked against the others before anything is
allocated or read by it, and UnanswerableError says what was wrong.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct

import numpy as np
import numpy.typing as npt

from blockferry.extents import Offsets
from blockferry.layers import Layer
from blockferry.used.checksum import crc32c

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
    shares_blocks: bool
    """Files may have blocks in common, which nothing else tells."""


class _Fields:
    """The numbers at their offsets in a superblock."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.raw, offset)[0])

    def u32(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.raw, offset)[0])


def raw_superblock(layer: Layer) -> bytes:
    """Return the 1,024 bytes where a superblock would be; nothing if the volume is too small for one."""
    if layer.size < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE:
        return b""
    raw = bytearray(SUPERBLOCK_SIZE)
    layer.read_into(SUPERBLOCK_OFFSET, memoryview(raw))
    return bytes(raw)


def has_magic(raw: bytes) -> bool:
    """Tell whether what `raw_superblock` returned is one."""
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
        shares_blocks=RoCompat.SHARED_BLOCKS in ro_compat,
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
