"""The blocks in use of real ext2, ext3 and ext4 filesystems, of every feature that mke2fs knows."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.extents import ExtentSet
from blockferry.used.checksum import crc16, crc32c
from blockferry.used.ext4 import reader as ext4
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.groups import read_descriptors
from blockferry.used.ext4.superblock import Checksums, UnanswerableError, parse_superblock, raw_superblock
from blockferry.volume import Volume
from used_ext4_support import (
    MIB,
    assert_as_dumpe2fs,
    churn,
    files_by_debugfs,
    lose_power,
    make_image,
    plant_tree,
    reason_declined,
    restore_used,
    run,
    tree_state,
    used,
    used_says_dumpe2fs,
)

Attach = Callable[..., str]
Mount = Callable[..., Path]


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
    Variant("ext2 of revision 0", "-t ext2 -r 0 -O none", after=("e2fsck -fy IMAGE",)),
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
    Variant("checksums added", "-t ext4 -O ^metadata_csum", after=("tune2fs -O metadata_csum IMAGE",)),
    Variant("journal removed", "-t ext4", after=("tune2fs -O ^has_journal IMAGE",)),
    Variant("journal added", "-t ext2", after=("tune2fs -j IMAGE",)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_large_is_left(tmp_path: Path) -> Iterator[None]:
    """Remove what a test made, after it has unmounted everything."""
    yield
    for directory, names, files in os.walk(tmp_path):
        names[:] = [name for name in names if not Path(directory, name).is_mount()]
        for name in files:
            Path(directory, name).unlink()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_tree(tmp_path_factory.mktemp("planted") / "tree")


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


# -- journals that have not been replayed ------------------------------------------------------------------------------

CRASHING = {
    "ext4": ("-t ext4 -b 4096 -g 1024", ""),
    "ext3": ("-t ext3 -b 1024", ""),
    "1 KiB blocks": ("-t ext4 -b 1024 -g 1024", ""),
    "a log that has wrapped": ("-t ext4 -b 1024 -J size=1", ""),
    "data in the journal": ("-t ext4 -b 4096 -g 1024 -J size=24", "data=journal"),
    "data in a log that has wrapped": ("-t ext3 -b 1024 -J size=1", "data=journal"),
    "bigalloc": ("-t ext4 -O bigalloc -C 16384 -g 256", ""),
    "uninit_bg": ("-t ext4 -O ^metadata_csum,uninit_bg -b 4096 -g 1024", ""),
    "meta_bg": ("-t ext4 -O meta_bg,^resize_inode -b 1024 -g 512", ""),
    "orphan_file": ("-t ext4 -O orphan_file -b 4096 -g 1024", ""),
    "no extents": ("-t ext4 -O ^extents,^64bit -b 1024", ""),
}


def crashed_image(path: Path, mount: Mount, options: str, mount_options: str) -> Path:
    """Make an image that lost its power while files were written, committed, and deleted while open."""
    image = make_image(path, options, 64 * MIB, None)
    place = mount(image, *filter(None, ["loop", mount_options]))
    churn(place, seed=5, rounds=150)
    run("sync", "-f", place)
    churn(place, seed=6, rounds=100)
    with open(place / "deleted while open", "wb") as orphan:
        orphan.write(os.urandom(3 * MIB))
        os.fsync(orphan.fileno())
        (place / "deleted while open").unlink()
        with open(place / "last", "wb") as last:
            last.write(os.urandom(200_000))
            os.fsync(last.fileno())
        churn(place, seed=8, rounds=20)
        crashed = lose_power(place, image)
    run("umount", place)
    assert "needs_recovery" in run("dumpe2fs", "-h", crashed)
    return crashed


def replayed_copy(image: Path) -> Path:
    """Return a copy with its journal replayed, and no more: e2fsck would free what was deleted while open, too."""
    copy = Path(shutil.copy(image, image.with_name("replayed")))
    run("debugfs", "-w", "-R", "journal_run", copy)
    return copy


def assert_recovers_alike(image: Path, extents: ExtentSet, where: Path, mount: Mount) -> None:
    """Assert that e2fsck, and the kernel, make the same of an image and of a restore of its used blocks."""
    restored = restore_used(image, extents, where / "restored")
    for_kernel = Path(shutil.copy(restored, where / "for the kernel"))
    whole = Path(shutil.copy(image, where / "whole"))
    for each in (whole, restored):
        run("e2fsck", "-fy", each, codes=(0, 1))
        run("e2fsck", "-fn", each)
    there = tree_state(mount(whole, "loop", "ro"))
    assert len(there) > 10
    assert tree_state(mount(restored, "loop", "ro")) == there
    recovered = mount(for_kernel, "loop")
    assert tree_state(recovered) == there
    run("umount", recovered)
    run("e2fsck", "-fn", for_kernel)


@pytest.mark.root
@pytest.mark.parametrize("kind", CRASHING)
def test_a_restore_after_a_crash_recovers_to_the_same_files(kind: str, tmp_path: Path, mount: Mount) -> None:
    for _ in range(5):
        image = crashed_image(tmp_path / "image", mount, *CRASHING[kind])
        before, after = used_says_dumpe2fs(image), used_says_dumpe2fs(replayed_copy(image))
        # If another process called sync(2) at the wrong moment, the journal holds nothing that matters.
        if after.difference(before):
            break
    assert after.difference(before), "this test shows nothing"
    extents = used(image)
    assert not after.difference(extents)
    assert not before.difference(extents)
    assert extents.difference(before.union(after)).total <= 16 * 4096
    assert_recovers_alike(image, extents, tmp_path, mount)


@pytest.mark.root
@pytest.mark.slow
def test_reflink_copies_of_an_image_in_use_recover_to_the_same_files(tmp_path: Path, mount: Mount) -> None:
    pool = tmp_path / "pool"
    with open(pool, "wb") as file:
        file.truncate(2048 * MIB)
    run("mkfs.xfs", "-q", "-m", "reflink=1", pool)
    vault = mount(pool, "loop")
    image = make_image(vault / "image", "-t ext4 -b 4096 -J size=4", 96 * MIB, None)
    place = mount(image, "loop", "commit=1")
    stop = threading.Event()

    def write() -> None:
        seed = 0
        while not stop.wait(0.01):
            churn(place, seed := seed + 1, rounds=30)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(6):
            stop.wait(0.7)
            copy = vault / f"copy {number}"
            run("cp", "--reflink=always", image, copy)
            assert "needs_recovery" in run("dumpe2fs", "-h", copy)
            (tmp_path / str(number)).mkdir()
            assert_recovers_alike(copy, used(copy), tmp_path / str(number), mount)
    finally:
        stop.set()
        writer.join()
        run("umount", place)


def write_log(image: Path, transactions: list[str], opened: str = "") -> None:
    """Let debugfs write transactions into an image's journal and leave them there."""
    script = image.with_name("script")
    script.write_text("\n".join([f"jo {opened}", *transactions, "jc", ""]))
    run("debugfs", "-w", "-f", script, image)


