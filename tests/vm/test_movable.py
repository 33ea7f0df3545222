"""A volume that is mounted while it is restored is moved to its target without being unmounted."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, new_depot, run
from conftest import Attach, Mount

pytestmark = [pytest.mark.root, pytest.mark.thorough]

SIZE = 96 << 20


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    """A repository that holds an ext4 volume, which is left at `disk.img`."""
    image = tmp_path / "disk.img"
    run("truncate", "-s", SIZE, image)
    files = tmp_path / "files"
    files.mkdir()
    for number in range(20):
        (files / str(number)).write_bytes(os.urandom(1 << 20))
    run("mke2fs", "-q", "-t", "ext4", "-d", files, image)
    made = new_depot("borg", tmp_path / "repository")
    assert made.ferry("backup", image).code == 0
    return made


@pytest.fixture(params=["a device", "a file"])
def target(request: pytest.FixtureRequest, tmp_path: Path, attach: Attach) -> Path:
    path = tmp_path / "target.img"
    if request.param == "a file":
        return path
    run("truncate", "-s", SIZE + 4096, path)
    return Path(attach(path))


def digests(directory: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in directory.iterdir() if each.is_file()}


def test_a_mounted_volume_moves_to_its_target_while_it_is_written(
    depot: Depot, target: Path, mount: Mount, tmp_path: Path
) -> None:
    said = depot.ferry("attach", "latest", target, "--name", "moving", "--rate", "8M", "--json").json()
    assert said["device"] == "/dev/mapper/blockferry-moving"
    place = mount(said["device"])
    before = digests(tmp_path / "files")
    enough, written = threading.Event(), {}

    def write() -> None:
        number = 0
        while not enough.is_set():
            name, data = f"new-{number % 12}", os.urandom(300_000)
            with (place / name).open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            written[name] = hashlib.sha256(data).hexdigest()
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline = time.monotonic() + 200
        while Path("/run/blockferry/hot/moving.socket").exists():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(2)
    finally:
        enough.set()
        writer.join()
    assert digests(place) == before | written
    assert "blockferry" not in Path("/proc/mounts").read_text().replace("/dev/mapper/blockferry-moving", "")
    assert blockferry("status", "moving", "--json").json()["state"] == "complete"
    blockferry("detach", "moving").refused(1, "mounted at")
    run("umount", place)
    assert blockferry("detach", "moving").code == 0
    assert not Path("/dev/mapper/blockferry-moving").exists()
    run("e2fsck", "-fn", target)
    assert digests(mount(target, *([] if target.is_block_device() else ["loop"]))) == before | written
