"""Killed at random points while a filesystem on the disk is written: what was synced is there, and nothing is wrong.

`Load` keeps a journal, outside of the disk, of what it wrote and of what the filesystem acknowledged. After a kill each
of its blocks has to be what it was at the last acknowledged sync or, sector by sector as on any disk, something written
since.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from commands_support import Depot, new_depot, run
from hot_support import MIB, Hot, check_filesystem, mounted, same_tree, unmount

ROUNDS = int(os.environ.get("BLOCKFERRY_TEST_HOT_KILLS", "2"))
SEED = int(os.environ.get("BLOCKFERRY_TEST_HOT_SEED", "1"))
pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 15 * ROUNDS)]
BLOCK, SECTOR = 4096, 512
FILES = 4
BLOCKS = 192
"""Of each file that is overwritten in place."""


def block(file: int, number: int, version: int) -> bytes:
    """Return what a version of a block holds: every 32 bytes say which they are, so that no mixture is overlooked."""
    mark = hashlib.sha256(f"{file} {number} {version}".encode()).digest()
    return mark * (BLOCK // len(mark))


class Load:
    """Writes to files on a mounted filesystem by one thread each, and remembers what may be there afterwards."""

    def __init__(self) -> None:
        self.may_be: list[list[set[int]]] = [[set() for _ in range(BLOCKS)] for _ in range(FILES)]
        """The versions that each block may have: the one that was synced last, and all later ones."""
        self.log_synced = 0
        """How many records of the log were acknowledged."""
        self.log_written = 0
        self.stopping = threading.Event()
        self.versions = 1
        self.failed: set[int] = set()
        self.lost: list[str] = []

    def prepare(self, place: Path) -> None:
        """Write the first version of everything, to be part of the snapshot."""
        for file in range(FILES):
            (place / f"load{file}").write_bytes(b"".join(block(file, number, 0) for number in range(BLOCKS)))
            self.may_be[file] = [{0} for _ in range(BLOCKS)]
        (place / "log").write_bytes(b"")

    def start(self, place: Path, seed: int) -> list[threading.Thread]:
        self.stopping.clear()
        self.failed.clear()
        works = [lambda file=file: self._overwrite(place, file, seed) for file in range(FILES)]
        threads = [threading.Thread(target=work) for work in [*works, lambda: self._append(place)]]
        for thread in threads:
            thread.start()
        return threads

    def _overwrite(self, place: Path, file: int, seed: int) -> None:
        chance = random.Random(f"{seed} {file}")
        with self._until_it_fails(), open(place / f"load{file}", "r+b", buffering=0) as opened:
            while not self.stopping.is_set():
                written: dict[int, int] = {}
                for _ in range(chance.randrange(1, 12)):
                    number, self.versions = chance.randrange(BLOCKS), self.versions + 1
                    version = self.versions * 10 + file
                    self.may_be[file][number].add(version)
                    written[number] = version
                    os.pwrite(opened.fileno(), block(file, number, version), number * BLOCK)
                os.fsync(opened.fileno())
                for number, version in written.items():
                    self.may_be[file][number] = {version}

    def _append(self, place: Path) -> None:
        with self._until_it_fails(), open(place / "log", "ab", buffering=0) as opened:
            opened.truncate(0) if self.log_written == 0 else None
            while not self.stopping.is_set():
                for _ in range(5):
                    opened.write(block(9, self.log_written, 0)[:1000])
                    self.log_written += 1
                os.fsync(opened.fileno())
                self.log_synced = self.log_written
                time.sleep(0.005)

    @contextlib.contextmanager
    def _until_it_fails(self):
        """End when the disk under the filesystem is gone: EIO, or what the filesystem makes of it."""
        try:
            yield
        except OSError as error:
            self.failed.add(error.errno or 0)

    def check(self, place: Path) -> None:
        """Assert that all that was acknowledged is there, and start from what is."""
        for file in range(FILES):
            content = (place / f"load{file}").read_bytes()
            for number in range(BLOCKS):
                sectors = {
                    content[start : start + SECTOR] for start in range(number * BLOCK, (number + 1) * BLOCK, SECTOR)
                }
                versions = {block(file, number, each)[:SECTOR]: each for each in self.may_be[file][number]}
                matching = {versions.get(each) for each in sectors}
                assert None not in matching, (file, number, versions, [each[:32].hex() for each in sectors])
                self.may_be[file][number] = matching
        log = (place / "log").read_bytes()
        records = [log[start : start + 1000] for start in range(0, len(log), 1000)]
        whole = 0
        while whole < len(records) and records[whole] == block(9, whole, 0)[:1000]:
            whole += 1
        assert whole >= self.log_synced, (whole, self.log_synced, len(records))
        with open(place / "log", "r+b") as opened:
            opened.truncate(whole * 1000)
            os.fsync(opened.fileno())
        self.log_written = self.log_synced = whole


def victims(restore: Hot, kind: str) -> list[int]:
    found = restore.processes()
    marks = {"daemon": ("blockferry.hot.daemon",), "workers": ("worker/__main__",), "watchdog": ("fusermount",)}
    wanted = marks.get(kind, ("",))
    return [number for number, line in found.items() if any(mark in line for mark in wanted)]


def kill(numbers: list[int]) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize(
    ("tool", "kind"), [pytest.param("borg", "ext4", marks=pytest.mark.thorough), ("restic", "xfs")]
)
def test_what_was_synced_survives_every_kill(tool, kind, images, files, hot, tmp_path):
    Rounds(tool, kind, images, files, hot, tmp_path).play()


@pytest.mark.parametrize("depot", ["borg"], indirect=True)
def test_killed_while_it_begins_the_same_command_begins_anew(depot: Depot, hot, tmp_path):
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(3).randbytes(4 * MIB))
    assert depot.ferry("backup", noise).code == 0
    depot.env["BLOCKFERRY_LOCK_WAIT"] = "30"  # who was killed may be a while in dying, and until then has its lock
    chance = random.Random(SEED)
    for number in range(ROUNDS):
        restore = hot(depot, tmp_path / f"target-{number}.img")
        attaching = threading.Thread(target=restore.try_to_attach)
        attaching.start()
        time.sleep(chance.uniform(0.2, 1))
        kill(victims(restore, "everything"))
        attaching.join(60)
        restore.attach()
        restore.wait_until_finished()
        restore.detach()
        restore.assert_no_traces()
        assert filecmp.cmp(noise, restore.target, shallow=False)


class Rounds:
    """Restores of one volume that are killed again and again; the volume as it should be goes with them."""

    def __init__(self, tool: str, kind: str, images, files: Path, hot, tmp_path: Path) -> None:
        self.files, self.hot, self.home = files, hot, tmp_path
        self.depot = new_depot(tool, tmp_path / "repository")
        self.chance = random.Random(f"{SEED} {tool} {kind}")
        self.image = tmp_path / "volume.img"
        run("cp", "--sparse=always", images[kind], self.image)
        with mounted(self.image, tmp_path / "place", "loop") as place:
            Load().prepare(place)
        assert self.depot.ferry("backup", self.image).code == 0
        self.point = tmp_path / "mounted"
        self.point.mkdir()
        self.options = ["-o", "nouuid"] if kind == "xfs" else []

    def begin(self) -> None:
        self.target = self.home / f"target-{self.chance.randrange(10**9)}.img"
        self.load = Load()
        self.load.may_be = [[{0} for _ in range(BLOCKS)] for _ in range(FILES)]
        self.restore = self.hot(self.depot, self.target)

    def play(self) -> None:
        self.begin()
        for number in range(ROUNDS):
            self.one(number, ["daemon", "everything", "workers", "watchdog"][number % 4])
            if number % 5 == 4 or number == ROUNDS - 1:
                self.finish()
                self.begin()

    def one(self, number: int, victim: str) -> None:
        said = self.restore.attach("--rate", self.chance.choice(["2M", "6M", "30M"]), "--threads", "2")
        assert list(self.restore.loops()) == [Path(said["device"]).name]
        run("mount", *self.options, said["device"], self.point)
        try:
            self.load.check(self.point)
            threads = self.load.start(self.point, number)
            time.sleep(self.chance.uniform(0.05, 2.5))
            kill(victims(self.restore, victim))
            if victim in ("workers", "watchdog"):
                self.goes_on(threads)
                return
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
        finally:
            self.load.stopping.set()
            unmount(self.point)
        self.is_broken_off(said["device"])

    def goes_on(self, threads: list[threading.Thread]) -> None:
        """Nobody who uses the disk notices; take it away in order, or not, and begin the next round."""
        synced = self.load.log_synced
        same_tree(self.files / "d1", self.point / "d1")
        time.sleep(self.chance.uniform(0.2, 1))
        self.load.stopping.set()
        for thread in threads:
            thread.join(60)
        assert self.load.failed == set()
        assert self.load.log_synced > synced
        self.load.check(self.point)
        unmount(self.point)
        assert self.restore.status()["unreadable"] == []
        self.restore.detach()
        self.restore.assert_no_traces()
        if self.restore.target.exists() and self.restore.try_to("status").code:
            self.finish_check()
            self.begin()

    def is_broken_off(self, device: str) -> None:
        assert self.load.failed <= {errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.EUCLEAN, errno.ENOTCONN, 0}
        assert self.restore.status()["state"] in ("broken off", "complete")

    def finish(self) -> None:
        """Let it come to its end, and compare."""
        self.restore.attach()
        self.restore.wait_until_finished()
        self.restore.detach()
        self.restore.assert_no_traces()
        self.finish_check()

    def finish_check(self) -> None:
        with mounted(self.target, self.home / "place", "loop") as place:
            self.load.check(place)
            for each in self.files.iterdir():
                if each.is_dir():
                    same_tree(each, place / each.name)
            run("cmp", self.files / "text", place / "text")
            run("cmp", self.files / "sparse", place / "sparse")
        check_filesystem(self.target)
        self.target.unlink()
