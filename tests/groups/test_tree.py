"""A group's files, mounted: as they were, for those who may see them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.errors import DamagedSnapshotError
from blockferry.fuse import mounted_on
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import GONE, UNREADABLE
from blockferry.groups.tree import GroupTree
from commands_support import Depot, command
from groups_support import LINK, Memory, group_of, make_tree, state_of, store_in, table_of

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "top")


@pytest.fixture(scope="module")
def group(tree: Path) -> StoredGroup:
    return group_of(tree)


@pytest.fixture(scope="module")
def shown(group: StoredGroup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mounted")
    with mounted_on(GroupTree(group), place):
        yield place


def test_everything_is_there_as_it_was(shown: Path, tree: Path) -> None:
    assert state_of(shown) == state_of(tree)


def test_nothing_can_be_written_or_removed(shown: Path) -> None:
    for change in (
        lambda: (shown / "new").touch(),
        lambda: (shown / "empty").unlink(),
        lambda: (shown / "big").write_bytes(b"x"),
        lambda: os.setxattr(shown / "big", "user.x", b"1"),
    ):
        with pytest.raises(OSError, match=r"Read-only|not supported"):
            change()


def test_names_that_are_not_there_are_not_found(shown: Path) -> None:
    assert not (shown / "nothing").exists()
    assert not (shown / "private" / "big").exists()
    with pytest.raises(OSError, match="No data"):
        os.getxattr(shown / "big", "user.nothing")


def test_another_user_sees_what_the_modes_say(shown: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for place in (shown, *shown.parents[:2]):
        if not place.is_mount():
            os.chmod(place, 0o755)
    os.chmod(tmp_path_factory.getbasetemp(), 0o755)
    code = "import os, sys; os.setgid(65534); os.setuid(65534); print(len(open(sys.argv[1], 'rb').read()))"

    def read(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)

    assert read(shown / "sparse").stdout == f"{(9 << 20) + 123}\n"
    assert "Permission denied" in read(shown / "private" / "file").stderr


def test_setuid_programs_and_devices_are_harmless(shown: Path) -> None:
    options = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {shown} " in line).split()[3]
    assert {"ro", "nosuid", "nodev"} <= set(options.split(","))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_any_range_of_a_file_with_holes_reads_as_it_was(offset: int, length: int) -> None:
    content = bytearray(50)
    pieces = [(3, 5, 11), (8, 7, 40), (30, 1, 0), (45, 4, 60)]
    image = bytes(range(100, 200))
    for logical, size, place in pieces:
        content[logical : logical + size] = image[place : place + size]
    extents = [(*piece, -1) for piece in pieces]
    table = table_of({"name": b"f", "size": 50, "extents": extents})
    tree = GroupTree(StoredGroup(None, table, Bytes(image)))  # type: ignore[arg-type]
    buffer = bytearray(b"\xee" * length)
    count = tree.read_into(1, offset, memoryview(buffer))
    assert bytes(buffer[:count]) == bytes(content[offset : offset + length])


class Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def test_content_that_cannot_be_had_is_an_error_of_that_read_alone(
    group: StoredGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Damaged(Memory):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise DamagedSnapshotError("a chunk is missing")

    with mounted_on(GroupTree(dataclasses.replace(group, image=Damaged(b""))), tmp_path):
        with pytest.raises(OSError, match="Input/output"):
            (tmp_path / "private" / "file").read_bytes()
        assert (tmp_path / "hole").read_bytes() == bytes(3 << 20)
    assert "private/file: a chunk is missing" in caplog.text
    assert "Traceback" not in caplog.text


def test_what_was_removed_during_the_backup_is_not_there_and_what_could_not_be_read_is_an_error(tmp_path: Path) -> None:
    table = table_of(
        {"name": b"gone", "flags": GONE},
        {"name": b"unread", "flags": UNREADABLE, "size": 0},
        {"name": b"link", "mode": LINK, "flags": UNREADABLE},
    )
    with mounted_on(GroupTree(StoredGroup(None, table, Bytes(b""))), tmp_path):  # type: ignore[arg-type]
        assert sorted(os.listdir(tmp_path)) == ["link", "unread"]
        for read in ((tmp_path / "unread").read_bytes, (tmp_path / "link").readlink):
            with pytest.raises(OSError, match="Input/output"):
                read()


@pytest.mark.parametrize("end", ["Ctrl-C", "umount", "kill"])
def test_the_command_shows_the_files_until_it_is_ended(end: str, depot: Depot, tmp_path: Path) -> None:
    top, place = tmp_path / "top", tmp_path / "place"
    top.mkdir()
    place.mkdir()
    (top / "file").write_bytes(os.urandom(3 << 20))
    store_in(depot, top)
    words = command("mount", "latest", place, "--repo", depot.reference)
    with subprocess.Popen(words, env=os.environ | depot.env, stdout=subprocess.PIPE, text=True) as process:
        assert str(place) in process.stdout.readline()
        assert (place / "file").read_bytes() == (top / "file").read_bytes()
        if end == "umount":
            subprocess.run(["umount", place], check=True)
        else:
            process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
        assert process.wait(20) == (-9 if end == "kill" else 0)
    for _ in range(50):
        if not _still_mounted(place):
            break
        time.sleep(0.1)
    assert not _still_mounted(place)


def _still_mounted(place: Path) -> bool:
    return f" {place} " in Path("/proc/mounts").read_text()


def test_a_file_is_no_place_to_mount_on(depot: Depot, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    depot.ferry("mount", "latest", tmp_path / "file").refused(1, "not a directory")
