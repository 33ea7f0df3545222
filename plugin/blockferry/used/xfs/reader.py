"""Used blocks of an XFS filesystem that is not mounted for writing.

XFS divides a volume into allocation groups of equal size. Sector 1 of each, the AGF, names the root of a btree of its
free extents, sorted by block number. Whatever is in no such btree is in use: what is free but kept in the short list
from which the btrees themselves grow (AGFL) is in none, and counts as in use. All trees are walked at once, level by
level: the blocks of a level are read in batches and checked and parsed as arrays. A block is taken only if it says
that it is what its parent took it for, its level is one less than its parent's, its neighbours are its siblings and,
in version 5, its address, owner, UUID and CRC are right; so no walk goes in circles. The extents must ascend without
touching and add up to the figures in the AGF. Version 4 has no CRCs: there the second btree, sorted by size, must
hold the very same extents.

The btrees are the truth only if nothing in the log is newer: `blockferry.used.xfs.log` decides that. A log on another
device cannot be seen from here, so there is no answer then; nor for a realtime section, which is on another device,
nor for a filesystem that is mounted for writing: only the kernel can answer for that.

Format: "XFS Algorithms & Data Structures" (xfs.org, xfs-documentation), chapters "Allocation Groups" and "AG Free
Space B+trees"; the feature flags: Linux, fs/xfs/libxfs/xfs_format.h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blockferry.extents import ExtentSet, Offsets
from blockferry.hookspecs import Declined, UsedBlocks, hookimpl
from blockferry.layers import Layer
from blockferry.used.checksum import crc32c
from blockferry.used.xfs.log import LogPlace, XfsError, check_replayed, check_unmounted
from blockferry.volume import Volume

_BATCH = 4 << 20
_NONE = 0xFFFFFFFF
"""The block number that stands for no block."""
_SUPERBLOCK_SIZE = 512

_SUPERBLOCK = np.dtype(
    {
        "names": [
            *("magic", "block_size", "blocks", "realtime_blocks", "realtime_extents", "uuid", "log_start"),
            *("ag_blocks", "ag_count", "log_blocks", "version", "sector_size", "block_log", "ag_block_log"),
            *("in_progress", "features2", "bad_features2", "compat", "ro_compat", "incompat", "log_incompat"),
            *("meta_uuid",),
        ],
        "formats": [
            *(">u4", ">u4", ">u8", ">u8", ">u8", "V16", ">u8"),
            *(">u4", ">u4", ">u4", ">u2", ">u2", "u1", "u1"),
            *("u1", ">u4", ">u4", ">u4", ">u4", ">u4", ">u4"),
            *("V16",),
        ],
        "offsets": [0, 4, 8, 16, 24, 32, 48, 84, 88, 96, 100, 102, 120, 124, 126, 200, 204, 208, 212, 216, 220, 248],
        "itemsize": _SUPERBLOCK_SIZE,
    }
)
_SUPERBLOCK_CRC = 224

_AGF = np.dtype(
    {
        "names": [
            *("magic", "version", "number", "length", "by_block_root", "by_size_root"),
            *("by_block_levels", "by_size_levels", "free", "longest", "uuid"),
        ],
        "formats": [*(">u4",) * 10, "V16"],
        "offsets": [0, 4, 8, 12, 16, 20, 28, 32, 52, 56, 64],
        "itemsize": 512,
    }
)
_AGF_MAGIC = 0x58414746
_AGF_CRC = 216
_MOST_LEVELS = 9

_NODE = np.dtype(
    {
        "names": ["magic", "level", "records", "left", "right", "address", "uuid", "owner"],
        "formats": [">u4", ">u2", ">u2", ">u4", ">u4", ">u8", "V16", ">u4"],
        "offsets": [0, 4, 6, 8, 12, 16, 32, 48],
        "itemsize": 56,
    }
)
_NODE_CRC = 52

# Version 4: all bits of the version word but "shared", of which nothing is known, and the second word's known ones.
_SHARED, _MORE_BITS, _LOG_2 = 0x0200, 0x8000, 0x0400
_KNOWN_FEATURES2 = 0x0002 | 0x0008 | 0x0080 | 0x0200
"""Lazy superblock counters, attr2, 32-bit project ids, file types in directories."""
# Version 5. None of these changes what the free space btrees mean.
_KNOWN_RO_COMPAT = 0x1 | 0x2 | 0x4 | 0x8
"""Free inode btree, reverse mapping btree, reflink, inode block counters."""
_KNOWN_INCOMPAT = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100
"""File types, sparse inodes, metadata UUID, bigtime, 64-bit extent counts, exchange of ranges, parent pointers,
metadata directory (with a realtime section or without: that is seen by its size)."""
_NEEDS_REPAIR, _META_UUID = 0x10, 0x4
_KNOWN_LOG_INCOMPAT = 0x1
"""Logged extended attributes: what kinds of item a log may hold, which the log itself shows."""


@dataclasses.dataclass(frozen=True)
class _Filesystem:
    """What the superblock says; sizes in bytes where the name says so, else in filesystem blocks."""

    block_size: int
    sector_size: int
    blocks: int
    ag_blocks: int
    ag_count: int
    has_crc: bool
    node_uuid: bytes
    """The UUID that version 5 puts into each block of metadata."""
    log: LogPlace

    @property
    def ag_lengths(self) -> Offsets:
        """The blocks of each allocation group: the last one may be shorter."""
        lengths = np.full(self.ag_count, self.ag_blocks, np.int64)
        lengths[-1] = self.blocks - (self.ag_count - 1) * self.ag_blocks
        return lengths

    @property
    def ag_header_blocks(self) -> int:
        """The blocks at a group's start that the superblock's copy, AGF, AGI and AGFL take: four sectors."""
        return -(-4 * self.sector_size // self.block_size)


@dataclasses.dataclass(frozen=True)
class _Tree:
    """One of the two free space btrees: its blocks' magic numbers and its root's field in the AGF."""

    magic: int
    magic_crc: int
    field: str


_BY_BLOCK = _Tree(0x41425442, 0x41423342, "by_block")
_BY_SIZE = _Tree(0x41425443, 0x41423343, "by_size")


@dataclasses.dataclass(frozen=True)
class _Records:
    """Free extents: the group, first block in the group and length of each."""

    group: Offsets
    start: Offsets
    length: Offsets


_RECORD_FIELDS = tuple(field.name for field in dataclasses.fields(_Records))


@dataclasses.dataclass(frozen=True)
class _Level:
    """The blocks of one level of the trees of all groups, in the trees' order; leaves are level 0."""

    level: int
    group: Offsets
    block: Offsets


