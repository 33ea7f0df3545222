"""Logs of ext3 and ext4 that debugfs wrote, in every form that there is, and damaged ones."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from blockferry.extents import ExtentSet
from blockferry.used.checksum import crc32c
from blockferry.used.ext4.blocks import BlockReader
from blockferry.used.ext4.groups import read_descriptors
from blockferry.used.ext4.superblock import Checksums, parse_superblock, raw_superblock
from blockferry.volume import Volume
from used_ext4_support import (
    CHECKED,
    MIB,
    PLAIN,
    make_image,
    reason_declined,
    run,
    used,
    used_says_dumpe2fs,
    with_a_flipped_bit,
)

LOGS = {
    "no checksums": (PLAIN, ""),
    "checksums 2": (CHECKED, "-c -v 2"),
    "checksums 3": (CHECKED, "-c -v 3"),
}


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
