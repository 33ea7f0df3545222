"""A volume that is used while it is brought back, with both tools and two filesystems, and what is refused."""

from __future__ import annotations

import filecmp
import mmap
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from commands_support import Depot, borg_first, run
from conftest import Attach
from hot_support import MIB, Hot, check_filesystem, mounted, same_tree

pytestmark = pytest.mark.root


@pytest.fixture
def small(images: dict[str, Path], tmp_path: Path) -> Path:
    return own(images["ext4"], tmp_path)


def own(image: Path, tmp_path: Path) -> Path:
    mine = tmp_path / "volume.img"
    run("cp", "--sparse=always", image, mine)
    return mine


def zeros(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def write_some(place: Path, expected: Path) -> None:
    """Write, overwrite, sync, delete and discard on a mounted filesystem, and do the same to a plain tree."""
    chance = random.Random(11)
    for root in (place, expected):
        new = root / "new"
        new.mkdir()
        chance.seed(11)
        for number in range(20):
            with (new / f"n{number}").open("wb") as file:
                file.write(chance.randbytes(chance.choice([100, 5000, 200_000])))
                file.flush()
                os.fsync(file.fileno())
        with (root / "text").open("r+b") as file:
            file.seek(1_000_001)
            file.write(b"X" * 3)
            os.fsync(file.fileno())
        shutil.rmtree(root / "d3")
        (new / "n0").unlink()
    run("fstrim", place)


def blocks_that_differ(one: Path, other: Path, size: int) -> int:
    """Return how many blocks of 4 KiB differ."""
    count = 0
    with one.open("rb") as first, other.open("rb") as second:
        for _ in range(0, size, 4096):
            count += first.read(4096) != second.read(4096)
    return count


@pytest.mark.parametrize(
    ("depot", "kind", "on"),
    [
        pytest.param("borg", "xfs", "loop device", marks=pytest.mark.thorough),
        ("restic", "ext4", "file"),
        pytest.param("borg", "ext4", "file", marks=pytest.mark.thorough),
        pytest.param("restic", "xfs", "loop device", marks=pytest.mark.thorough),
    ],
    indirect=["depot"],
)
def test_a_volume_is_used_while_it_comes_back(depot: Depot, images, files, hot, attach: Attach, tmp_path, kind, on):
    image = own(images[kind], tmp_path)
    assert depot.ferry("backup", image).code == 0
    size = image.stat().st_size
    file = tmp_path / "target.img"
    target: Path | str = file
    if on == "loop device":
        target = attach(zeros(file, size + 3 * MIB))
    restore: Hot = hot(depot, target)
    expected = tmp_path / "expected"
    run("cp", "-a", files, expected)

    said = restore.attach("--rate", "4M", "--threads", "1")
    assert said["seconds"] < 10
    assert not said["finished"]
    place = restore.mount(said["device"])
    begun = restore.status()
    assert begun["hydrated"] < begun["total"]
    same_tree(files, place)
    write_some(place, expected)
    restore.try_to("detach").refused(1, "in use", str(place))
    same_tree(expected, place)
    restore.unmount()
    done = restore.wait_until_finished()
    assert done["hydrated"] == done["total"]
    assert done["dirty"] > 0
    assert done["unreadable"] == []
    assert restore.detach()["finished"]
    restore.assert_no_traces()

    check_filesystem(target)
    with mounted(target, tmp_path / "place", *(["loop"] if on == "file" else []), "ro") as place:
        same_tree(expected, place)


@pytest.mark.parametrize(("depot", "kind"), [("borg", "loop device"), ("restic", "file")], indirect=["depot"])
def test_what_nobody_writes_to_is_the_snapshot(depot: Depot, small, hot, attach: Attach, tmp_path, kind):
    assert depot.ferry("backup", small).code == 0
    size = small.stat().st_size
    file = tmp_path / "target.img"
    target = attach(zeros(file, size)) if kind == "loop device" else file
    restore = hot(depot, target)
    said = restore.attach("--rate", "24M", "--threads", "1")
    chance = random.Random(5)
    disk, image = os.open(said["path"], os.O_RDWR), small.read_bytes()
    now = bytearray(image)
    try:
        for number in range(60):
            offset = chance.randrange(size - 100_000)
            length = chance.choice([1, 511, 4096, 70_000])
            if number % 3:
                data = chance.randbytes(length)
                os.pwrite(disk, data, offset)
                now[offset : offset + length] = data
            else:
                assert os.pread(disk, length, offset) == now[offset : offset + length], (offset, length)
        os.fsync(disk)
    finally:
        os.close(disk)
    restore.wait_until_finished()
    restore.detach()
    assert file.read_bytes() == now


@borg_first
def test_it_goes_on_where_it_was(depot: Depot, hot, tmp_path):
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(3).randbytes(40 * MIB))
    assert depot.ferry("backup", noise).code == 0
    restore = hot(depot, tmp_path / "target.img")
    restore.attach("--rate", "1M", "--threads", "1")
    restore.wait_for(lambda said: said["hydrated"] >= 8 * MIB)
    before = restore.detach()
    assert not before["finished"]
    restore.assert_no_traces()
    assert restore.status()["state"] == "detached"
    restore.attach()
    done = restore.wait_until_finished()
    assert done["fetched"] <= done["total"] - before["hydrated"]
    restore.detach()
    assert filecmp.cmp(noise, tmp_path / "target.img", shallow=False)
    restore.try_to("status").refused(1, "no such restore")


