"""`blockferry files --in-place`: damaged blocks of files come back, and nothing else of a volume is ever written to."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blockferry.errors import BlockferryError, TargetError
from blockferry.fiemap import file_extents
from blockferry.groups import held, in_place
from blockferry.groups.in_place import BroughtBack, bring_back_in_place
from blockferry.groups.listing import select
from blockferry.groups.stored import StoredGroup, open_group
from blockferry.groups.table import CHANGED
from blockferry.manager import plugin_manager, repository_named
from blockferry.progress import Silent
from blockferry.snapshot import find
from commands_support import Depot, new_depot
from groups_support import back_up
from volumes_support import make_image, run

pytestmark = pytest.mark.root

Attach = Callable[..., str]
SIZE, BTRFS_SIZE = 48 << 20, 128 << 20
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-b", "4096"),
    "ext4 of 1 KiB": ("mkfs.ext4", "-q", "-b", "1024"),
    "ext2": ("mkfs.ext2", "-q", "-b", "4096"),
    "ext4 with inline data": ("mkfs.ext4", "-q", "-O", "inline_data", "-I", "256"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
}
CHECK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A volume that was unmounted after a backup of the files below `top`, and where each of these lies on it."""

    image: Path
    depot: Depot
    extents: dict[str, list[tuple[int, int]]]
    group: StoredGroup

    @property
    def kind(self) -> str:
        return "xfs" if self.image.name.startswith("xfs") else "ext4"

    def copy(self, to: Path) -> Path:
        """Return a copy to be damaged, changed and brought back."""
        run("cp", "--sparse=always", self.image, to)
        return to


@contextlib.contextmanager
def mounted(image: Path | str, place: Path, *options: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(("loop", *options) if Path(image).is_file() else options), image, place)
    try:
        yield place
    finally:
        for _ in range(20):
            if not subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode:
                break
            time.sleep(0.1)