@hookimpl
def blockferry_used_extents(volume: Volume, declined: Declined) -> UsedBlocks | None:
    """Answer for XFS, version 4 or 5, whose log needs no recovery: everything but what its free space btrees hold."""
    if volume.filesystem != "xfs":
        return None
    if any(not mount.read_only for mount in volume.mounts()):
        declined("xfs: it is mounted for writing: only the kernel can answer for it")
        return None
    with volume.open_data() as layer:
        try:
            free = _free_extents(layer)
        except XfsError as error:
            declined(f"xfs: {error}")
            return None
    return UsedBlocks(free.complement(volume.size), "xfs btrees")


def check_clean(layer: Layer) -> None:
    """Raise XfsError unless the filesystem was unmounted, and nothing about it is damaged or not known here."""
    check_unmounted(layer, _read_superblock(layer).log)


def _free_extents(layer: Layer) -> ExtentSet:
    """Return the free bytes of the filesystem; raise XfsError if it cannot be answered for."""
    filesystem = _read_superblock(layer)
    check_replayed(layer, filesystem.log)
    agfs = _read_agfs(layer, filesystem)
    records = _walk(layer, filesystem, agfs, _BY_BLOCK)
    _check_records(filesystem, agfs, records)
    if not filesystem.has_crc:
        _check_same(records, _walk(layer, filesystem, agfs, _BY_SIZE))
    starts = (records.group * filesystem.ag_blocks + records.start) * filesystem.block_size
    free = ExtentSet.from_ranges(starts, starts + records.length * filesystem.block_size)
    if free.clip(filesystem.log.offset, filesystem.log.offset + filesystem.log.size):
        raise XfsError("it is damaged: its log counts as free space")
    return free


# -- superblock and allocation groups ----------------------------------------------------------------------------------


