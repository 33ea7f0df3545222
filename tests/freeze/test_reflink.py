"""Image files in use, cloned in an instant on the filesystems that can."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.freeze import reflink
from blockferry.hookspecs import FreezeOptions
from blockferry.snapshot import Stability
from blockferry.volume import Volume
from conftest import Attach, Mount
from freeze_support import hold, keep_open, make_image, read

pytestmark = pytest.mark.root


@pytest.fixture(params=["xfs", "btrfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, mount: Mount) -> Path:
    """A filesystem with reflinks."""
    return mount(make_image(tmp_path / "store.img", request.param, 400 << 20))


@pytest.fixture
def guest(store: Path, mount: Mount) -> Iterator[tuple[Path, Path]]:
    """An image on the store, and where it is mounted read-write."""
    image = make_image(store / "guest.img", "ext4", 48 << 20)
    return image, mount(image)


def check_filesystem(image: bytes, tmp_path: Path, *, replay: bool) -> None:
    """Have e2fsck find nothing wrong in an image, after replaying its journal if asked."""
    path = tmp_path / "checked.img"
    path.write_bytes(image)
    if replay:
        subprocess.run(["e2fsck", "-E", "journal_only", "-p", str(path)], check=True, capture_output=True)
    subprocess.run(["e2fsck", "-f", "-n", str(path)], check=True, capture_output=True)


def test_an_image_in_use_is_read_from_a_clone_of_one_instant(guest: tuple[Path, Path], tmp_path: Path) -> None:
    image, place = guest
    (place / "before").write_bytes(b"b" * 100_000)
    os.sync()
    with hold(image) as frozen:
        assert frozen.stability is Stability.CRASH_CONSISTENT
        assert frozen.method.startswith("reflink copy")
        (place / "after").write_bytes(b"AFTER" * 100_000)
        os.sync()
        copy = read(frozen)
        frozen.check()
    assert b"b" * 4096 in copy
    assert b"AFTER" * 800 not in copy
    assert b"AFTER" * 800 in image.read_bytes()
    check_filesystem(copy, tmp_path, replay=True)


def test_no_clone_has_a_name_and_its_blocks_come_back(guest: tuple[Path, Path], store: Path) -> None:
    image, _place = guest
    with hold(image):
        assert [entry.name for entry in store.iterdir()] == ["guest.img"]
    assert [entry.name for entry in store.iterdir()] == ["guest.img"]


def test_writers_go_on_while_clones_are_made(guest: tuple[Path, Path], tmp_path: Path) -> None:
    """Every clone of an image under load is a filesystem that its journal makes whole."""
    image, place = guest
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            path = place / f"file-{number % 50}"
            path.write_bytes(os.urandom(20_000))
            if number % 7 == 0:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            number += 1

    writer = threading.Thread(target=load)
    writer.start()
    try:
        for _ in range(3):
            with hold(image) as frozen:
                copy = read(frozen)
            check_filesystem(copy, tmp_path, replay=True)
    finally:
        stop.set()
        writer.join()


def test_with_a_freeze_the_clone_needs_no_journal(guest: tuple[Path, Path], tmp_path: Path) -> None:
    image, place = guest
    for number in range(200):
        (place / f"file-{number}").write_bytes(b"x" * 5000)
    with hold(image, FreezeOptions(fsfreeze_seconds=10)) as frozen:
        assert frozen.stability is Stability.FROZEN
        assert f"fsfreeze of {place}" in frozen.method
        (place / "written while the clone is read").write_bytes(b"thawed")
        copy = read(frozen)
    check_filesystem(copy, tmp_path, replay=False)
    assert b"needs_recovery" not in superblock_features(copy, tmp_path)


def superblock_features(image: bytes, tmp_path: Path) -> bytes:
    """Return the features that a filesystem's superblock lists."""
    path = tmp_path / "checked.img"
    path.write_bytes(image)
    listing = subprocess.run(["dumpe2fs", "-h", str(path)], check=True, capture_output=True).stdout
    assert b"Filesystem features:" in listing
    return next(line for line in listing.splitlines() if line.startswith(b"Filesystem features:"))


def test_what_freezing_would_not_stop_leaves_the_clone_crash_consistent(guest: tuple[Path, Path]) -> None:
    image, _place = guest
    machine = keep_open(image)  # as a virtual machine would
    try:
        with hold(image, FreezeOptions(fsfreeze_seconds=10)) as frozen:
            assert frozen.stability is Stability.CRASH_CONSISTENT
            assert "has it open for writing" in frozen.method
    finally:
        machine.kill()
        machine.wait()


def test_an_image_reached_by_a_symbolic_link_is_cloned_where_it_lies(guest: tuple[Path, Path], tmp_path: Path) -> None:
    image, _place = guest
    (tmp_path / "link.img").symlink_to(image)
    with hold(tmp_path / "link.img") as frozen:
        assert frozen.method.startswith("reflink copy")


def test_a_btrfs_image_without_copy_on_write_is_cloned(tmp_path: Path, mount: Mount) -> None:
    store = mount(make_image(tmp_path / "store.img", "btrfs", 400 << 20))
    (store / "guest.img").touch()
    subprocess.run(["chattr", "+C", str(store / "guest.img")], check=True)
    image = make_image(store / "guest.img", "ext4", 16 << 20)
    mount(image)
    with hold(image) as frozen:
        assert frozen.method.startswith("reflink copy")
        assert read(frozen)[1080:1082] == b"\x53\xef"


def why_not(path: Path | str) -> str:
    """Return why a volume cannot be cloned."""
    reasons: list[str] = []
    assert reflink.blockferry_freeze(Volume.discover(path), FreezeOptions(), reasons.append) is None
    return " ".join(reasons)


def test_a_filesystem_without_reflinks_declines(tmp_path: Path, mount: Mount) -> None:
    store = mount(make_image(tmp_path / "store.img", "ext4", 64 << 20))
    assert "Operation not supported" in why_not(make_image(store / "guest.img", "ext4", 16 << 20))
    assert [entry.name for entry in store.iterdir() if entry.is_file()] == ["guest.img"]


def test_a_store_that_is_read_only_declines(store: Path) -> None:
    image = make_image(store / "guest.img", "ext4", 16 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
    assert "Read-only file system" in why_not(image)


def test_a_device_declines(tmp_path: Path, attach: Attach) -> None:
    assert "not an image file" in why_not(attach(make_image(tmp_path / "disk.img", "ext4", 16 << 20)))