@borg_first
def test_nothing_but_what_is_read_comes_back_at_rate_0(depot: Depot, hot, tmp_path):
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(3).randbytes(96 * MIB))
    assert depot.ferry("backup", noise).code == 0
    restore = hot(depot, tmp_path / "target.img")
    said = restore.attach("--rate", "0")
    looked_at = _settled(restore)  # udev may look at the ends of a new disk
    assert looked_at < 48 * MIB
    disk = os.open(said["path"], os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    os.preadv(disk, [buffer], 50 * MIB)
    os.close(disk)
    assert buffer[:] == noise.read_bytes()[50 * MIB : 50 * MIB + 4096]
    restore.wait_for(lambda said: said["hydrated"] > looked_at)
    assert _settled(restore) < looked_at + 8 * MIB
    assert Path(said["path"]).read_bytes() == noise.read_bytes()
    restore.wait_until_finished()
    restore.detach()
    assert filecmp.cmp(noise, tmp_path / "target.img", shallow=False)


def _settled(restore: Hot) -> int:
    """Return the bytes that are there when no more have come for a second."""
    while True:
        before = restore.status()["hydrated"]
        time.sleep(1)
        if restore.status()["hydrated"] == before:
            return int(before)


@borg_first
@pytest.mark.thorough
def test_a_part_is_attached_too(depot: Depot, small, files, hot, attach: Attach, tmp_path):
    device = attach(small)
    assert depot.ferry("backup", device, "--name", "volume").code == 0
    expected = tmp_path / "expected"
    run("cp", "-a", files, expected)
    with mounted(device, tmp_path / "place") as place:
        write_some(place, expected)
    stored = depot.ferry("backup", device, "--name", "volume", "--incremental", "--json").json()
    shown = depot.ferry("snapshots", "--json").json()["snapshots"]
    assert shown[-1]["part"] or stored["tier"] == "used", stored
    restore = hot(depot, tmp_path / "target.img")
    said = restore.attach("--rate", "24M")
    place = restore.mount(said["device"])
    same_tree(expected, place)
    restore.unmount()
    restore.wait_until_finished()
    restore.detach()
    check_filesystem(tmp_path / "target.img")
    with mounted(tmp_path / "target.img", tmp_path / "place", "loop", "ro") as place:
        same_tree(expected, place)


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_the_partitions_of_a_disk_show_up(depot: Depot, small, files, hot, tmp_path):
    disk = zeros(tmp_path / "disk.img", 120 * MIB)
    run("sfdisk", "-q", disk, input="label: gpt\nstart=2048, size=16384\nstart=18432\n")
    run("dd", f"if={small}", f"of={disk}", "bs=1M", "seek=9", "conv=notrunc,sparse")
    assert depot.ferry("backup", disk).code == 0
    restore = hot(depot, tmp_path / "target.img")
    said = restore.attach("--rate", "24M")
    run("partx", "--update", said["device"])  # also where the kernel itself reads no such table
    place = restore.mount(said["device"] + "p2")
    same_tree(files, place)
    restore.try_to("detach").refused(1, "in use")
    restore.unmount()
    restore.wait_until_finished()
    restore.detach()
    restore.assert_no_traces()
    with mounted(tmp_path / "target.img", tmp_path / "place", "loop", f"offset={9 * MIB}", "ro") as place:
        same_tree(files, place)


def test_many_read_at_once_while_it_comes_back(depot: Depot, small, hot, tmp_path):
    assert depot.ferry("backup", small).code == 0
    restore = hot(depot, tmp_path / "target.img")
    said = restore.attach()
    image = small.read_bytes()
    wrong: list[int] = []

    def look(seed: int) -> None:
        chance = random.Random(seed)
        disk = os.open(said["path"], os.O_RDONLY)
        try:
            for _ in range(100):
                offset = chance.randrange(len(image) - 9000) & ~511
                if os.pread(disk, 9000, offset) != image[offset : offset + 9000]:
                    wrong.append(offset)
        finally:
            os.close(disk)

    threads = [threading.Thread(target=look, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    restore.wait_until_finished()