def _read_superblock(layer: Layer) -> _Filesystem:
    """Return what the superblock says, checked against itself and the volume's size."""
    if layer.size < 1 << 16:
        raise XfsError("it is damaged: the volume is smaller than any XFS")
    raw = _read(layer, np.zeros(1, np.int64), 1 << 15)
    fields = raw[:, :_SUPERBLOCK_SIZE].reshape(-1).view(_SUPERBLOCK)[0]
    values = {name: int(fields[name]) for name in _SUPERBLOCK.names or () if "uuid" not in name}
    version = values["version"] & 0xF
    block_size, sector_size = values["block_size"], values["sector_size"]
    if values["magic"] != 0x58465342 or version not in (4, 5):
        raise XfsError("its superblock is of no known version")
    if sector_size not in _powers(9, 15) or block_size not in _powers(9, 16) or 1 << values["block_log"] != block_size:
        raise XfsError("its superblock is damaged: impossible sizes")
    if version == 5 and not _crc_matches(raw[:, :sector_size], _SUPERBLOCK_CRC)[0]:
        raise XfsError("its superblock fails its checksum")
    _check_features(values, version)
    _check_geometry(values, layer.size)
    uuid = bytes(fields["uuid"])
    return _Filesystem(
        block_size=block_size,
        sector_size=sector_size,
        blocks=values["blocks"],
        ag_blocks=values["ag_blocks"],
        ag_count=values["ag_count"],
        has_crc=version == 5,
        node_uuid=bytes(fields["meta_uuid"]) if version == 5 and values["incompat"] & _META_UUID else uuid,
        log=_log_place(values, uuid, version),
    )


def _check_features(values: dict[str, int], version: int) -> None:
    """Raise XfsError if there is any feature flag that is not known here."""
    if values["in_progress"]:
        raise XfsError("mkfs has not finished it")
    unknown = {"version": values["version"] & _SHARED}
    if version == 4:
        more = values["features2"] | values["bad_features2"] if values["version"] & _MORE_BITS else 0
        unknown["features2"] = more & ~_KNOWN_FEATURES2
    else:
        unknown["compat"] = values["compat"]
        unknown["ro_compat"] = values["ro_compat"] & ~_KNOWN_RO_COMPAT
        unknown["incompat"] = values["incompat"] & ~_KNOWN_INCOMPAT & ~_NEEDS_REPAIR
        unknown["log_incompat"] = values["log_incompat"] & ~_KNOWN_LOG_INCOMPAT
        if values["incompat"] & _NEEDS_REPAIR:
            raise XfsError("it is marked as in need of xfs_repair")
    named = ", ".join(f"{name} {bits:#x}" for name, bits in unknown.items() if bits)
    if named:
        raise XfsError(f"it has features that are not known here: {named}")
    if values["realtime_blocks"] or values["realtime_extents"]:
        raise XfsError("it has a realtime section")


def _check_geometry(values: dict[str, int], size: int) -> None:
    """Raise XfsError unless the allocation groups fill the filesystem, and the filesystem fits into the volume."""
    blocks, ag_blocks, ag_count = values["blocks"], values["ag_blocks"], values["ag_count"]
    if blocks * values["block_size"] > size:
        raise XfsError(f"it is larger ({blocks * values['block_size']} bytes) than its volume ({size} bytes)")
    # A group has 16 MiB to 1 TiB (XFS_MIN_AG_BYTES, XFS_MAX_AG_BYTES); only the last one may be smaller.
    fits = 1 << 24 <= ag_blocks * values["block_size"] <= 1 << 40 or ag_count == 1
    if not fits or ag_count < 1 or not (ag_count - 1) * ag_blocks < blocks <= ag_count * ag_blocks:
        raise XfsError("its superblock is damaged: impossible allocation groups")
    if values["ag_block_log"] != (ag_blocks - 1).bit_length():
        raise XfsError("its superblock is damaged: impossible allocation groups")