@dataclasses.dataclass(frozen=True)
class Forged:
    """An image, and in `content` two blocks that, once replayed over `targets`, make `gained` used."""

    image: Path
    targets: str
    content: Path
    gained: ExtentSet


def forge(directory: Path, options: str) -> Forged:
    """Make a bitmap that begins with the journal's magic number, so that its copy in a log has to be escaped.

    It is that of a group without any block in use: where there are checksums, one whose bitmap is not initialised.
    """
    image = make_image(directory / "image", options, 64 * MIB, None)
    with Volume.discover(image).open() as layer:
        layout = parse_superblock(raw_superblock(layer), layer.size).layout
        reader = BlockReader(layer, layout)
        descriptors = read_descriptors(reader, 0, layout.groups)
        group = int(np.argmax(descriptors.free_clusters == layout.clusters_per_group))
        table_block = int(layout.descriptor_locations(np.array([group // layout.descriptors_per_block]))[0])
        table = reader.read(np.array([table_block]))[0]
    assert descriptors.free_clusters[group] == layout.clusters_per_group
    bitmap = np.full(1024, 0xFF, np.uint8)
    bitmap[: layout.clusters_per_group // 8] = 0
    bitmap[:4] = np.frombuffer(bytes.fromhex("c03b3998"), np.uint8)
    bits = np.unpackbits(bitmap[:4], bitorder="little").astype(bool)

    descriptor = table.reshape(-1, layout.descriptor_size)[group % layout.descriptors_per_block]
    words = descriptor.view("<u2")
    words[0xC // 2] = layout.clusters_per_group - bits.sum()
    if layout.checksums is Checksums.CRC32C:
        words[0x12 // 2] &= ~0x2 & 0xFFFF  # initialised from now on
        checksum = crc32c().of(bitmap[: layout.clusters_per_group // 8].tobytes(), layout.checksum_seed)
        words[0x18 // 2] = checksum & 0xFFFF
        if layout.descriptor_size == 64:
            words[0x38 // 2] = checksum >> 16
        words[0x1E // 2] = 0
        summed = group.to_bytes(4, "little") + descriptor.tobytes()
        words[0x1E // 2] = crc32c().of(summed, layout.checksum_seed) & 0xFFFF
    content = directory / "content"
    content.write_bytes(bitmap.tobytes() + table.tobytes())
    gained = ExtentSet.from_bits(bits, 1024, (1 + group * layout.blocks_per_group) * 1024)
    return Forged(image, f"{int(descriptors.block_bitmap[group])},{table_block}", content, gained)


PLAIN = "-t ext4 -b 1024 -g 1024 -O ^metadata_csum,^uninit_bg"
CHECKED = "-t ext4 -b 1024 -g 1024 -O metadata_csum"
LOGS = {
    "no checksums": (PLAIN, ""),
    "checksums 2": (CHECKED, "-c -v 2"),
    "checksums 3": (CHECKED, "-c -v 3"),
}


@pytest.mark.parametrize("form", LOGS)
@pytest.mark.parametrize("width", ["64bit", "^64bit"])
def test_escaped_copies_and_revocations_in_every_form_of_log_count_as_in_a_replay(
    form: str, width: str, tmp_path: Path
) -> None:
    options, opened = LOGS[form]
    forged = forge(tmp_path, f"{options},{width}")
    unchanged = used(forged.image)
    write = f"jw -b {forged.targets} {forged.content}"
    revoke = f"jw -r {forged.targets}"
    for transactions, expected in (
        ([write], forged.gained),
        ([write, revoke], ExtentSet.empty()),
        ([revoke, write], forged.gained),
        ([write, revoke, write], forged.gained),
        ([f"jw -c -b {forged.targets} {forged.content}"], ExtentSet.empty()),
    ):
        image = Path(shutil.copy(forged.image, tmp_path / "copy"))
        write_log(image, transactions, opened)
        assert used(image).difference(unchanged) == expected, transactions
        run("e2fsck", "-y", "-E", "journal_only", image, codes=(0, 1))
        assert used_says_dumpe2fs(image).difference(unchanged) == expected, transactions


def test_a_log_whose_first_form_of_checksums_decides_on_commits_is_declined(tmp_path: Path) -> None:
    forged = forge(tmp_path, PLAIN)
    write_log(forged.image, [f"jw -b {forged.targets} {forged.content}"], "-c")
    assert "asynchronously" in reason_declined(forged.image)


@pytest.mark.parametrize("form", ["checksums 2", "checksums 3"])
def test_damage_anywhere_in_a_checked_log_is_declined_or_ends_it(form: str, tmp_path: Path) -> None:
    forged = forge(tmp_path, LOGS[form][0])
    unchanged = used(forged.image)
    write_log(forged.image, [f"jw -b {forged.targets} {forged.content}"], LOGS[form][1])
    dirty = used(forged.image)
    assert dirty.difference(unchanged) == forged.gained
    volume = Volume.discover(forged.image)
    first = int(run("debugfs", "-R", "blocks <8>", forged.image).split()[0]) * 1024
    noise = random.Random(1)
    answered = 0
    with open(forged.image, "r+b") as file:
        # The journal's superblock, a descriptor block, two copies, a commit block.
        for _ in range(200):
            offset = first + noise.randrange(5 * 1024)
            answer, _ = with_a_flipped_bit(file, volume, offset, noise.randrange(8))
            # Without its magic number or sequence a block is, for every replay, the end of the log.
            assert answer is None or answer in (dirty, unchanged), offset
            answered += answer is not None
    assert answered < 40


def with_a_flipped_bit(file: BinaryIO, volume: Volume, offset: int, bit: int) -> tuple[ExtentSet | None, list[str]]:
    """Return the answer, and the reasons for none, while one bit of an image is wrong."""
    byte = os.pread(file.fileno(), 1, offset)
    os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit]), offset)
    reasons: list[str] = []
    answer = ext4.blockferry_used_extents(volume, reasons.append)
    os.pwrite(file.fileno(), byte, offset)
    assert answer is None or not reasons
    return answer and answer.extents, reasons


# -- what is not answered for ------------------------------------------------------------------------------------------


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


@pytest.mark.root
def test_an_external_journal_is_answered_for_only_when_replayed(tmp_path: Path, mount: Mount, attach: Attach) -> None:
    journal = attach(make_image(tmp_path / "journal", "-b 4096 -O journal_dev", 16 * MIB, None))
    assert "journal of another filesystem" in reason_declined(journal)
    image = make_image(tmp_path / "image", f"-t ext4 -b 4096 -J device={journal}", 64 * MIB, None)
    assert_as_dumpe2fs(used(image), image)
    place = mount(image, "loop")
    churn(place, seed=1)
    crashed = lose_power(place, image)
    run("umount", place)
    assert "another device" in reason_declined(crashed)
    run("e2fsck", "-fy", "-j", journal, crashed, codes=(0, 1))
    assert_as_dumpe2fs(used(crashed), crashed)


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "mount_options", "reason"),
    [
        ("-t ext4 -O fast_commit", "", "fast commits"),
        ("-t ext4 -O ^has_journal", "", "not unmounted cleanly"),
        ("-t ext4 -O ^metadata_csum", "journal_checksum", "commits asynchronously"),
        ("-t ext4 -O ^metadata_csum", "journal_async_commit,data=writeback", "commits asynchronously"),
    ],
)
def test_what_a_crash_leaves_that_cannot_be_foretold_is_declined(
    options: str, mount_options: str, reason: str, tmp_path: Path, mount: Mount
) -> None:
    image = make_image(tmp_path / "image", f"{options} -b 4096", 32 * MIB, None)
    place = mount(image, *filter(None, ["loop", mount_options]))
    churn(place, seed=1)
    run("sync", "-f", place)
    crashed = lose_power(place, image)
    run("umount", place)
    assert reason in reason_declined(crashed)


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
        ("ssv journal_inum 12", "checksum of the journal's inode", CHECKED),
        ("ssv journal_inum 12", "not that of a journal", PLAIN),
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


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_runs_of_set_bits_are_those_of_the_bits_one_by_one(bitmap: bytes) -> None:
    array = np.frombuffer(bitmap, np.uint8)
    starts, ends = ext4.set_runs(array)
    bits = np.unpackbits(array, bitorder="little").astype(bool)
    assert ExtentSet(starts, ends) == ExtentSet.from_bits(bits, 1)


def test_checksums_are_those_of_the_standards() -> None:
    # The check values of the catalogue of parametrised CRC algorithms: CRC-32/ISCSI and CRC-16/ARC.
    assert crc32c().of(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc16().of(b"123456789", 0) == 0xBB3D


@settings(deadline=None)
@given(rows=st.integers(1, 40), length=st.integers(0, 600), seed=st.integers(0, 2**32 - 1))
def test_checksums_of_many_rows_are_those_of_each_byte_by_byte(rows: int, length: int, seed: int) -> None:
    content = np.random.default_rng(seed).integers(0, 256, (rows, length * 4 % 1031), dtype=np.uint8)
    for crc, polynomial in ((crc32c(), 0x82F63B78), (crc16(), 0xA001)):
        begin = seed & (0xFFFFFFFF if polynomial > 0xFFFF else 0xFFFF)
        register = begin
        for byte in content[-1].tolist():
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (polynomial if register & 1 else 0)
        assert crc.rows(content, begin)[-1] == register