def addresses(path: Path) -> list[tuple[int, int]]:
    """Return (address, length) of what a file has on its volume, in the order of the file, none beyond its end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found, size = file_extents(descriptor), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    ends = np.minimum(found.ends, size)
    return list(zip(found.addresses.tolist(), (ends - found.starts).tolist(), strict=True))


def fill(top: Path) -> None:
    """Make files of every kind that can be brought back."""
    chance = random.Random(11)
    (top / "mail").mkdir()
    (top / "mail" / "small").write_bytes(chance.randbytes(5000))
    (top / "big").write_bytes(chance.randbytes(6_000_123))
    os.link(top / "big", top / "mail" / "hard")
    with (top / "in pieces").open("wb") as one, (top / "other").open("wb") as two:
        for number in range(12):
            (one if number % 2 else two).write(chance.randbytes(50_000))
            for file in (one, two):
                file.flush()
                os.fsync(file.fileno())
    with (top / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(chance.randbytes(10_000))
        file.truncate(3 << 20)
    (top / "empty").touch()
    (top / "link").symlink_to("big")


@contextlib.contextmanager
def stored(kind: str, tool: str, place: Path, fill: Callable[[Path], object] = fill) -> Iterator[Stored]:
    """Make a filesystem with files in it, and back them up."""
    place.mkdir(exist_ok=True)
    image = make_image(place / f"{kind.split(maxsplit=1)[0]}.img", BTRFS_SIZE if kind == "btrfs" else SIZE)
    run(*MKFS[kind], image)
    depot = new_depot(tool, place / "repository")
    with mounted(image, place / "mounted") as point:
        (point / "top").mkdir()
        fill(point / "top")
        back_up(depot, point / "top")
        found = [path for path in (point / "top").rglob("*") if path.is_file() and not path.is_symlink()]
        extents = {str(path.relative_to(point / "top")): addresses(path) for path in found}
    run("sync", image)
    with opened(depot) as group:
        yield Stored(image, depot, extents, group)


@contextlib.contextmanager
def opened(depot: Depot) -> Iterator[StoredGroup]:
    with pytest.MonkeyPatch.context() as patch:
        for name, text in depot.env.items():
            patch.setenv(name, text)
        with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
            group = open_group(repository, find(repository.snapshots(), "latest"))
            with contextlib.closing(group.image):
                yield group


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    with stored("ext4", "borg", tmp_path_factory.mktemp("ext4")) as found:
        yield found


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    with stored("xfs", "restic", tmp_path_factory.mktemp("xfs")) as found:
        yield found


@pytest.fixture(scope="module", params=["ext4 of 1 KiB", "ext2"])
def other_ext(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    with stored(request.param, "borg", tmp_path_factory.mktemp("other")) as found:
        yield found


@pytest.fixture(params=["ext4", "xfs"])
def volume(request: pytest.FixtureRequest) -> Stored:
    found: Stored = request.getfixturevalue(request.param)
    return found


def put(image: Path | str, address: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(address)
        file.write(data)


def damage(stored: Stored, image: Path, *names: str) -> int:
    """Write garbage to some blocks of files, up to their ends; return how many bytes the blocks of 4 KiB have."""
    blocks: set[int] = set()
    for name in names:
        for address, length in stored.extents[name]:
            part = min(length, 9000)
            for start in (address, address + length - part):
                put(image, start, random.Random(start).randbytes(part))
                blocks.update(range(start // 4096, -(-(start + part) // 4096)))
    return len(blocks) * 4096


def same(one: Path, other: Path) -> bool:
    return not subprocess.run(["cmp", "--silent", str(one), str(other)], check=False).returncode


def nothing_is_left(*paths: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text()
    return "/run/blockferry/mounts/in-place" not in mounts and not any(map(held.loops_of, map(str, paths)))


def bring_back(stored: Stored, image: Path | str, *patterns: str, **options: bool) -> BroughtBack:
    rows = select(stored.group.table, patterns)
    return bring_back_in_place(plugin_manager(), stored.group, rows, str(image), Silent(), **options)


def test_damaged_blocks_come_back_and_everything_else_stays(volume: Stored, tmp_path: Path) -> None:
    before, image, damaged = damaged_copy(volume, tmp_path)
    done = volume.depot.ferry("files", "latest", "--in-place", image, "--json").json()
    assert same(image, before)
    assert done["files"] == 7
    assert done["bytes_compared"] == sum(
        length for name, found in volume.extents.items() if name != "mail/hard" for _address, length in found
    )
    assert done["bytes_written"] == damaged
    assert (done["dry_run"], done["bytes_unreadable"], done["target"]) == (False, 0, str(image))
    run(*CHECK[volume.kind], image)
    assert bring_back(volume, image).bytes_written == 0
    assert nothing_is_left(image)


def test_smaller_blocks_and_a_filesystem_without_a_journal_serve_as_well(other_ext: Stored, tmp_path: Path) -> None:
    before, image, _damaged = damaged_copy(other_ext, tmp_path)
    assert bring_back(other_ext, image).bytes_written > 0
    assert same(image, before)
    run(*CHECK["ext4"], image)


def damaged_copy(stored: Stored, place: Path) -> tuple[Path, Path, int]:
    """Return a copy of the volume, and one of that with damaged files, and how many bytes the damaged blocks have."""
    before = stored.copy(place / "before.img")
    # What lies behind the end of a file is not the file's.
    for name in ("big", "mail/small"):
        address, length = stored.extents[name][-1]
        put(before, address + length, b"not of the file")
    image = place / "volume.img"
    shutil.copyfile(before, image)
    damaged = damage(stored, image, "big", "mail/small", "in pieces", "sparse")
    assert not same(image, before)
    return before, image, damaged


def test_blocks_of_a_device_come_back(volume: Stored, attach: Attach, tmp_path: Path) -> None:
    before, image, damaged = damaged_copy(volume, tmp_path)
    device = attach(image)
    done = volume.depot.ferry("files", "latest", "--in-place", device, "--dry-run")
    assert done.code == 0, done.err
    assert "would be written" in done.out
    assert not same(image, before)
    assert bring_back(volume, device).bytes_written == damaged
    run("blockdev", "--flushbufs", device)
    assert same(image, before)


def test_only_what_a_pattern_selects_comes_back(ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    damage(ext4, image, "in pieces")
    expected = tmp_path / "expected.img"
    shutil.copyfile(image, expected)
    damage(ext4, image, "mail/small")
    assert bring_back(ext4, image, "mail").files == 2
    assert same(image, expected)


def test_a_dry_run_writes_nothing_and_says_what_would_be(ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    damage(ext4, image, "mail/small")
    damaged = tmp_path / "damaged.img"
    shutil.copyfile(image, damaged)
    time_of_change = image.stat().st_mtime_ns
    assert bring_back(ext4, image, dry_run=True).bytes_written == 8192
    assert same(image, damaged)
    assert image.stat().st_mtime_ns == time_of_change


@pytest.mark.parametrize("words", [("--dry-run", "--list"), ("--in-place", "/nowhere", "--list"), ("--dry-run",)])
def test_words_that_do_not_go_together_are_refused(words: tuple[str, ...], ext4: Stored) -> None:
    ext4.depot.ferry("files", "latest", *words).refused(2, "--in-place" if "/nowhere" in words else "--")


def refuses(stored: Stored, image: Path | str, *words: str, force: bool = False) -> None:
    """Assert that nothing is brought back, for a reason with these words, and nothing was written."""
    before = Path(image).read_bytes()
    with pytest.raises(BlockferryError) as refusal:
        bring_back(stored, image, force=force)
    for word in words:
        assert word in str(refusal.value)
    assert Path(image).read_bytes() == before
    assert nothing_is_left()


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_mounted_volume_is_refused(mode: str, ext4: Stored, attach: Attach, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    device = attach(image)
    with mounted(device, tmp_path / "point", mode):
        run("sync", "-f", tmp_path / "point")
        refuses(ext4, image, "is mounted read-only at" if mode == "ro" else "is mounted read-write at")
        ext4.depot.ferry("files", "latest", "--in-place", device).refused(1, "mounted", "unmount it")
    refuses(ext4, image, "loop device")


def test_an_image_that_somebody_may_write_to_is_refused(ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    with image.open("r+b"):
        refuses(ext4, image, "open for writing")


def test_another_filesystem_is_refused(ext4: Stored, xfs: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    refuses(xfs, image, "not the volume of the snapshot")
    run("debugfs", "-w", "-R", "set_super_value uuid random", image)
    refuses(ext4, image, "not the volume of the snapshot")


def test_what_is_no_ext_or_xfs_is_refused(ext4: Stored, tmp_path: Path) -> None:
    image = make_image(tmp_path / "volume.img", BTRFS_SIZE)
    refuses(ext4, image, "no filesystem")
    run("mkfs.btrfs", "-q", image)
    refuses(ext4, image, "btrfs", "--to")


def test_files_on_btrfs_are_refused(tmp_path: Path) -> None:
    with stored("btrfs", "borg", tmp_path / "btrfs", write_small) as found:
        refuses(found, found.image, "holds btrfs", "--to")


def write_small(top: Path) -> None:
    (top / "inline").write_bytes(b"inline")
    (top / "plain").write_bytes(bytes(range(256)) * 64)


def rewrite(top: Path) -> None:
    """Write a file anew, elsewhere: its inode and size stay."""
    content = (top / "big").read_bytes()
    (top / "spare").write_bytes(bytes(7 << 20))
    os.truncate(top / "big", 0)
    os.sync()
    with contextlib.suppress(OSError), (top / "in the way").open("wb", buffering=0) as file:
        while file.write(bytes(64 << 10)):
            pass
    (top / "spare").unlink()
    os.sync()
    with (top / "big").open("r+b") as file:
        file.write(content)
    (top / "in the way").unlink()


def replace(top: Path) -> None:
    """Put a copy in the place of a file."""
    shutil.copy2(top / "big", top / "copy")
    (top / "copy").rename(top / "big")


def lead_elsewhere(top: Path) -> None:
    """Put a symbolic link in the place of a directory."""
    (top / "mail").rename(top / "mail of old")
    (top / "mail").symlink_to("mail of old")


def write_to(top: Path) -> None:
    """Write to a file, which stays where it is."""
    with (top / "big").open("r+b") as file:
        file.write(b"what was written since")


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "rewritten": (rewrite, ("big: it lies elsewhere",)),
    "replaced": (replace, ("big: another file is there",)),
    "truncated": (lambda top: os.truncate(top / "big", 4096), ("big: it has 4096 bytes",)),
    "grown": (lambda top: os.truncate(top / "mail" / "small", 9000), ("mail/small: it has 9000 bytes",)),
    "deleted": (lambda top: (top / "mail" / "small").unlink(), ("1 of 7", "mail/small: it is not there")),
    "led elsewhere": (lead_elsewhere, ("2 of 7", "mail/small: it is not there", "mail/hard: it is not there")),
    "filled": (lambda top: put(top / "sparse", 0, b"x"), ("sparse: it lies elsewhere",)),
    "written to": (write_to, ("2 of 7", "big: it was changed since", "--force")),
    "without its root": (lambda top: top.rename(top.with_name("else")), ("root", "not on the volume")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_are_not_as_they_were_are_refused(name: str, volume: Stored, tmp_path: Path) -> None:
    change, words = CHANGES[name]
    image = volume.copy(tmp_path / "volume.img")
    with mounted(image, tmp_path / "point") as point:
        change(point / "top")
    refuses(volume, image, *words)
    if name == "rewritten":
        refuses(volume, image, *words, force=True)
    if name not in ("written to", "without its root"):
        damage(volume, image, "in pieces")
        assert bring_back(volume, image, "in pieces").bytes_written > 0


def test_what_was_written_to_a_file_since_is_taken_back_by_force(ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    with mounted(image, tmp_path / "point") as point:
        write_to(point / "top")
    assert bring_back(ext4, image, "big", force=True).bytes_written == 4096
    (address, length), *_more = ext4.extents["big"]
    with open(image, "rb") as one, open(ext4.image, "rb") as other:
        assert os.pread(one.fileno(), length, address) == os.pread(other.fileno(), length, address)


def test_a_dirty_journal_is_refused(volume: Stored, tmp_path: Path) -> None:
    image, dirty = volume.copy(tmp_path / "volume.img"), tmp_path / "dirty.img"
    with mounted(image, tmp_path / "point") as point:
        (point / "new").write_bytes(b"content")
        run("sync", "-f", point)
        run("sync", image)
        shutil.copyfile(image, dirty)
    refuses(volume, dirty, "not clean", "Mount and unmount it once")
    with mounted(dirty, tmp_path / "point"):
        pass
    assert bring_back(volume, dirty).bytes_written == 0


def test_an_xfs_that_was_frozen_and_not_unmounted_is_refused(xfs: Stored, tmp_path: Path) -> None:
    image, frozen = xfs.copy(tmp_path / "volume.img"), tmp_path / "frozen.img"
    with mounted(image, tmp_path / "point") as point:
        (point / "new").write_bytes(b"content")
        run("fsfreeze", "--freeze", point)
        try:
            run("sync", image)
            shutil.copyfile(image, frozen)
        finally:
            run("fsfreeze", "--unfreeze", point)
    refuses(xfs, frozen, "not clean")


def test_an_ext4_marked_as_damaged_is_refused(ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    run("debugfs", "-w", "-R", "set_super_value state 3", image)
    refuses(ext4, image, "not clean", "e2fsck")


def test_blocks_that_files_share_are_refused(xfs: Stored, tmp_path: Path) -> None:
    image = xfs.copy(tmp_path / "volume.img")
    with mounted(image, tmp_path / "point") as point:
        run("cp", "--reflink=always", point / "top" / "big", point / "top" / "copy")
    refuses(xfs, image, "2 of 7", "big: it shares blocks")


def test_files_whose_blocks_were_not_read_are_refused(tmp_path: Path) -> None:
    with stored("ext4 with inline data", "borg", tmp_path / "inline", write_small) as found:
        refuses(found, found.image, "1 of 2", "inline: it was read as a file")
        assert bring_back(found, found.image, "plain").bytes_compared == 64 << 8


def with_table(stored: Stored, **columns: np.ndarray) -> Stored:
    table = dataclasses.replace(stored.group.table, **columns)
    return dataclasses.replace(stored, group=dataclasses.replace(stored.group, table=table))


def test_files_that_changed_during_the_backup_are_refused(ext4: Stored, tmp_path: Path) -> None:
    image, entries = ext4.copy(tmp_path / "volume.img"), ext4.group.table.entries.copy()
    entries["flags"][list(ext4.group.table.paths()).index(b"big")] = CHANGED
    refuses(with_table(ext4, entries=entries), image, "2 of 7", "big: it changed while", "hard: it changed while")


@pytest.mark.parametrize("shift", [4096, 1 << 40, -(1 << 20)])
def test_a_table_that_leads_elsewhere_writes_nothing(shift: int, ext4: Stored, tmp_path: Path) -> None:
    image, extents = ext4.copy(tmp_path / "volume.img"), ext4.group.table.extents.copy()
    extents["address"] += shift
    refuses(with_table(ext4, extents=extents), image, "6 of 7", "lies elsewhere")


def test_blocks_that_cannot_be_read_are_written(
    ext4: Stored, attach: Attach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    (address, length), *_more = ext4.extents["mail/small"]
    assert length == 5000
    damage(ext4, image, "mail/small")
    device = attach(image)
    bad = {address // 4096, address // 4096 + 1}
    read, write = os.preadv, os.pwrite

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        blocks = range(offset // 4096, -(-(offset + sum(map(len, buffers))) // 4096))
        if os.fstat(descriptor).st_rdev == os.stat(device).st_rdev and bad & set(blocks):
            raise OSError(errno.EIO, "bad sector")
        return read(descriptor, buffers, offset)

    def mending(descriptor: int, data: memoryview, offset: int) -> int:
        bad.difference_update(range(offset // 4096, (offset + len(data)) // 4096))
        return write(descriptor, data, offset)

    monkeypatch.setattr(in_place.os, "preadv", failing)
    monkeypatch.setattr(in_place.os, "pwrite", mending)
    done = bring_back(ext4, device)
    assert (done.bytes_written, done.bytes_unreadable) == (8192, 8192)
    assert not bad
    run("blockdev", "--flushbufs", device)
    assert same(image, ext4.image)


def test_nobody_else_gets_at_the_volume_meanwhile(
    ext4: Stored, attach: Attach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    damage(ext4, image, "big")
    damaged = tmp_path / "damaged.img"
    shutil.copyfile(image, damaged)
    check, errors = in_place.check_files, []

    def intruding(*arguments: object, **options: object) -> int:
        for flags in (os.O_RDWR | os.O_NONBLOCK, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK):
            try:
                os.close(os.open(path, flags))
            except OSError as error:
                errors.append(error.errno)
        return check(*arguments, **options)

    monkeypatch.setattr(in_place, "check_files", intruding)
    path: Path | str = image
    with pytest.raises(TargetError, match="somebody else wants to write"):
        bring_back(ext4, image)
    assert errors == [errno.EWOULDBLOCK, errno.EWOULDBLOCK]
    assert same(image, damaged)
    errors.clear()
    path = attach(image)
    bring_back(ext4, path)
    assert errors == [errno.EBUSY]


def test_who_writes_while_files_are_looked_at_is_noticed(
    ext4: Stored, attach: Attach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    damage(ext4, image, "big")
    device = attach(image)
    check = in_place.check_files

    def intruding(*arguments: object, **options: object) -> int:
        with open(device, "r+b", buffering=0) as file:
            file.write(os.pread(file.fileno(), 512, 0))
        return check(*arguments, **options)

    monkeypatch.setattr(in_place, "check_files", intruding)
    with pytest.raises(TargetError, match="nothing was written"):
        bring_back(ext4, device)


def test_a_filesystem_without_leases_still_serves(
    ext4: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    damage(ext4, image, "big")
    control = fcntl.fcntl

    def without(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "no leases")
        return control(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)
    bring_back(ext4, image)
    monkeypatch.undo()
    assert same(image, ext4.image)


def test_an_interruption_leaves_nothing_mounted(ext4: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ext4.copy(tmp_path / "volume.img")

    def interrupted(*_arguments: object, **_options: object) -> int:
        assert not nothing_is_left(image)
        raise KeyboardInterrupt

    monkeypatch.setattr(in_place, "check_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bring_back(ext4, image)
    assert nothing_is_left(image)
    assert same(image, ext4.image)


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_process_that_is_killed_leaves_nothing_mounted(name: str, code: int, ext4: Stored, tmp_path: Path) -> None:
    image = ext4.copy(tmp_path / "volume.img")
    script = (
        "import os, signal, time\n"
        "from blockferry.cli.main import main\n"
        "from blockferry.groups import in_place\n"
        "def look(*_arguments, **_options):\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(60)\n"
        "in_place.check_files = look\n"
        "main()\n"
    )
    words = ["files", "latest", "--in-place", str(image), "--repo", ext4.depot.reference]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=os.environ | ext4.depot.env, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr
    deadline = time.monotonic() + 10
    while not nothing_is_left(image) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert nothing_is_left(image)
    assert ext4.depot.ferry("files", "latest", "--in-place", image).code == 0
