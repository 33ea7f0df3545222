"""What of ext2, ext3 and ext4 is not answered for: unknown features, damage, filesystems in use."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.used.checksum import crc32c
from blockferry.used.ext4 import reader as ext4
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.groups import read_descriptors
from blockferry.used.ext4.superblock import UnanswerableError, parse_superblock, raw_superblock
from blockferry.volume import Volume
from conftest import Mount
from used_ext4_support import (
    CHECKED,
    MIB,
    PLAIN,
    assert_as_dumpe2fs,
    churn,
    make_image,
    reason_declined,
    run,
    used,
    with_a_flipped_bit,
)


def test_other_content_is_not_declined_but_not_ours(tmp_path: Path) -> None:
    for name, content in (
        ("zeros", bytes(MIB)),
        ("noise", os.urandom(MIB)),
        ("tiny", b"\x53\xef"),
        ("odd", bytes(1100)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert ext4.blockferry_used_extents(Volume.discover(path), pytest.fail) is None


@pytest.mark.root
def test_a_filesystem_mounted_for_writing_is_declined_until_it_is_read_only(tmp_path: Path, mount: Mount) -> None:
    image = make_image(tmp_path / "image", "-t ext4", 16 * MIB, None)
    place = mount(image, "loop")
    assert "mounted for writing" in reason_declined(image)
    churn(place, seed=1)
    run("mount", "-o", "remount,ro", place)
    assert_as_dumpe2fs(used(image), image)


@pytest.mark.parametrize(
    ("command", "reason", "options"),
    [
        ("ssv state 2", "marked as having errors", CHECKED),
        ("ssv state 0", "not unmounted cleanly", CHECKED),
        ("ssv rev_level 2", "revision 2", CHECKED),
        ("feature FEATURE_C30", "unknown compat feature flags 0x40000000", CHECKED),
        ("feature FEATURE_I30", "unknown incompat feature flags 0x40000000", CHECKED),
        ("feature FEATURE_R30", "unknown ro_compat feature flags 0x40000000", CHECKED),
        ("feature dirdata", "unknown incompat feature flags 0x1000", CHECKED),
        ("ssv blocks_count 20000000", "damaged superblock", CHECKED),
        ("ssv log_block_size 9", "impossible block size", CHECKED),
        ("ssv blocks_per_group 0", "impossible block groups", CHECKED),
        ("ssv inodes_per_group 0", "impossible block groups", CHECKED),
        ("ssv inode_size 100", "size of inodes", CHECKED),
        ("ssv desc_size 40", "size of group descriptors", CHECKED),
        ("ssv journal_inum 20", "checksum of the journal's inode", CHECKED),
        ("ssv journal_inum 20", "not that of a journal", PLAIN),
        ("ssv journal_inum 4000000000", "does not exist", CHECKED),
        ("clri <8>", "not that of a journal", PLAIN),
        ("set_bg 1 block_bitmap 4000000000", "block bitmap lies outside", PLAIN),
        ("set_bg 1 inode_table 16380", "inode table lies outside", PLAIN),
        ("set_bg 1 free_blocks_count 7", "block bitmap is damaged", PLAIN),
        ("set_bg 1 free_blocks_count 7", "group 1: the descriptor's checksum is wrong", CHECKED),
    ],
)
def test_what_is_not_known_or_damaged_is_declined_with_the_reason(
    command: str, reason: str, options: str, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "image", options, 16 * MIB, None)
    run("debugfs", "-w", "-R", command, image)
    assert reason in reason_declined(image)


def test_a_volume_that_lost_its_end_is_declined(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "-t ext4", 16 * MIB, None)
    os.truncate(image, 10 * MIB)
    assert "the volume only" in reason_declined(image)


@pytest.mark.parametrize(
    ("options", "all_covered"),
    [
        ("-t ext4 -b 1024 -g 1024", True),
        ("-t ext4 -b 4096 -O bigalloc -C 16384 -g 256", True),
        ("-t ext4 -b 1024 -g 1024 -O ^metadata_csum,uninit_bg", False),
        ("-t ext3 -b 1024", False),
        ("-t ext2 -b 4096", False),
    ],
)
def test_damaged_metadata_never_costs_a_block_nor_raises(
    options: str, all_covered: bool, tree: Path, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "image", options, 64 * MIB, tree)
    volume, whole = Volume.discover(image), used(image)
    with volume.open() as layer:
        layout = parse_superblock(raw_superblock(layer), layer.size).layout
        descriptors = read_descriptors(BlockReader(layer, layout), 0, layout.groups)
    tables = layout.descriptor_locations(np.arange(layout.descriptor_blocks))
    noise = random.Random(8)
    places = [
        lambda: 1024 + noise.randrange(1024),
        lambda: int(noise.choice(tables)) * layout.block_size + noise.randrange(layout.block_size),
        lambda: int(noise.choice(descriptors.block_bitmap)) * layout.block_size + noise.randrange(layout.block_size),
        lambda: (int(descriptors.inode_table[0]) * layout.block_size) + 7 * layout.inode_size + noise.randrange(128),
    ]
    declined = 0
    with open(image, "r+b") as file:
        for _ in range(200):
            offset = noise.choice(places)()
            answer, _ = with_a_flipped_bit(file, volume, offset, noise.randrange(8))
            declined += answer is None
            if answer is not None:
                missing = whole.difference(answer)
                assert not missing or not all_covered, (offset, missing)
                assert answer.end <= volume.size
    assert declined > 30
    assert used(image) == whole


def test_a_bitmap_with_as_many_bits_but_others_is_declined(tree: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", CHECKED, 48 * MIB, tree)
    assert used(image)
    with Volume.discover(image).open() as layer:
        layout = parse_superblock(raw_superblock(layer), layer.size).layout
        reader = BlockReader(layer, layout)
        blocks = read_descriptors(reader, 0, layout.groups).of_initialised().block_bitmap
        bitmaps = reader.read(blocks)[:, : layout.clusters_per_group // 8]
    mirrored = np.packbits(np.unpackbits(bitmaps, axis=1), axis=1, bitorder="little")
    group, index = np.argwhere(mirrored != bitmaps)[0]
    with open(image, "r+b") as file:
        os.pwrite(file.fileno(), mirrored[group, index].tobytes(), int(blocks[group]) * layout.block_size + int(index))
    assert "block bitmap is damaged" in reason_declined(image)


@pytest.fixture(scope="module")
def superblock(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    image = make_image(tmp_path_factory.mktemp("superblock") / "image", "-t ext4 -b 1024 -O bigalloc", 16 * MIB, None)
    return image.read_bytes()[1024:2048]


@settings(deadline=None)
@given(words=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1)), max_size=6))
def test_a_superblock_of_any_numbers_is_answered_for_or_declined(
    superblock: bytes, words: list[tuple[int, int]]
) -> None:
    changed = np.frombuffer(superblock, "<u4").copy()
    for index, value in words:
        changed[index] = value
    raw = changed.tobytes()[:1020]
    try:
        layout = parse_superblock(raw + crc32c().of(raw).to_bytes(4, "little"), 1 << 50).layout
    except UnanswerableError:
        return
    assert 0 < layout.bytes <= 1 << 50
    assert 0 < layout.clusters_per_group <= layout.block_size * 8
