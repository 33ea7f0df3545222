"""The blocks in use of real ext2, ext3 and ext4 filesystems, of every feature that mke2fs knows."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from conftest import Attach, Mount
from used_ext4_support import (
    MIB,
    assert_as_dumpe2fs,
    churn,
    files_by_debugfs,
    make_image,
    restore_used,
    run,
    tree_state,
    used,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of making a filesystem: mke2fs's options, and what is done to it afterwards."""

    name: str
    options: str
    size: int = 48 * MIB
    blocks: str = ""
    after: tuple[str, ...] = ()
    """Commands; `IMAGE` stands for the image."""
    mountable: bool = True


VARIANTS = [
    Variant("ext2", "-t ext2"),
    Variant(
        "ext2 of revision 0",
        "-t ext2 -O none -I 128",
        after=("debugfs -w -R |ssv rev_level 0| IMAGE", "e2fsck -fy IMAGE"),
    ),
    Variant("ext2 of 1 KiB blocks", "-t ext2 -b 1024"),
    Variant("ext3", "-t ext3"),
    Variant("ext3 of 1 KiB blocks", "-t ext3 -b 1024"),
    Variant("ext4", "-t ext4"),
    Variant("1 KiB blocks", "-t ext4 -b 1024"),
    Variant("2 KiB blocks", "-t ext4 -b 2048"),
    Variant("64 KiB blocks", "-t ext4 -b 65536", size=160 * MIB, mountable=False),
    Variant("64 KiB blocks, descriptors of 32 bytes", "-t ext4 -b 65536 -O ^64bit", size=160 * MIB, mountable=False),
    Variant("many groups", "-t ext4 -b 4096 -g 512"),
    Variant("groups of an odd size", "-t ext4 -b 4096 -g 1000"),
    Variant("groups of the smallest size", "-t ext4 -b 4096 -g 256 -O ^resize_inode"),
    Variant("no flex_bg", "-t ext4 -b 4096 -g 1024 -O ^flex_bg"),
    Variant("flex_bg of four", "-t ext4 -b 4096 -g 512 -G 4"),
    Variant("flex_bg of 1024", "-t ext4 -b 1024 -g 1024 -G 1024"),
    Variant("packed metadata", "-t ext4 -b 4096 -g 1024 -E packed_meta_blocks=1"),
    Variant("meta_bg", "-t ext4 -b 1024 -g 512 -O meta_bg,^resize_inode"),
    Variant("meta_bg without flex_bg", "-t ext4 -b 1024 -g 512 -O meta_bg,^resize_inode,^flex_bg"),
    Variant("meta_bg, no checksums", "-t ext4 -b 1024 -g 512 -O meta_bg,^resize_inode,^metadata_csum"),
    Variant("meta_bg, every superblock", "-t ext4 -b 1024 -g 512 -O meta_bg,^resize_inode,^sparse_super"),
    Variant("bigalloc", "-t ext4 -O bigalloc -C 16384"),
    Variant("bigalloc, 64 KiB clusters, many groups", "-t ext4 -O bigalloc -C 65536 -g 256", size=96 * MIB),
    Variant("bigalloc of 1 KiB blocks", "-t ext4 -b 1024 -O bigalloc -C 8192 -g 512"),
    Variant("bigalloc without flex_bg", "-t ext4 -O bigalloc,^flex_bg -C 32768 -g 256", size=96 * MIB),
    Variant("bigalloc without checksums", "-t ext4 -O bigalloc,^metadata_csum,uninit_bg -C 16384 -g 256"),
    Variant("uninit_bg", "-t ext4 -O ^metadata_csum,uninit_bg -g 1024"),
    Variant("uninit_bg, descriptors of 32 bytes", "-t ext4 -O ^metadata_csum,^64bit,uninit_bg -g 1024"),
    Variant("no checksums", "-t ext4 -O ^metadata_csum,^uninit_bg -g 1024"),
    Variant("metadata_csum, descriptors of 32 bytes", "-t ext4 -O ^64bit -g 1024"),
    Variant("metadata_csum_seed, new uuid", "-t ext4 -O metadata_csum_seed", after=("tune2fs -U random IMAGE",)),
    Variant("every superblock", "-t ext4 -O ^sparse_super,^resize_inode -g 1024"),
    Variant("sparse_super2", "-t ext4 -O sparse_super2,^resize_inode -g 4096 -G 2", size=96 * MIB),
    Variant("sparse_super2, no backup", "-t ext4 -O sparse_super2,^resize_inode -g 1024 -E num_backup_sb=0"),
    Variant("sparse_super2, one backup", "-t ext4 -O sparse_super2 -g 1024 -E num_backup_sb=1"),
    Variant("no resize_inode", "-t ext4 -O ^resize_inode -g 1024"),
    Variant("room to grow", "-t ext4 -g 2048 -E resize=64000000"),
    Variant("inline_data", "-t ext4 -O inline_data -I 256"),
    Variant("inodes of 128 bytes", "-t ext4 -I 128"),
    Variant("inodes of 1 KiB", "-t ext4 -I 1024"),
    Variant(
        "quota and project",
        "-t ext4 -O quota,project -E quotatype=usrquota:grpquota:prjquota",
        # mke2fs does not count what it copies.
        after=("e2fsck -fy IMAGE",),
    ),
    Variant("mmp", "-t ext4 -O mmp -g 1024"),
    Variant("casefold", "-t ext4 -O casefold", mountable=False),
    Variant("encrypt", "-t ext4 -O encrypt"),
    Variant("verity", "-t ext4 -O verity"),
    Variant("large_dir and ea_inode", "-t ext4 -O large_dir,ea_inode"),
    Variant("no extents", "-t ext4 -O ^extents,^64bit"),
    Variant("no extents, 1 KiB blocks", "-t ext4 -b 1024 -O ^extents,^64bit -J size=16"),
    Variant("none of the small ones", "-t ext4 -O ^huge_file,^dir_nlink,^extra_isize,^metadata_csum,^large_file"),
    Variant("orphan_file", "-t ext4 -O orphan_file"),
    Variant("stable_inodes", "-t ext4 -O stable_inodes"),
    Variant("fast_commit", "-t ext4 -O fast_commit"),
    Variant("no journal", "-t ext4 -O ^has_journal"),
    Variant("large journal", "-t ext4 -J size=40", size=96 * MIB),
    Variant(
        "shared_blocks",
        "-t ext4 -O ^has_journal",
        after=("debugfs -w -R |feature shared_blocks| IMAGE",),
        mountable=False,
    ),
    Variant("inode tables left as they were", "-t ext4 -g 1024 -E lazy_itable_init=1"),
    Variant("for a RAID", "-t ext4 -g 2048 -E stride=16,stripe-width=64"),
    Variant("smaller than its volume", "-t ext4", blocks="10000"),
    Variant("ending within a group", "-t ext4 -b 1024 -g 1024", size=48 * MIB - 5 * 1024),
    Variant("volume of no whole block", "-t ext4 -b 4096", size=48 * MIB + 1536),
    Variant("grown", "-t ext4 -g 1024", blocks="10000", after=("resize2fs IMAGE",)),
    Variant("grown, meta_bg", "-t ext4 -g 1024 -O meta_bg,^resize_inode", blocks="10000", after=("resize2fs IMAGE",)),
    Variant("shrunk", "-t ext4 -g 1024", after=("e2fsck -fy IMAGE", "resize2fs -M IMAGE")),
    Variant("made 64bit", "-t ext4 -g 1024 -O ^64bit", after=("resize2fs -b IMAGE",)),
    Variant(
        "ext3 made ext4",
        "-t ext3",
        after=("tune2fs -O extents,uninit_bg,dir_index,flex_bg IMAGE", "e2fsck -fyD IMAGE"),
    ),
    Variant(
        "checksums added",
        "-t ext4 -O ^metadata_csum",
        # tune2fs gives no checksums to the orphan file, which mke2fs makes by default from 1.47.1 on.
        after=("tune2fs -O metadata_csum IMAGE", "e2fsck -fy IMAGE"),
    ),
    # tune2fs would leave the orphan file, which is nothing without a journal.
    Variant("journal removed", "-t ext4", after=("tune2fs -O ^orphan_file,^has_journal IMAGE",)),
    Variant("journal added", "-t ext2", after=("tune2fs -j IMAGE",)),
]  # fmt: skip


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    chosen: Variant = request.param
    return chosen


