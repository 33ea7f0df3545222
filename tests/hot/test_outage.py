"""The repository goes away, or is damaged, or the target takes no more, while a volume is in use."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import getpass
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import PASSPHRASE, Depot, borg_first, restic_first, run
from hot_support import MIB, Hot, unmount
from sshd_support import PROGRAM, Sshd

pytestmark = pytest.mark.root

SIZE = 48 * MIB
SLOWLY = ("--rate", "1M", "--threads", "1")
LATE = 36 * MIB
"""What nobody but us reads before hydration gets there: udev looks at a disk's start and end."""


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A volume of noise: all of it has to come from the repository."""
    path = tmp_path / "noise.img"
    path.write_bytes(random.Random(9).randbytes(SIZE))
    return path


@pytest.fixture
def restore(depot: Depot, noise: Path, hot, tmp_path: Path) -> Hot:
    assert depot.ferry("backup", noise).code == 0
    return hot(depot, tmp_path / "target.img")


def read(restore: Hot, offset: int, length: int) -> bytes:
    """Read from the disk, past the page cache of the loop device."""
    disk = os.open(restore.path, os.O_RDONLY)
    try:
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(disk, length, offset)
    finally:
        os.close(disk)


@contextlib.contextmanager
def away(restore: Hot) -> Iterator[None]:
    """Take the repository away; a borg that has it open would read on."""
    elsewhere = restore.depot.path.with_name("elsewhere")
    restore.depot.path.rename(elsewhere)
    for number, line in restore.processes().items():
        if "worker/__main__" in line:
            os.kill(number, signal.SIGKILL)
    try:
        yield
    finally:
        elsewhere.rename(restore.depot.path)


def in_background(work) -> tuple[threading.Thread, list[object]]:
    """Start a thread; what it returns or raises is in the list when it has ended."""
    found: list[object] = []

    def guarded() -> None:
        try:
            found.append(work())
        except OSError as error:
            found.append(error.errno)

    thread = threading.Thread(target=guarded)
    thread.start()
    return thread, found


@borg_first
def test_a_repository_that_comes_back_is_waited_for(restore: Hot, noise):
    restore.attach(*SLOWLY)
    content = noise.read_bytes()
    with away(restore):
        thread, found = in_background(lambda: read(restore, LATE, 4096))
        restore.wait_for(lambda said: said["repository"] == "waiting")
        time.sleep(2)
        assert not found
        assert restore.status()["unreadable"] == []
    thread.join(30)
    assert found == [content[LATE : LATE + 4096]]
    restore.wait_for(lambda said: said["repository"] == "reachable", 20)
    assert read(restore, 20 * MIB, MIB) == content[20 * MIB : 21 * MIB]
    restore.detach()
    restore.attach()
    restore.wait_until_finished()
    restore.detach()
    assert filecmp.cmp(noise, restore.target, shallow=False)


@restic_first
def test_patience_ends_and_the_volume_stays(restore: Hot, noise):
    restore.attach(*SLOWLY, "--patience", "2")
    content = noise.read_bytes()
    restore.wait_for(lambda said: said["hydrated"] >= 8 * MIB)
    with away(restore):
        thread, found = in_background(lambda: read(restore, LATE, 4096))
        thread.join(30)
        assert found == [errno.EIO]
        assert read(restore, MIB, MIB) == content[MIB : 2 * MIB]
        said = restore.status()
        assert (said["repository"], said["unreadable"]) == ("waiting", [])
        time.sleep(1)
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError):
            assert read(restore, LATE, 4096) == content[LATE : LATE + 4096]
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    restore.wait_for(lambda said: said["repository"] == "reachable" and said["hydrated"] > 8 * MIB, 30)
    assert restore.status()["unreadable"] == []


@restic_first
def test_a_detach_does_not_wait_for_a_repository_that_is_away(restore: Hot):
    restore.attach(*SLOWLY)
    with away(restore):
        restore.wait_for(lambda said: said["repository"] == "waiting")
        began = time.monotonic()
        assert not restore.detach()["finished"]
        assert time.monotonic() - began < 15
    restore.assert_no_traces()
    restore.attach()
    restore.wait_until_finished()


@pytest.mark.thorough
def test_a_connection_that_breaks_is_made_again(noise, hot, tmp_path, monkeypatch):
    if not PROGRAM.exists():
        pytest.skip("needs sshd: install openssh-server")
    (tmp_path / "sshd").mkdir()
    server = Sshd(tmp_path / "sshd")
    server.start()
    try:
        monkeypatch.setenv("BORG_RSH", server.rsh)
        place = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}{tmp_path}/remote"
        depot = Remote("borg", tmp_path / "remote", {"BORG_PASSPHRASE": PASSPHRASE}, place)
        run("borg", "init", "--encryption=repokey-blake2", place, env=os.environ | depot.env)
        assert depot.ferry("backup", noise).code == 0
        restore = hot(depot, tmp_path / "target.img")
        restore.attach("--rate", "8M", "--threads", "1")
        content = noise.read_bytes()
        server.kill()
        thread, found = in_background(lambda: read(restore, LATE, MIB))
        restore.wait_for(lambda said: said["repository"] == "waiting")
        server.start()
        thread.join(60)
        assert found == [content[LATE : LATE + MIB]]
        restore.wait_until_finished()
        restore.detach()
    finally:
        server.stop()
    assert filecmp.cmp(noise, restore.target, shallow=False)


class Remote(Depot):
    """A repository that is reached by ssh."""

    def __init__(self, tool: str, path: Path, env: dict[str, str], place: str) -> None:
        super().__init__(tool, path, env)
        object.__setattr__(self, "place", place)

    @property
    def reference(self) -> str:
        return f"{self.tool}:{self.place}"


def damage(depot: Depot) -> None:
    """Change some bytes in the middle of the largest file of the repository."""
    largest = max((each for each in (depot.path / "data").rglob("*") if each.is_file()), key=lambda x: x.stat().st_size)
    largest.chmod(0o600)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        file.write(b"\xaa" * 100)


def remove_a_pack(depot: Depot) -> None:
    """Remove a large file of the repository, one without which the snapshot can still be described."""
    packs = sorted(
        (each for each in (depot.path / "data").rglob("*") if each.is_file()), key=lambda x: x.stat().st_size
    )
    for pack in reversed(packs):
        aside = pack.rename(depot.path / "aside")
        nothing_is_remembered = str(depot.path.parent / f"fresh-{pack.name}")
        if depot.ferry("show", "latest", BLOCKFERRY_STATE_DIR=nothing_is_remembered).code == 0:
            aside.unlink()
            return
        aside.rename(pack)
    raise AssertionError("each pack is needed to open the snapshot")


@pytest.mark.parametrize(
    ("depot", "hurt"), [("borg", damage), ("restic", damage), ("restic", remove_a_pack)], indirect=["depot"]
)
def test_what_is_damaged_is_named_and_the_rest_is_restored(restore: Hot, noise, hurt):
    hurt(restore.depot)
    restore.attach()
    said = restore.wait_for(
        lambda said: said["unreadable"] and said["hydrated"] + sum(size for _, size in said["unreadable"]) == SIZE
    )
    lost = said["unreadable"]
    assert not said["finished"]
    assert 0 < sum(size for _start, size in lost) <= (SIZE * 9 // 10 if hurt is remove_a_pack else 8 * MIB)
    content = noise.read_bytes()
    unit = said["unit"]
    for start in range(0, SIZE, unit):
        if any(first <= start < first + size for first, size in lost):
            with pytest.raises(OSError, match="Input/output") as caught:
                read(restore, start, unit)
            assert caught.value.errno == errno.EIO
        else:
            assert read(restore, start, unit) == content[start : start + unit]
    # Who has the bytes from elsewhere can write them: then all is there.
    disk = os.open(said["path"], os.O_RDWR)
    for start, size in lost:
        os.pwrite(disk, content[start : start + size], start)
    os.close(disk)
    assert restore.wait_until_finished()["unreadable"] == []
    restore.detach()
    assert filecmp.cmp(noise, restore.target, shallow=False)


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_a_full_target_says_so_and_loses_nothing(restore: Hot, noise, tmp_path):
    small = tmp_path / "small.img"
    run("truncate", "-s", "80M", small)
    run("mkfs.ext4", "-q", "-m0", small)
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-o", "loop", small, place)
    try:
        ballast = place / "ballast"
        ballast.write_bytes(bytes(50 * MIB))
        restore.target = place / "target.img"
        restore.attach("--threads", "1")
        said = restore.wait_for(lambda said: said["failure"])
        assert "no space" in said["failure"].lower()
        assert not said["finished"]
        assert said["unreadable"] == []
        content = noise.read_bytes()
        assert read(restore, 0, SIZE) == content
        disk = os.open(said["path"], os.O_RDWR)
        with pytest.raises(OSError, match="Input/output"):
            for offset in range(SIZE - MIB, SIZE - 12 * MIB, -MIB):
                os.pwrite(disk, b"new" * 4096, offset)
                os.fsync(disk)
        os.close(disk)
        ballast.unlink()
        restore.detach()
        restore.attach()
        assert restore.wait_until_finished()["failure"] == ""
        restore.detach()
        found = restore.target.read_bytes()
        for offset in range(0, SIZE, MIB):
            piece = content[offset : offset + MIB]
            new = (b"new" * 4096) + piece[3 * 4096 :]
            assert found[offset : offset + MIB] in (piece, new) if offset > 30 * MIB else piece, offset
    finally:
        restore.clear_away()
        unmount(place)


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_a_reader_that_hangs_is_replaced(restore: Hot, noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_READ_PATIENCE", "3")
    restore.attach(*SLOWLY)
    for number in readers(restore):
        os.kill(number, signal.SIGSTOP)
    assert read(restore, LATE, 65536) == noise.read_bytes()[LATE : LATE + 65536]
    assert restore.status()["repository"] == "reachable"
    restore.detach()
    restore.assert_no_traces()


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_a_reader_that_hangs_before_it_reads_is_replaced(
    restore: Hot, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_READ_PATIENCE", "3")
    restore.attach(*SLOWLY)
    before = readers(restore)
    for number in before:
        os.kill(number, signal.SIGKILL)
    stopping = threading.Thread(target=lambda: [os.kill(each, signal.SIGSTOP) for each in new_readers(restore, before)])
    stopping.start()
    assert read(restore, LATE, 65536) == noise.read_bytes()[LATE : LATE + 65536]
    stopping.join()
    restore.detach()
    restore.assert_no_traces()


def readers(restore: Hot) -> set[int]:
    return {number for number, line in restore.processes().items() if "worker/__main__" in line}


def new_readers(restore: Hot, known: set[int]) -> set[int]:
    """Return the readers that are started next, as soon as there are any."""
    give_up = time.monotonic() + 30
    while not (found := readers(restore) - known):
        assert time.monotonic() < give_up
    return found
