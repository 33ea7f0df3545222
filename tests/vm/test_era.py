"""What changed on dm-era devices, by their eras."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.changed import era
from blockferry.hookspecs import Checkpoint, FreezeOptions
from conftest import Attach, Mount
from devicemapper_support import back_up, begin, changed, check, contents, declines, differing, run
from pages_support import Page, run_shell
from volumes_support import live_in
from volumes_support import run as run_small

pytestmark = pytest.mark.root

MIB = 1 << 20
SIZE = 32 * MIB
DEVICE = "/dev/mapper/blockferry-era"
Make = Callable[[int], None]


@pytest.fixture
def make(tmp_path: Path, attach: Attach) -> Iterator[Make]:
    """Return a function that sets up a dm-era device of 32 MiB with blocks of so many bytes, also a second time.

    It does so as docs/tracking-dm.md says.
    """
    images = [tmp_path / "metadata.img", tmp_path / "data.img"]
    for image, size in zip(images, (16 * MIB, SIZE), strict=True):
        image.touch()
        os.truncate(image, size)
    metadata, data = (attach(image) for image in images)
    places = {"data-era": "blockferry-era", "/dev/METADATA": metadata, "/dev/sdb": data}

    def make_device(block: int) -> None:
        run_shell(Page("tracking-dm.md").block(), {**places, " 128": f" {block // 512}"})

    yield make_device
    run("dmsetup", "remove", "--retry", "blockferry-era")


@pytest.mark.thorough
def test_every_write_to_a_mounted_filesystem_is_in_the_answer(make: Make, mount: Mount) -> None:
    make(64 * 1024)
    run("mkfs.ext4", "-q", DEVICE)
    place = mount(DEVICE)
    live_in(place, 1, files=40)
    options = FreezeOptions(fsfreeze_seconds=60)
    first, image_1, _ = back_up(era, DEVICE, "000000000001", [], options)
    live_in(place, 2, files=40)
    second, image_2, (since_1,) = back_up(era, DEVICE, "000000000002", [first], options)
    check(since_1, image_1, image_2, most=0.8)
    live_in(place, 3, files=40)
    os.sync()
    image_3 = contents(DEVICE)
    check(changed(era, DEVICE, first), image_1, image_3, most=0.9)
    check(changed(era, DEVICE, second), image_2, image_3, most=0.8)


@pytest.mark.thorough
def test_every_write_to_a_mounted_xfs_is_in_the_answer(make: Make, mount: Mount) -> None:
    make(64 * 1024)
    run_small("mkfs.xfs", "-q", DEVICE)
    since, before = begin(era, DEVICE), contents(DEVICE)
    live_in(mount(DEVICE), 1, files=40)
    os.sync()
    check(changed(era, DEVICE, since), before, contents(DEVICE), most=0.8)


@pytest.mark.thorough
def test_any_earlier_checkpoint_can_be_asked_for_while_somebody_writes(make: Make) -> None:
    block = 24 * 1024  # not a power of two
    make(block)
    chance = random.Random(1)
    checkpoints: list[tuple[Checkpoint, bytes]] = []
    for number in range(3):
        scribble(chance)
        checkpoints.append((begin(era, DEVICE, f"00000000000{number}"), contents(DEVICE)))
        scribble(chance)  # in the very era that the checkpoint began
        run("dmsetup", "message", "blockferry-era", "0", "checkpoint")  # somebody else's
        if number == 1:
            run("dmsetup", "suspend", "blockferry-era")
            run("dmsetup", "resume", "blockferry-era")
    thread = threading.Thread(target=lambda: [scribble(chance) for _ in range(10)])
    thread.start()
    changed(era, DEVICE, checkpoints[0][0])
    thread.join()
    now = contents(DEVICE)
    for checkpoint, before in checkpoints:
        answer = changed(era, DEVICE, checkpoint)
        check(answer, before, now)
        assert answer.total <= 3 * differing(before, now).align(block, SIZE).total
    assert run("dmsetup", "status", "blockferry-era").split()[6] == "-"


def scribble(chance: random.Random) -> None:
    with open(DEVICE, "r+b") as disk:
        for _ in range(5):
            os.pwrite(disk.fileno(), chance.randbytes(chance.randrange(1, 20_000)), chance.randrange(SIZE - 20_000))
            os.fsync(disk.fileno())


@pytest.mark.thorough
def test_discards_which_the_kernel_does_not_note_are_no_answer(make: Make) -> None:
    make(64 * 1024)
    with open(DEVICE, "r+b") as disk:
        disk.write(random.Random(2).randbytes(8 * MIB))
    since = begin(era, DEVICE)
    assert not changed(era, DEVICE, since)
    run("blkdiscard", "--offset", "0", "--length", "4M", DEVICE)
    assert "discards" in declines(era, DEVICE, since)
    since = begin(era, DEVICE)
    run("blkdiscard", "--zeroout", "--offset", "0", "--length", "3M", DEVICE)
    assert changed(era, DEVICE, since).covers(0, 3 * MIB)


@pytest.mark.thorough
def test_a_device_set_up_anew_is_no_answer(make: Make) -> None:
    make(64 * 1024)
    since = begin(era, DEVICE)
    run("dmsetup", "remove", "--retry", "blockferry-era")
    make(64 * 1024)
    assert "set up anew" in declines(era, DEVICE, since)
    since = begin(era, DEVICE)
    assert not changed(era, DEVICE, since)
    for wrong, reason in (
        ({"era": 10_000}, "not been reached"),
        ({"era": "1"}, "not been reached"),
        ({"boot": "another"}, "set up anew"),
        ({"table": []}, "set up anew"),
    ):
        assert reason in declines(era, DEVICE, dataclasses.replace(since, state=since.state | wrong))
    assert declines(era, DEVICE, dataclasses.replace(since, state={}))


@pytest.mark.thorough
def test_a_metadata_snapshot_of_somebody_else_is_left_to_them(make: Make) -> None:
    make(64 * 1024)
    since = begin(era, DEVICE)
    run("dmsetup", "message", "blockferry-era", "0", "take_metadata_snap")
    reason = declines(era, DEVICE, since)
    assert "not now" in reason
    assert "dmsetup message blockferry-era 0 drop_metadata_snap" in reason
    run("dmsetup", "message", "blockferry-era", "0", "drop_metadata_snap")  # fails if it had been dropped
    assert not changed(era, DEVICE, since)
