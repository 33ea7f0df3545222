"""Round trips: what a group's snapshot holds is what the filesystem says, after a first backup and after others."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.manager import plugin_manager, repository_named
from blockferry.repository import Repository
from commands_support import Depot, new_depot
from groups_disks_support import Memory, assert_same, back_up, filesystem

pytestmark = pytest.mark.root

HOSTILE = [b"\xff\xfe not UTF-8 \x80", b"a\nnew line", b"x" * 255, b" ", b"-rf", b"\x01\x1b[31m", "Zoë".encode()]
KINDS = ["ext4", "ext4-inline", "xfs", "btrfs", "btrfs-zstd", "tmpfs"]


@pytest.fixture(scope="module", params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with filesystem(request.param, tmp_path_factory.mktemp(request.param)) as point:
        yield point


@pytest.fixture
def top(disk: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of this test's own."""
    place = disk / f"top-{len(list(disk.iterdir()))}"
    place.mkdir()
    yield place
    subprocess.run(["rm", "-rf", str(place)], check=True)


@pytest.fixture
def depot_of(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Repository]:
    """A real repository of the tool that the test names."""
    depot: Depot = new_depot(request.param, tmp_path / "repository")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in depot.env.items():
            patch.setenv(name, value)
        with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
            yield repository


def furnish(top: Path, seed: int = 1) -> None:
    """Make some of everything."""
    chance = random.Random(seed)
    for number in range(40):
        path = top / f"d{number % 3}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([0, 1, 100, 4096, 5000, 70_000])))
    for name in HOSTILE:
        Path(os.fsdecode(os.path.join(os.fsencode(top), name))).write_bytes(name * 7)
    (top / "text").write_text("all work and no play\n" * 20_000)
    (top / "large").write_bytes(chance.randbytes(300_001))
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"in the middle")
        sparse.truncate(3 << 20)
    with (top / "only a hole").open("wb") as hole:
        hole.truncate(1 << 20)
    with (top / "preallocated").open("wb") as file:
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, 200_000)
        file.seek(50_000)
        file.write(b"written")
    (top / "link").symlink_to("text")
    (top / "nowhere").symlink_to(os.fsdecode(b"\xff" * 200))
    os.link(top / "large", top / "d0" / "hard")
    os.link(top / "link", top / "hard symlink", follow_symlinks=False)
    os.mkfifo(top / "pipe")
    os.mknod(top / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(top)
        listener.bind("socket")
        os.chdir("/")
    (top / "empty directory").mkdir(mode=0o711)
    os.setxattr(top / "text", "user.colour", b"blue\0" * 20)
    os.setxattr(top / "d1", "user.directory", b"")
    os.setxattr(top / "link", "trusted.link", b"on a link", follow_symlinks=False)
    os.chown(top / "text", 1234, 4321)
    (top / "d2" / "f2").chmod(0o4711)
    os.utime(top / "d2", ns=(0, -123_456_789))


def change(top: Path) -> None:
    """Make some of every change."""
    chance = random.Random(2)
    files = sorted((top / "d0").glob("f*"))
    files[0].unlink()
    (top / "new").write_bytes(chance.randbytes(9000))
    (top / "d1" / "new directory").mkdir()
    (top / "d1" / "new directory" / "new").write_bytes(b"")
    files[1].write_bytes(chance.randbytes(5000))
    with files[2].open("ab") as file:
        file.write(chance.randbytes(10_000))
    os.truncate(top / "text", 4097)
    files[3].rename(top / "renamed")
    files[4].replace(files[5])
    os.link(files[6], top / "hard too")
    (top / "d0" / "hard").unlink()
    files[7].touch()
    files[8].chmod(0o600)
    os.setxattr(top / "d1" / "f1", "user.new", b"1")
    os.removexattr(top / "text", "user.colour")
    with (top / "large").open("r+b") as file:
        file.seek(150_000)
        file.write(b"in place")
    with (top / "sparse").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"more")
    (top / "link").unlink()
    (top / "link").mkdir()


def test_everything_is_stored_as_it_is_and_again_after_changes(top: Path) -> None:
    furnish(top)
    repository = Memory()
    first = back_up(top, repository)
    assert first.problems == ()
    assert_same(repository, first, top)
    change(top)
    time.sleep(0.1)  # what changed just now is read once more
    second = back_up(top, repository)
    assert second.problems == ()
    assert second.result.record.base == first.result.snapshot.id
    assert_same(repository, second, top)
    third = back_up(top, repository)
    assert third.result.record.base == second.result.snapshot.id
    assert third.result.bytes_read == 0
    assert_same(repository, third, top)


@pytest.mark.parametrize("depot_of", ["borg", "restic"], indirect=True)
@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
def test_real_repositories_hold_it_too(top: Path, depot_of: Repository) -> None:
    furnish(top)
    assert_same(depot_of, back_up(top, depot_of), top)
    change(top)
    assert_same(depot_of, back_up(top, depot_of), top)