@pytest.fixture
def image(variant: Variant, tree: Path, tmp_path: Path) -> Path:
    options = variant.options if " -b " in variant.options else f"{variant.options} -b 4096"
    path = make_image(tmp_path / "image", options, variant.size, tree, blocks=variant.blocks)
    for line in variant.after:
        # Words between bars are one.
        words = [
            word for index, piece in enumerate(line.split("|")) for word in ([piece] if index % 2 else piece.split())
        ]
        # e2fsck says 1 when it has mended something.
        run(*(path if word == "IMAGE" else word for word in words), codes=(0, 1))
    return path


@pytest.mark.root
def test_a_restore_of_the_used_blocks_alone_is_the_whole_filesystem(
    variant: Variant, image: Path, tmp_path: Path, mount: Mount
) -> None:
    extents = used(image)
    assert_as_dumpe2fs(extents, image)
    restored = restore_used(image, extents, tmp_path / "restored")
    run("e2fsck", "-fn", restored)
    if variant.mountable:
        there, here = (tree_state(mount(each, "loop", "ro")) for each in (image, restored))
    else:
        there, here = (files_by_debugfs(each, tmp_path / "out") for each in (image, restored))
    assert len(here) > 500
    assert here == there


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [
        "-t ext2 -b 1024",
        "-t ext3 -b 4096 -g 1024",
        "-t ext4 -b 1024 -g 1024",
        "-t ext4 -b 4096 -g 512 -O ^flex_bg",
        "-t ext4 -O bigalloc -C 16384 -g 256",
        "-t ext4 -O ^metadata_csum,uninit_bg -b 4096 -g 1024",
        "-t ext4 -O ea_inode,inline_data -I 256 -b 1024",
    ],
)
def test_a_used_and_fragmented_filesystem_is_restored_by_its_used_blocks(
    options: str, tmp_path: Path, mount: Mount
) -> None:
    image = make_image(tmp_path / "image", options, 64 * MIB, None)
    place = mount(image, "loop")
    churn(place, seed=1, rounds=250)
    if "ea_inode" in options:
        os.setxattr(place / "churn", "user.large", os.urandom(20_000).hex().encode())
    there = tree_state(place)
    run("umount", place)
    extents = used(image)
    assert_as_dumpe2fs(extents, image)
    restored = restore_used(image, extents, tmp_path / "restored")
    run("e2fsck", "-fn", restored)
    assert tree_state(mount(restored, "loop", "ro")) == there


@pytest.mark.root
def test_a_filesystem_grown_while_mounted_is_answered_for(tmp_path: Path, mount: Mount, attach: Attach) -> None:
    image = make_image(tmp_path / "image", "-t ext4 -b 1024", 96 * MIB, None, blocks="20000")
    device = attach(image)
    place = mount(device)
    churn(place, seed=2)
    if "Permission denied" in run("resize2fs", device, codes=(0, 1)):
        pytest.skip("resizing a mounted filesystem needs CAP_SYS_RESOURCE: run outside of a container")
    churn(place, seed=3)
    run("umount", place)
    assert_as_dumpe2fs(used(image), image)
