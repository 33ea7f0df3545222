"""What changed on a running machine's disk, by QEMU's dirty bitmaps."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
from collections.abc import Iterator

import pytest

from blockferry import kernel
from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import Checkpoint
from blockferry.qemu import tracker
from blockferry.volume import Volume
from freeze_support import hold, read
from qemu_support import SIZE

pytestmark = pytest.mark.root

GRAIN = 64 << 10


def checkpoint(machine, snapshot: str) -> Checkpoint:
    made = tracker.blockferry_checkpoint(machine.volume, snapshot, "", pytest.fail)
    assert made
    return made


def changed(machine, since: Checkpoint, volume: Volume | None = None) -> tuple[ExtentSet | None, str]:
    """Hold the disk still and ask what changed; return the answer, or why there is none."""
    reasons: list[str] = []
    with hold(machine.name) as frozen:
        found = tracker.blockferry_changed_extents(volume or machine.volume, frozen.volume, since, reasons.append)
    return found and found.extents, "".join(reasons)


def differences(one: bytes, other: bytes) -> ExtentSet:
    grains = range(0, SIZE, GRAIN)
    return ExtentSet.from_pairs((at, GRAIN) for at in grains if one[at : at + GRAIN] != other[at : at + GRAIN])


def scribble(machine, chance: random.Random) -> None:
    """Write here and there, some of it in one grain, some of it over a border; discard and zero some more."""
    for _ in range(12):
        offset = chance.randrange(0, SIZE - (1 << 18), 512)
        machine.write(offset, chance.randbytes(chance.choice([512, 4096, 100_000])))
    descriptor = os.open(machine.guest, os.O_RDWR)
    try:
        for mode in (kernel.PUNCH_HOLE_KEEP_SIZE, kernel.ZERO_RANGE_KEEP_SIZE):
            kernel.fallocate(descriptor, mode, chance.randrange(0, SIZE - (1 << 20), GRAIN), 3 * GRAIN)
    finally:
        os.close(descriptor)


@pytest.fixture
def restless(machine) -> Iterator[None]:
    """The guest writes to one quarter of the disk, whatever else is going on."""
    stopped, chance = threading.Event(), random.Random(8)

    def load() -> None:
        while not stopped.wait(0.001):
            machine.write(chance.randrange(0, SIZE // 4, 4096), chance.randbytes(4096))

    thread = threading.Thread(target=load)
    thread.start()
    yield
    stopped.set()
    thread.join()


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("seed", range(2))
def test_every_block_that_differs_is_in_the_answer(machine, seed):
    chance = random.Random(seed)
    machine.write(0, chance.randbytes(SIZE))
    first = checkpoint(machine, "one")
    with hold(machine.name) as frozen:
        before = read(frozen)
    for name in ("two", "three"):
        scribble(machine, chance)
        second = checkpoint(machine, name)
        scribble(machine, chance)
        with hold(machine.name) as frozen:
            found = tracker.blockferry_changed_extents(machine.volume, frozen.volume, first, pytest.fail)
            scribble(machine, chance)
            after = read(frozen)
        assert found
        wanted = differences(before, after)
        assert wanted.total >= 24 * GRAIN
        assert not wanted.difference(found.extents)
        # Beside what differs: the quarter that is written all the time, and what was written after the freeze.
        assert found.extents.total < SIZE // 2
        tracker.blockferry_release_checkpoint(first)
        assert machine.leftovers() == [f"blockferry-{name}"]
        first, before = second, after
    tracker.blockferry_release_checkpoint(first)
    assert machine.leftovers() == []


def test_nothing_written_is_nothing_changed(machine):
    machine.write(0, os.urandom(SIZE))
    assert changed(machine, checkpoint(machine, "one")) == (ExtentSet.empty(), "")


def test_the_bitmap_goes_on_after_it_was_read(machine):
    base = checkpoint(machine, "one")
    machine.write(0, b"x" * GRAIN)
    assert changed(machine, base)[0] == ExtentSet.from_pairs([(0, GRAIN)])
    machine.write(5 * GRAIN, b"x" * GRAIN)
    assert changed(machine, base)[0] == ExtentSet.from_pairs([(0, GRAIN), (5 * GRAIN, GRAIN)])


def test_a_restart_keeps_the_bitmap_in_qcow2_alone(machine):
    base = checkpoint(machine, "one")
    machine.write(GRAIN, b"x" * 512)
    machine.stop()
    machine.start()
    machine.write(3 * GRAIN, b"x" * 512)
    extents, reason = changed(machine, base)
    if machine.format == "qcow2":
        assert extents == ExtentSet.from_pairs([(GRAIN, GRAIN), (3 * GRAIN, GRAIN)])
    else:
        assert extents is None
        assert "restarted" in reason


def test_a_crash_makes_the_bitmap_of_no_use(machine):
    base = checkpoint(machine, "one")
    machine.stop()  # a clean end stores the bitmap
    machine.start()
    machine.write(0, b"x" * 512)
    machine.stop(signal.SIGKILL)
    machine.start()
    extents, reason = changed(machine, base)
    assert extents is None
    assert ("inconsistent" if machine.format == "qcow2" else "restarted") in reason
    tracker.blockferry_release_checkpoint(base)
    assert machine.leftovers() == []
    assert changed(machine, checkpoint(machine, "two"))[0] == ExtentSet.empty()


def test_what_somebody_did_to_the_bitmap_is_told(machine):
    base = checkpoint(machine, "one")
    bitmap = {"node": "disk0", "name": "blockferry-one"}
    machine.ask("block-dirty-bitmap-disable", **bitmap)
    assert changed(machine, base) == (None, "qemu: somebody stopped the bitmap's recording")
    machine.ask("block-dirty-bitmap-remove", **bitmap)
    extents, reason = changed(machine, base)
    assert extents is None
    assert "removed" in reason
    tracker.blockferry_release_checkpoint(base)


def test_a_bitmap_that_somebody_else_uses_is_left_alone(machine):
    base = checkpoint(machine, "one")
    reasons: list[str] = []
    with hold(machine.name) as frozen:
        machine.ask("block-dirty-bitmap-disable", node="disk0", name="blockferry-one")
        machine.ask(
            "block-export-add",
            type="nbd",
            id="theirs",
            node_name="blockferry-overlay",
            name="theirs",
            bitmaps=["blockferry-one"],
        )
        assert not tracker.blockferry_changed_extents(machine.volume, frozen.volume, base, reasons.append)
        machine.ask("block-export-del", id="theirs", mode="hard")
    assert reasons == ["qemu: the bitmap is in use by somebody else"]


@pytest.mark.parametrize("what", [{"size": SIZE // 2}, {"node": "disk1"}, {"socket": "/run/other"}], ids=str)
def test_a_checkpoint_of_another_disk_is_declined(machine, what):
    base = checkpoint(machine, "one")
    other = dataclasses.replace(base, state=base.state | what)
    assert changed(machine, other) == (None, "qemu: the checkpoint is of another disk, or of another size")


def test_a_disk_that_does_not_hold_still_has_no_answer(machine):
    base = checkpoint(machine, "one")
    reasons: list[str] = []
    volume = machine.volume
    assert not tracker.blockferry_changed_extents(volume, volume, base, reasons.append)
    assert reasons == ["qemu: the disk does not hold still"]


def test_a_checkpoint_is_released_once_and_for_all_when_the_machine_runs(machine):
    base = checkpoint(machine, "one")
    machine.stop()
    with pytest.raises(VolumeError, match="Does the machine run"):  # the bitmap in the image is there still
        tracker.blockferry_release_checkpoint(base)
    machine.start()
    for _ in range(2):
        tracker.blockferry_release_checkpoint(base)
    assert machine.leftovers() == []


def test_a_snapshot_has_one_checkpoint(machine):
    checkpoint(machine, "one")
    reasons: list[str] = []
    assert not tracker.blockferry_checkpoint(machine.volume, "one", "", reasons.append)
    assert "already exists" in reasons[0]


def test_other_volumes_and_trackers_are_not_its_business(machine, tmp_path):
    path = tmp_path / "plain.img"
    path.write_bytes(b"x" * 4096)
    plain, base = Volume.discover(path), checkpoint(machine, "one")
    assert tracker.blockferry_checkpoint(plain, "two", "", pytest.fail) is None
    assert tracker.blockferry_changed_extents(plain, plain, base, pytest.fail) is None
    foreign = dataclasses.replace(base, tracker="other")
    assert tracker.blockferry_changed_extents(machine.volume, machine.volume, foreign, pytest.fail) is None
    tracker.blockferry_release_checkpoint(foreign)
    assert machine.bitmaps() == ["blockferry-one"]