def _log_place(values: dict[str, int], uuid: bytes, version: int) -> LogPlace:
    """Return where the log is; raise XfsError if it is elsewhere or not inside one allocation group."""
    if not values["log_start"]:
        raise XfsError("its log is on another device, so it cannot be seen whether it needs recovery")
    group, start = divmod(values["log_start"], 1 << values["ag_block_log"])
    length = min(values["ag_blocks"], values["blocks"] - group * values["ag_blocks"])
    size = values["log_blocks"] * values["block_size"]
    if group >= values["ag_count"] or start + values["log_blocks"] > length or not 1 << 18 <= size <= 1 << 31:
        raise XfsError("its superblock is damaged: impossible log")
    offset = (group * values["ag_blocks"] + start) * values["block_size"]
    return LogPlace(offset=offset, size=size, uuid=uuid, has_crc=version == 5)


def _read_agfs(layer: Layer, filesystem: _Filesystem) -> npt.NDArray[np.void]:
    """Return the AGF of every allocation group, checked."""
    numbers = np.arange(filesystem.ag_count, dtype=np.int64)
    places = numbers * filesystem.ag_blocks * filesystem.block_size + filesystem.sector_size
    pieces = []
    for raw in _batches(layer, places, filesystem.sector_size):
        if filesystem.has_crc and not _crc_matches(raw, _AGF_CRC).all():
            raise XfsError("it is damaged: an AGF fails its checksum")
        pieces.append(np.ascontiguousarray(raw[:, : _AGF.itemsize]).view(_AGF).reshape(-1))
    agfs = np.concatenate(pieces)
    lengths = filesystem.ag_lengths
    right = (agfs["magic"] == _AGF_MAGIC) & (agfs["version"] == 1)
    right &= (agfs["number"] == numbers) & (agfs["length"] == lengths)
    for tree in (_BY_BLOCK, _BY_SIZE):
        root, levels = agfs[f"{tree.field}_root"], agfs[f"{tree.field}_levels"]
        right &= (root >= filesystem.ag_header_blocks) & (root < lengths) & (levels >= 1) & (levels <= _MOST_LEVELS)
    if filesystem.has_crc:
        right &= agfs["uuid"] == np.void(filesystem.node_uuid)
    if not right.all():
        raise XfsError(f"it is damaged: the AGF of allocation group {int(np.flatnonzero(~right)[0])}")
    return agfs


# -- btrees ------------------------------------------------------------------------------------------------------------


def _walk(layer: Layer, filesystem: _Filesystem, agfs: npt.NDArray[np.void], tree: _Tree) -> _Records:
    """Return the records of the trees of all groups, in the trees' order."""
    depth = agfs[f"{tree.field}_levels"].astype(np.int64)
    roots = agfs[f"{tree.field}_root"].astype(np.int64)
    none = np.empty(0, np.int64)
    below = _Records(none, none, none)
    for level in range(int(depth.max()) - 1, -1, -1):
        # What the level above points at, and the roots of the trees that begin here, in the order of the groups.
        begin = np.flatnonzero(depth == level + 1)
        group = np.concatenate([below.group, begin])
        block = np.concatenate([below.start, roots[begin]])
        order = np.argsort(group, kind="stable")
        pieces = list(_read_level(layer, filesystem, tree, _Level(level, group[order], block[order])))
        below = _Records(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in _RECORD_FIELDS))
    return below


