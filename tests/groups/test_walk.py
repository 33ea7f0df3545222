"""What a walk comes to, and what it says of what it does not come to."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.errors import VolumeError
from blockferry.groups import walk
from groups_disks_support import Memory, assert_same, back_up, contents, filesystem, opened
from volumes_support import run

pytestmark = pytest.mark.root


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    with filesystem("ext4", tmp_path) as point:
        yield point


def stored(top: Path, **what: object) -> tuple[dict[bytes, bytes], list[tuple[bytes, str]]]:
    """Return what is stored, by path, and the problems."""
    repository = Memory()
    result = back_up(top, repository, **what)
    group = opened(repository, result)
    return dict(zip(group.table.paths(), contents(group), strict=True)), list(result.problems)


def test_patterns_and_tags_say_what_is_stored(top: Path) -> None:
    for path in ("a/keep", "a/drop.tmp", "b/.nobackup", "b/inside", "c/d/wanted", "c/other"):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(path)
    found, problems = stored(
        top,
        patterns=("- **/*.tmp", "- lost+found"),
        exclude_if_present=(".nobackup",),
        paths=(f"{top}/a", f"{top}/b", f"{top}/c/d"),
    )
    assert problems == []
    assert set(found) == {b"", b"a", b"a/keep", b"b", b"c", b"c/d", b"c/d/wanted"}


def test_paths_that_no_walk_comes_to_are_named(top: Path) -> None:
    (top / "there").mkdir()
    (top / "link").symlink_to("there")
    (top / "there" / "file").write_text("file")
    (top / "mounted").mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", top / "mounted")
    paths = tuple(f"{top}/{name}" for name in ("missing", "link/file", "mounted", "there"))
    found, problems = stored(top, paths=paths)
    assert {path for path, _why in problems} == {os.fsencode(path) for path in paths[:3]}
    assert found[b"there/file"] == b"file"


def test_a_root_that_is_a_link_is_followed_and_one_that_is_a_file_refused(top: Path, tmp_path: Path) -> None:
    (top / "file").write_text("file")
    (tmp_path / "link").symlink_to(top)
    found, _problems = stored(tmp_path / "link")
    assert found[b"file"] == b"file"
    with pytest.raises(VolumeError):
        stored(top / "file")


def test_mounts_are_not_crossed_and_a_file_that_is_mounted_over_another_is_read_from_its_own(
    top: Path, tmp_path: Path
) -> None:
    (top / "inside").mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", top / "inside")
    (top / "inside" / "file").write_text("not of this filesystem")
    with filesystem("xfs", tmp_path / "other") as other:
        (other / "elsewhere").write_bytes(b"elsewhere" * 5000)
        (top / "file").write_bytes(b"below" * 5000)
        run("mount", "--bind", other / "elsewhere", top / "file")
        found, problems = stored(top)
        run("umount", top / "file")
    assert problems == []
    assert found[b"file"] == b"elsewhere" * 5000
    assert b"inside" in found
    assert b"inside/file" not in found


def test_directories_may_vanish_while_they_are_walked(top: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            place = top / f"d{number % 20}"
            if place.exists():
                for each in place.iterdir():
                    each.unlink()
                place.rmdir()
            else:
                place.mkdir()
                (place / "file").write_text("file")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5):
            _found, problems = stored(top)
            assert problems == []
    finally:
        stop.set()
        thread.join()


def test_many_entries_are_walked_by_several_processes(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_ENTRIES_AT_ONCE", 100)
    for directory in range(12):
        (top / f"d{directory}").mkdir()
        for number in range(150):
            (top / f"d{directory}" / f"f{number}").write_bytes(b"%d" % number * (number % 4))
    repository = Memory()
    assert_same(repository, back_up(top, repository), top)
    assert_same(repository, back_up(top, repository), top)
