"""The ladder: which step, which extents, which reason."""

from __future__ import annotations

import pytest

from blockferry.extents import ExtentSet
from blockferry.hookspecs import UsedBlocks, hookimpl
from blockferry.ladder import used_blocks
from blockferry.manager import plugin_manager
from blockferry.snapshot import Tier
from blockferry.volume import Volume
from volumes_support import make_image, run

MIB = 1 << 20


def test_a_reader_that_knows_the_filesystem_makes_the_step_used(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    run("mkfs.ext4", "-q", image)
    used, tier, reason = used_blocks(plugin_manager(), Volume.discover(image))
    assert (tier, reason) == (Tier.USED, "")
    assert used.extents.total < 64 * MIB


def test_what_nobody_knows_is_whole_with_the_reason(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"\x01" * MIB)
    used, tier, reason = used_blocks(plugin_manager(), Volume.discover(image))
    assert (used.extents, used.method, tier) == (ExtentSet.whole(MIB), "whole volume", Tier.WHOLE)
    assert reason == "no plugin knows what is on it"


def test_a_filesystem_that_nobody_knows_is_named(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    run("mkfs.vfat", image)
    _, tier, reason = used_blocks(plugin_manager(), Volume.discover(image))
    assert (tier, reason) == (Tier.WHOLE, "no plugin knows the filesystem vfat")


def test_holes_alone_are_still_the_whole_volume(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    with image.open("r+b") as file:
        file.write(b"\x01" * MIB)
    used, tier, _ = used_blocks(plugin_manager(), Volume.discover(image))
    assert (used.extents, used.method, tier) == (ExtentSet.whole(MIB), "sparse file", Tier.WHOLE)


def test_every_reason_to_decline_is_told(tmp_path):
    image = make_image(tmp_path / "disk.img", 300 * MIB)
    run("mkfs.xfs", "-q", image)
    run("xfs_db", "-x", "-c", "sb 0", "-c", "write -d inprogress 1", image)

    class Shy:
        @hookimpl
        def blockferry_used_extents(self, volume, declined):
            declined("too shy")

    manager = plugin_manager()
    manager.register(Shy())
    _, tier, reason = used_blocks(manager, Volume.discover(image))
    assert (tier, reason) == (Tier.WHOLE, "too shy; xfs: mkfs has not finished it")


def test_a_plugin_that_says_too_much_is_cut_to_the_volume(tmp_path):
    image = make_image(tmp_path / "disk.img", MIB)

    class Generous:
        @hookimpl
        def blockferry_used_extents(self, volume, declined):
            return UsedBlocks(ExtentSet.from_pairs([(4096, 5 * volume.size)]), "generous")

    manager = plugin_manager()
    manager.register(Generous())
    used, tier, _ = used_blocks(manager, Volume.discover(image))
    assert (used.extents, tier) == (ExtentSet.from_pairs([(4096, MIB - 4096)]), Tier.USED)


def test_an_exception_is_no_answer_and_ends_the_backup(tmp_path):
    class Broken:
        @hookimpl
        def blockferry_used_extents(self, volume, declined):
            raise RuntimeError("broken")

    manager = plugin_manager()
    manager.register(Broken())
    with pytest.raises(RuntimeError, match="broken"):
        used_blocks(manager, Volume.discover(make_image(tmp_path / "disk.img", MIB)))
