"""Which blocks an inode's file lies in: what is needed to read the journal, a hidden ordinary file.

From the kernel's Documentation/filesystems/ext4: inodes.rst, ifork.rst (extent trees), blockmap.rst (the older
indirect blocks) and checksums.rst.
"""

from __future__ import annotations

import struct

import numpy as np

from blockferry.extents import Offsets
from blockferry.used.checksum import crc32c
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.groups import read_descriptors
from blockferry.used.ext4.superblock import Checksums, Layout, UnanswerableError

_EXTENTS_FLAG = 0x80000
_EXTENT_MAGIC = 0xF30A
_DEEPEST = 5
_LONGEST = 32768  # a longer extent is one that was allocated and never written
_MOST_BLOCKS = 10 << 20  # JBD2_MAX_JOURNAL_BLOCKS of e2fsprogs, rounded up


class JournalFile:
    """A file without holes: `blocks[i]` is the filesystem's block that holds the file's block `i`."""

    def __init__(self, reader: BlockReader, number: int) -> None:
        """Read inode `number`; raise UnanswerableError if it is damaged, not a plain file, or has holes."""
        self.reader = reader
        self.layout = reader.layout
        inode = _read_inode(reader, number)
        mode, links = struct.unpack_from("<H", inode, 0x0)[0], struct.unpack_from("<H", inode, 0x1A)[0]
        size = struct.unpack_from("<I", inode, 0x4)[0] | struct.unpack_from("<I", inode, 0x6C)[0] << 32
        length = size // self.layout.block_size
        if mode & 0xF000 != 0x8000 or not links or not 0 < length <= min(_MOST_BLOCKS, self.layout.blocks):
            raise UnanswerableError("the journal's inode is not that of a journal")
        self.seed = _inode_seed(self.layout, number, inode)
        root = inode[0x28:0x64]
        if struct.unpack_from("<I", inode, 0x20)[0] & _EXTENTS_FLAG:
            self.blocks = self._extents(root, length)
        else:
            self.blocks = self._indirect(root, length)

    def _extents(self, root: bytes, length: int) -> Offsets:
        """Walk an extent tree from left to right; each leaf must begin where the one before ended."""
        blocks = np.empty(length, np.int64)
        filled = 0
        nodes = [(root, _DEEPEST + 1)]
        while nodes:
            node, above = nodes.pop()
            magic, entries, most, depth = struct.unpack_from("<4H", node)
            if magic != _EXTENT_MAGIC or not 0 < entries <= most or 12 * (most + 1) > len(node) or depth >= above:
                raise UnanswerableError("the journal's extent tree is damaged")
            if depth:
                pointers = [struct.unpack_from("<4xIH", node, 12 * entry) for entry in range(entries, 0, -1)]
                nodes += [(self._node(low | high << 32), depth) for low, high in pointers]
                continue
            for entry in range(1, entries + 1):
                logical, count, high, low = struct.unpack_from("<IHHI", node, 12 * entry)
                if logical != filled or not 0 < count <= _LONGEST or filled + count > length:
                    raise UnanswerableError("the journal has holes")
                blocks[filled : filled + count] = np.arange(count) + (low | high << 32)
                filled += count
        if filled != length:
            raise UnanswerableError("the journal has holes")
        return blocks

    def _node(self, block: int) -> bytes:
        """Return a block of the extent tree, whose checksum lies behind the room for its entries."""
        node: bytes = self.reader.read(np.array([block]))[0].tobytes()
        if self.layout.checksums is Checksums.CRC32C:
            tail = 12 * (struct.unpack_from("<H", node, 4)[0] + 1)
            if tail + 4 > len(node) or crc32c().of(node[:tail], self.seed) != struct.unpack_from("<I", node, tail)[0]:
                raise UnanswerableError("the checksum of the journal's extent tree is wrong")
        return node

    def _indirect(self, root: bytes, length: int) -> Offsets:
        """Follow 12 direct pointers, then one each to blocks of pointers one, two and three levels deep."""
        pointers = np.frombuffer(root, "<u4").astype(np.int64)
        per_block = self.layout.block_size // 4
        found = [pointers[: min(length, 12)]]
        left = length - found[0].size
        for level in (1, 2, 3):
            wanted = min(left, per_block**level)
            below = pointers[11 + level : 12 + level]
            for depth in range(level - 1, -1, -1):
                needed = -(-wanted // per_block ** (depth + 1))
                _require_mapped(below[:needed])
                below = self.reader.read(below[:needed]).view("<u4").reshape(-1).astype(np.int64)
            found.append(below[:wanted])
            left -= wanted
        if left:
            raise UnanswerableError("the journal's inode is not that of a journal")
        blocks = np.concatenate(found)
        _require_mapped(blocks)
        return blocks


def _require_mapped(pointers: Offsets) -> None:
    """Raise UnanswerableError for a pointer of 0, which stands for a hole."""
    if not pointers.all():
        raise UnanswerableError("the journal has holes")


def _read_inode(reader: BlockReader, number: int) -> bytes:
    """Return an inode as it lies in its group's table, its checksum verified."""
    layout = reader.layout
    if not 0 < number <= layout.groups * layout.inodes_per_group:
        raise UnanswerableError("the journal's inode does not exist")
    group, index = divmod(number - 1, layout.inodes_per_group)
    table = int(read_descriptors(reader, group, group + 1).inode_table[0])
    block, offset = divmod(index * layout.inode_size, layout.block_size)
    inode: bytes = reader.read(np.array([table + block]))[0, offset : offset + layout.inode_size].tobytes()
    if layout.checksums is Checksums.CRC32C and not _inode_is_sound(layout, number, inode):
        raise UnanswerableError("the checksum of the journal's inode is wrong")
    return inode


def _inode_seed(layout: Layout, number: int, inode: bytes) -> int:
    """Return what the checksums of an inode and of its extent tree begin with: its number and generation."""
    return crc32c().of(struct.pack("<I", number) + inode[0x64:0x68], layout.checksum_seed)


def _inode_is_sound(layout: Layout, number: int, inode: bytes) -> bool:
    """Tell whether an inode's checksum is right: 16 bits, or 32 where the inode has room for the upper ones."""
    summed = bytearray(inode)
    summed[0x7C:0x7E] = bytes(2)
    stored, mask = struct.unpack_from("<H", inode, 0x7C)[0], 0xFFFF
    if layout.inode_size > 128 and struct.unpack_from("<H", inode, 0x80)[0] >= 4:
        summed[0x82:0x84] = bytes(2)
        stored, mask = stored | struct.unpack_from("<H", inode, 0x82)[0] << 16, 0xFFFFFFFF
    return crc32c().of(bytes(summed), _inode_seed(layout, number, inode)) & mask == int(stored)
