"""Volumes: real images, real loop devices, real mounts."""

import json
import mmap
import os
import subprocess

import pytest

from blockferry.errors import VolumeError
from blockferry.layers import DirectLayer
from blockferry.volume import Volume, all_mounts, default_name


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a disk.img"
    run("truncate", "-s", "64M", str(path))
    run("mkfs.ext4", "-q", "-U", "12345678-1234-4234-9234-123456789abc", str(path))
    return path


@pytest.fixture
def loop(image):
    if os.geteuid():
        pytest.skip("needs root for a loop device")
    device = run("losetup", "--find", "--show", str(image))
    yield device
    run("losetup", "-d", device)


def test_an_image_is_known_by_what_it_holds(image):
    volume = Volume.discover(image)
    assert (volume.size, volume.block_size, volume.is_device) == (64 << 20, 512, False)
    assert volume.filesystem == "ext4"
    assert volume.identity == {"filesystem_uuid": "12345678-1234-4234-9234-123456789abc"}
    assert volume.name == "a-disk.img"


@pytest.mark.root
def test_a_loop_device_is_known_by_what_it_holds(loop):
    volume = Volume.discover(loop)
    assert (volume.size, volume.block_size, volume.is_device) == (64 << 20, 512, True)
    assert volume.identity["filesystem_uuid"] == "12345678-1234-4234-9234-123456789abc"


@pytest.mark.root
def test_an_image_and_its_loop_device_know_where_they_are_mounted(image, loop, tmp_path):
    point = tmp_path / "a mount\tpoint"
    point.mkdir()
    assert Volume.discover(image).mounts() == Volume.discover(loop).mounts() == []
    run("mount", "-o", "ro", loop, str(point))
    try:
        for volume in (Volume.discover(image), Volume.discover(loop)):
            (mount,) = volume.mounts()
            assert (mount.point, mount.filesystem, mount.read_only) == (str(point), "ext4", True)
            assert volume.users() == [mount]
    finally:
        run("umount", str(point))
    assert not any(mount.point == str(point) for mount in all_mounts())


def test_a_window_is_a_volume_of_its_own(image, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"\0" * (1 << 20) + image.read_bytes())
    window = Volume.discover(disk).window(1 << 20, 64 << 20)
    assert window.filesystem == "ext4"
    assert (window.offset, window.size) == (1 << 20, 64 << 20)
    with window.open() as layer:
        buffer = bytearray(2)
        layer.read_into(1024 + 56, memoryview(buffer))
    assert bytes(buffer) == b"\x53\xef"


def test_bytes_without_a_filesystem_have_none(tmp_path):
    path = tmp_path / "noise"
    path.write_bytes(b"nothing that anybody knows" * 1000)
    assert Volume.discover(path).filesystem == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "neither a block device nor an image file"),
        (lambda path: path.touch(), "has no bytes"),
        (lambda path: path.symlink_to("/dev/null"), "neither a block device nor an image file"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, make, message):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(VolumeError, match=message):
        Volume.discover(path)


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(VolumeError, match="neither a block device"):
        Volume.discover(path)


@pytest.mark.parametrize(
    ("path", "name"), [("/dev/vg/root", "root"), ("/srv/my vm.img", "my-vm.img"), ("/x/-.-", "volume"), ("a,b", "a-b")]
)
def test_a_volume_without_a_name_is_called_by_the_end_of_its_path(path, name):
    assert default_name(path) == name


@pytest.mark.root
@pytest.mark.parametrize("sector", [512, 4096])
def test_data_is_read_past_the_page_cache_wherever_it_begins_and_ends(tmp_path, attach, sector):
    """What a device holds is seen, not what an earlier reader left in its page cache; and no page of it is added."""
    path = tmp_path / "disk.img"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    device = attach(path, "--sector-size", str(sector))
    with Volume.discover(device).open_data() as layer:
        assert isinstance(layer, DirectLayer)
        for offset, length in [
            (0, 3 << 20),
            (1, 5),
            (sector - 1, 2),
            (4095, 2 << 20),
            (3 << 20, 0),
            ((3 << 20) - 7, 7),
        ]:
            for shift in (0, 16, 512):
                whole = memoryview(bytearray(length + shift))
                layer.read_into(offset, whole[shift:])
                assert whole[shift:] == content[offset : offset + length]
        aligned = memoryview(mmap.mmap(-1, 1 << 20))
        layer.read_into(1 << 20, aligned)
        assert aligned == content[1 << 20 : 2 << 20]
        with pytest.raises(VolumeError, match="ends at"):
            layer.read_into((3 << 20) - 5, memoryview(bytearray(10)))
    cached = json.loads(run("fincore", "--json", "--bytes", device))["fincore"][0]["res"]
    assert int(cached) < 1 << 20  # blkid and the kernel looked at its ends
