"""Places to restore to: what is refused, what is written, and what an interrupted restore leaves."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.errors import TargetError
from blockferry.extents import ExtentSet
from blockferry.target import prepare
from blockferry.volume import probe
from conftest import Attach, Mount
from freeze_support import keep_open, make_image

MIB = 1 << 20
SIZE = 8 * MIB


def blank(path: Path, size: int = SIZE) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def allocated(path: Path) -> int:
    """Return the bytes that a file takes on its filesystem."""
    return path.stat().st_blocks * 512


# -- new files ---------------------------------------------------------------------------------------------------------


def test_a_new_file_is_sparse_private_and_named_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    with prepare(str(path), SIZE) as target:
        target.write(3 * MIB, b"data")
        assert not path.exists()
        target.finish()
    assert path.read_bytes() == bytes(3 * MIB) + b"data" + bytes(5 * MIB - 4)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert allocated(path) < MIB
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_new_file_that_is_not_finished_is_not_there(tmp_path: Path, error: type[Exception] | None) -> None:
    def restore() -> None:
        with prepare(str(tmp_path / "new.img"), SIZE) as target:
            target.write(0, b"data")
            if error:
                raise error

    if error:
        with pytest.raises(error):
            restore()
    else:
        restore()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_came_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    with pytest.raises(TargetError, match="File exists"), prepare(str(path), SIZE) as target:
        path.write_bytes(b"somebody's")
        target.finish()
    assert path.read_bytes() == b"somebody's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_filesystem_is_named_with_the_remedy(tmp_path: Path, mount: Mount) -> None:
    if os.geteuid():
        pytest.skip("needs root to mount a small filesystem: run scripts/test with sudo")
    place = mount(make_image(tmp_path / "small.img", "ext4", 8 * MIB))
    with (
        pytest.raises(TargetError, match="No space left on device") as raised,
        prepare(str(place / "new.img"), 64 * MIB) as target,
    ):
        for offset in range(0, 64 * MIB, MIB):
            target.write(offset, os.urandom(MIB))
    assert "Make room" in raised.value.remedy
    assert [entry.name for entry in place.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("name", ["", "not/there/new.img", "dangling"])
def test_what_is_no_place_for_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError), prepare(str(tmp_path / name), SIZE, force=True):
        pytest.fail("was not refused")


def test_a_character_device_is_refused() -> None:
    with pytest.raises(TargetError, match="neither a block device nor a file"), prepare("/dev/null", SIZE, force=True):
        pytest.fail("was not refused")


# -- existing files ----------------------------------------------------------------------------------------------------


def test_a_file_that_holds_something_only_yields_to_force(tmp_path: Path) -> None:
    path = tmp_path / "old.img"
    path.write_bytes(b"old" * MIB)
    with pytest.raises(TargetError, match=f"holds {3 * MIB} bytes") as raised, prepare(str(path), SIZE):
        pytest.fail("was not refused")
    assert "--force" in raised.value.remedy
    assert path.read_bytes() == b"old" * MIB


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("length", [1, SIZE // 2, SIZE, 2 * SIZE])
def test_an_existing_file_becomes_the_image_in_place(tmp_path: Path, length: int, keep: bool) -> None:
    path = tmp_path / "old.img"
    path.write_bytes(b"o" * length)
    path.chmod(0o640)
    inode = path.stat().st_ino
    with prepare(str(path), SIZE, force=True, keep=keep) as target:
        target.write(0, b"first")
        target.write(SIZE - 4, b"last")
        target.zero(ExtentSet.from_pairs([(5, SIZE - 9)]))
        target.finish()
    assert path.read_bytes() == b"first" + bytes(SIZE - 9) + b"last"
    assert (path.stat().st_ino, stat.S_IMODE(path.stat().st_mode)) == (inode, 0o640)
    assert allocated(path) < 2 * MIB


def test_an_empty_file_needs_no_force(tmp_path: Path) -> None:
    path = tmp_path / "empty.img"
    path.touch()
    with prepare(str(path), SIZE) as target:
        target.write(0, b"data")
        target.finish()
    assert path.stat().st_size == SIZE


def test_what_is_kept_can_be_compared_before_and_while_it_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "old.img"
    old = os.urandom(SIZE)
    path.write_bytes(old)
    buffer = bytearray(4096)
    with prepare(str(path), SIZE, force=True, keep=True) as target:
        target.write(5 * MIB, b"new")
        for offset in (0, MIB - 2048, MIB, SIZE - 4096):
            target.read_into(offset, memoryview(buffer))
            assert buffer == old[offset : offset + 4096]
        target.write(100, b"head")
        target.read_into(98, memoryview(buffer)[:8])
        assert buffer[:8] == old[98:100] + b"head" + old[104:106]
        target.finish()
    expected = bytearray(old)
    expected[5 * MIB : 5 * MIB + 3], expected[100:104] = b"new", b"head"
    assert path.read_bytes() == expected


def test_nothing_written_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "same.img"
    path.write_bytes(os.urandom(SIZE))
    before = path.read_bytes()
    with prepare(str(path), SIZE, force=True, keep=True):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_restore_leaves_nothing_that_looks_like_a_filesystem(
    tmp_path: Path, filesystem: str, keep: bool
) -> None:
    image = make_image(tmp_path / "image", filesystem, 400 * MIB)
    path = make_image(tmp_path / "old.img", "ext4", 400 * MIB)
    with (
        pytest.raises(ZeroDivisionError),
        prepare(str(path), 400 * MIB, force=True, keep=keep) as target,
        image.open("rb") as source,
    ):
        for offset in range(0, 4 * MIB, MIB):
            target.write(offset, source.read(MIB))
        raise ZeroDivisionError
    assert probe(str(image))["TYPE"] == filesystem
    assert "TYPE" not in probe(str(path))


def test_a_file_that_a_process_writes_to_is_refused_even_with_force(tmp_path: Path) -> None:
    path = blank(tmp_path / "busy.img")
    writer = keep_open(path)
    try:
        with pytest.raises(TargetError, match="in use"), prepare(str(path), SIZE, force=True):
            pytest.fail("was not refused")
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.root
def test_a_file_that_a_loop_device_shows_is_refused_even_with_force(tmp_path: Path, attach: Attach) -> None:
    path = blank(tmp_path / "busy.img")
    device = attach(path)
    with pytest.raises(TargetError, match=f"in use: {device} shows it") as raised, prepare(str(path), SIZE, force=True):
        pytest.fail("was not refused")
    assert f"losetup --detach {device}" in raised.value.remedy


def test_bytes_beyond_the_image_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "old.img"
    path.write_bytes(b"o" * 2 * SIZE)
    with (
        pytest.raises(TargetError, match="beyond its own size"),
        prepare(str(path), SIZE, force=True, keep=True) as target,
    ):
        target.zero(ExtentSet.from_pairs([(SIZE - 10, SIZE)]))
        target.write(SIZE - 2, b"data")
    assert path.read_bytes()[SIZE:] == b"o" * SIZE


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path, attach: Attach) -> str:
    return attach(blank(tmp_path / "disk.img", 16 * MIB))


@pytest.mark.root
def test_a_device_gets_the_image_and_keeps_what_lies_beyond_it(device: str, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"d" * 16 * MIB)
    with prepare(device, SIZE) as target:
        target.write(0, b"first")
        target.write(SIZE - 4, b"last")
        target.zero(ExtentSet.from_pairs([(5, SIZE - 9)]), must=True)
        target.finish()
    content = Path(device).read_bytes()
    assert content[:SIZE] == b"first" + bytes(SIZE - 9) + b"last"
    assert content[SIZE:] == b"d" * SIZE


@pytest.fixture
def no_holes(tmp_path: Path) -> Iterator[Path]:
    """A filesystem without fallocate: a loop device on it has no quick way to zero anything."""
    place = tmp_path / "ramfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
def test_a_device_that_cannot_punch_keeps_free_blocks_unless_they_must_be_zeros(no_holes: Path) -> None:
    image = no_holes / "disk.img"
    image.write_bytes(b"d" * SIZE)
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        with prepare(device, SIZE) as target:
            target.write(0, b"first")
            target.zero(ExtentSet.from_pairs([(2 * MIB, MIB)]))
            target.zero(ExtentSet.from_pairs([(4 * MIB, MIB + 1)]), must=True)
            target.finish()
        content = Path(device).read_bytes()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert content[2 * MIB : 3 * MIB] == b"d" * MIB
    assert content[4 * MIB : 5 * MIB + 1] == bytes(MIB + 1)
    assert content[5 * MIB + 1 :] == b"d" * (3 * MIB - 1)


@pytest.mark.root
def test_a_file_that_cannot_be_punched_reads_as_zeros_where_it_must(no_holes: Path) -> None:
    path = no_holes / "old.img"
    path.write_bytes(b"d" * SIZE)
    with prepare(str(path), SIZE, force=True, keep=True) as target:
        target.zero(ExtentSet.from_pairs([(4 * MIB, MIB + 1)]), must=True)
        target.finish()
    assert path.read_bytes() == b"d" * 4 * MIB + bytes(MIB + 1) + b"d" * (3 * MIB - 1)


@pytest.mark.root
@pytest.mark.parametrize("force", [False, True])
def test_a_device_that_is_too_small_is_refused(device: str, force: bool) -> None:
    with (
        pytest.raises(TargetError, match=rf"has {16 * MIB} bytes, the image needs {16 * MIB + 512}"),
        prepare(device, 16 * MIB + 512, force=force),
    ):
        pytest.fail("was not refused")


@pytest.mark.root
def test_a_device_that_holds_a_filesystem_only_yields_to_force(device: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    with pytest.raises(TargetError, match=f"{device}: holds ext4") as raised, prepare(device, SIZE):
        pytest.fail("was not refused")
    assert "--force" in raised.value.remedy
    assert probe(device)["TYPE"] == "ext4"
    with prepare(device, SIZE, force=True) as target:
        target.write(0, bytes(4096))
        target.finish()
    assert "TYPE" not in probe(device)


@pytest.mark.root
def test_a_device_that_holds_two_things_at_once_is_refused(device: str) -> None:
    """`blkid` says nothing of a device whose signatures contradict each other."""
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    with open(device, "r+b") as raw:
        raw.write(b"XFSB")
    with pytest.raises(TargetError, match="holds ext4"), prepare(device, SIZE):
        pytest.fail("was not refused")


@pytest.mark.root
def test_a_device_with_a_partition_table_only_yields_to_force(device: str) -> None:
    subprocess.run(["sfdisk", "--quiet", device], input="label: gpt\n,4M\n", text=True, check=True)
    with pytest.raises(TargetError, match="holds PMBR, gpt"), prepare(device, SIZE):
        pytest.fail("was not refused")


@pytest.mark.root
@pytest.mark.parametrize("option", ["rw", "ro"])
def test_a_mounted_device_is_refused_even_with_force(device: str, mount: Mount, option: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    place = mount(device, option)
    with (
        pytest.raises(TargetError, match=f"in use: {device} is mounted .*at {place}"),
        prepare(device, SIZE, force=True),
    ):
        pytest.fail("was not refused")


@pytest.mark.root
def test_a_disk_with_a_mounted_partition_is_refused_even_with_force(
    tmp_path: Path, attach: Attach, mount: Mount
) -> None:
    disk = blank(tmp_path / "disk.img", 64 * MIB)
    subprocess.run(["sfdisk", "--quiet", str(disk)], input="label: gpt\n,16M\n,16M\n", text=True, check=True)
    device = attach(disk, "--partscan")
    subprocess.run(["partx", "--update", device], check=True)
    subprocess.run(["mkfs.ext4", "-q", f"{device}p2"], check=True)
    place = mount(f"{device}p2")
    with pytest.raises(TargetError, match=f"{device}p2 is mounted .*at {place}"), prepare(device, SIZE, force=True):
        pytest.fail("was not refused")
    with prepare(f"{device}p1", SIZE) as target:
        target.write(0, b"data")
        target.finish()


@pytest.mark.root
def test_swap_space_is_refused_even_with_force(device: str) -> None:
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    subprocess.run(["swapon", device], check=True)
    try:
        with pytest.raises(TargetError, match=f"{device} is swap space"), prepare(device, SIZE, force=True):
            pytest.fail("was not refused")
    finally:
        subprocess.run(["swapoff", device], check=True)


@pytest.mark.root
def test_nobody_can_mount_a_device_while_it_is_written(device: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    with prepare(device, SIZE, force=True):
        done = subprocess.run(["mount", device, str(tmp_path)], capture_output=True, check=False)
        assert done.returncode != 0


@pytest.mark.root
def test_a_read_only_device_is_refused_with_the_remedy(tmp_path: Path, attach: Attach) -> None:
    device = attach(blank(tmp_path / "disk.img"), "--read-only")
    with pytest.raises(TargetError, match="is read-only") as raised, prepare(device, SIZE):
        pytest.fail("was not refused")
    assert "blockdev --getro" in raised.value.remedy


@pytest.mark.root
def test_what_is_restored_can_be_mounted_at_once(tmp_path: Path, attach: Attach, mount: Mount) -> None:
    source = make_image(tmp_path / "source.img", "ext4", 16 * MIB)
    place = mount(source)
    (place / "file").write_bytes(b"content")
    subprocess.run(["umount", str(place)], check=True)
    device = attach(blank(tmp_path / "disk.img", 16 * MIB))
    with prepare(device, 16 * MIB) as target:
        target.write(0, source.read_bytes())
        assert "TYPE" not in probe(device), "the head comes last"
        target.finish()
    assert (mount(device) / "file").read_bytes() == b"content"


@pytest.mark.root
def test_a_larger_disk_is_said_to_need_its_second_partition_table_moved(
    device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = blank(tmp_path / "small.img")
    subprocess.run(["sfdisk", "--quiet", str(disk)], input="label: gpt\n,4M\n", text=True, check=True)
    with caplog.at_level(logging.WARNING), prepare(device, SIZE) as target:
        target.write(0, disk.read_bytes())
        target.finish()
    assert "sgdisk --move-second-header" in caplog.text