def _read_level(layer: Layer, filesystem: _Filesystem, tree: _Tree, blocks: _Level) -> Iterator[_Records]:
    """Yield, in batches, what the blocks of one level of all trees hold; above level 0, `start` is a child's block."""
    group, block = blocks.group, blocks.block
    outside = (block < filesystem.ag_header_blocks) | (block >= filesystem.ag_lengths[group])
    places = np.sort(group << 32 | block)
    if bool(outside.any()) or bool((places[1:] == places[:-1]).any()):
        raise _damaged_tree()
    # A block's siblings are its neighbours in the level, within the same group.
    alone = group[1:] != group[:-1]
    left = np.concatenate([[_NONE], np.where(alone, _NONE, block[:-1])])
    right = np.concatenate([np.where(alone, _NONE, block[1:]), [_NONE]])
    places = (group * filesystem.ag_blocks + block) * filesystem.block_size
    done = 0
    for raw in _batches(layer, places, filesystem.block_size):
        part = slice(done, done + len(raw))
        done += len(raw)
        nodes = np.ascontiguousarray(raw[:, : _NODE.itemsize]).view(_NODE).reshape(-1)
        fine = (nodes["level"] == blocks.level) & (nodes["left"] == left[part]) & (nodes["right"] == right[part])
        fine &= nodes["magic"] == (tree.magic_crc if filesystem.has_crc else tree.magic)
        if filesystem.has_crc:
            fine &= (nodes["address"] == places[part] // 512) & (nodes["owner"] == group[part])
            fine &= (nodes["uuid"] == np.void(filesystem.node_uuid)) & _crc_matches(raw, _NODE_CRC)
        if not fine.all():
            raise _damaged_tree()
        yield _parse(filesystem, raw, nodes["records"].astype(np.int64), group[part], blocks.level)


def _parse(filesystem: _Filesystem, raw: npt.NDArray[np.uint8], count: Offsets, group: Offsets, level: int) -> _Records:
    """Return the records of leaves, or the children of nodes, which have their keys first and then their pointers."""
    header = 56 if filesystem.has_crc else 16
    record_size, pointer_size = 8, 4 if level else 0
    most = (filesystem.block_size - header) // (record_size + pointer_size)
    if bool((count > most).any()) or (level and bool((count < 1).any())):
        raise _damaged_tree()
    begin, width = (header + most * record_size, 1) if level else (header, 2)
    table = np.ascontiguousarray(raw[:, begin : begin + most * width * 4]).view(">u4").reshape(-1, most, width)
    chosen = np.arange(most) < count[:, None]
    values = table[chosen].astype(np.int64)
    return _Records(np.repeat(group, count), values[:, 0], values[:, -1])


def _check_records(filesystem: _Filesystem, agfs: npt.NDArray[np.void], records: _Records) -> None:
    """Raise XfsError unless the free extents are in order, inside their groups, and add up to what the AGFs say."""
    ends = records.start + records.length
    fine = bool((records.length > 0).all()) and bool((records.start >= filesystem.ag_header_blocks).all())
    fine = fine and bool((ends <= filesystem.ag_lengths[records.group]).all())
    same_group = records.group[1:] == records.group[:-1]
    fine = fine and bool((~same_group | (records.start[1:] > ends[:-1])).all())
    longest = np.zeros(filesystem.ag_count, np.int64)
    np.maximum.at(longest, records.group, records.length)
    total = np.zeros(filesystem.ag_count, np.int64)
    np.add.at(total, records.group, records.length)
    if not fine or not np.array_equal(total, agfs["free"]) or not np.array_equal(longest, agfs["longest"]):
        raise XfsError("it is damaged: its free space does not add up")


def _check_same(records: _Records, by_size: _Records) -> None:
    """Raise XfsError unless both trees hold the same extents."""
    order = np.lexsort((by_size.start, by_size.group))
    pairs = ((records.group, by_size.group), (records.start, by_size.start), (records.length, by_size.length))
    if not all(np.array_equal(mine, other[order]) for mine, other in pairs):
        raise XfsError("it is damaged: its two free space btrees differ")


def _damaged_tree() -> XfsError:
    return XfsError("it is damaged: a block of a free space btree is not what it should be")


# -- bytes -------------------------------------------------------------------------------------------------------------


def _batches(layer: Layer, places: Offsets, size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the blocks of `size` bytes at `places` as rows, a few MiB at a time."""
    step = _BATCH // size
    for begin in range(0, places.size, step):
        yield _read(layer, places[begin : begin + step], size)


def _read(layer: Layer, places: Offsets, size: int) -> npt.NDArray[np.uint8]:
    """Return the `size` bytes at each of the places, a row each."""
    rows = np.empty((places.size, size), np.uint8)
    for row, place in zip(rows, places.tolist(), strict=True):
        layer.read_into(place, row.data)
    return rows


def _crc_matches(raw: npt.NDArray[np.uint8], offset: int) -> npt.NDArray[np.bool_]:
    """Tell for each row whether the CRC at `offset` is that of the row with zeros in its place."""
    stored = np.ascontiguousarray(raw[:, offset : offset + 4]).view("<u4").reshape(-1)
    zeroed = raw.copy()
    zeroed[:, offset : offset + 4] = 0
    return np.asarray(~crc32c().rows(zeroed) == stored)


def _powers(low: int, high: int) -> list[int]:
    return [1 << exponent for exponent in range(low, high + 1)]
