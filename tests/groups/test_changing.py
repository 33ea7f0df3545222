"""What happens between the walk and the last read, one thing at a time."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blockferry.blockmap import BlockMap
from blockferry.groups.backup import GroupResult
from blockferry.groups.content import Contents
from blockferry.groups.table import CHANGED, GONE, UNREADABLE
from blockferry.groups.walk import wait_out
from blockferry.layers import BaseLayer
from blockferry.snapshot import Record, Stored
from groups_disks_support import Memory, assert_same, back_up, contents, filesystem, opened

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with filesystem(request.param, tmp_path_factory.mktemp("changing")) as point:
        yield point


@pytest.fixture
def top(disk: Path) -> Path:
    """A directory of this test's own, with a file that rests."""
    place = disk / f"top-{len(list(disk.iterdir()))}"
    place.mkdir()
    (place / "rests").write_bytes(b"rests" * 1000)
    return place


class Busy(Memory):
    """A repository that lets something happen when everything was walked, before anything is read."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self.happens: Callable[[], object] | None = happens

    def store(self, source: BaseLayer, block_map: BlockMap, record: Record, **how: object) -> Stored:
        happens, self.happens = self.happens, None
        if happens:
            happens()
        return super().store(source, block_map, record, **how)  # type: ignore[arg-type]


def during(top: Path, happens: Callable[[], object]) -> tuple[Busy, GroupResult, dict[str, tuple[int, bytes]]]:
    """Back up while something happens; return also the flags and the content of what is stored, by path."""
    repository = Busy(happens)
    result = back_up(top, repository)
    group = opened(repository, result)
    stored = contents(group)
    flags = group.table.entries["flags"].tolist()
    paths = [os.fsdecode(path) for path in group.table.paths()]
    return repository, result, dict(zip(paths, zip(flags, stored, strict=True), strict=True))


def test_what_was_written_to_is_read_again_and_known_from_then_on(top: Path) -> None:
    (top / "file").write_bytes(b"before")
    os.setxattr(top / "file", "user.colour", b"red")

    def change() -> None:
        (top / "file").write_bytes(b"afterwards")
        os.setxattr(top / "file", "user.colour", b"blue")
        os.chmod(top / "file", 0o600)

    repository, result, _stored = during(top, change)
    assert result.problems == ()
    assert_same(repository, result, top)
    assert_same(repository, back_up(top, repository), top)


def test_a_file_that_is_replaced_has_the_attributes_of_the_other(top: Path) -> None:
    (top / "file").write_bytes(b"before")
    os.setxattr(top / "file", "user.colour", b"red")

    def replace() -> None:
        (top / "other").write_bytes(b"another file altogether")
        (top / "other").rename(top / "file")

    repository, result, _stored = during(top, replace)
    assert_same(repository, result, top, busy=True)


def test_a_log_that_goes_on_is_kept_though_there_is_no_room_to_read_it_again(top: Path) -> None:
    before = os.urandom(1 << 20)
    (top / "log").write_bytes(before)

    def write() -> None:
        with (top / "log").open("ab") as log:
            log.write(b"more" * 10_000)

    _repository, result, stored = during(top, write)
    assert stored["log"] == (CHANGED, before)
    assert [path for path, _why in result.problems] == [os.fsencode(top / "log")]


def test_a_file_that_was_removed_is_gone_and_no_problem(top: Path) -> None:
    (top / "file").write_bytes(b"before" * 10_000)
    _repository, result, stored = during(top, (top / "file").unlink)
    assert stored["file"][0] == GONE
    assert result.problems == ()


def test_a_file_in_whose_place_there_is_something_else_is_reported(top: Path) -> None:
    (top / "file").write_bytes(b"before")

    def replace() -> None:
        (top / "file").unlink()
        os.mkfifo(top / "file")

    _repository, result, stored = during(top, replace)
    assert stored["file"] == (UNREADABLE, b"")
    assert [path for path, _why in result.problems] == [os.fsencode(top / "file")]


def links(top: Path) -> list[Path]:
    names = [top / "one", top / "two", top / "three"]
    names[0].write_bytes(b"shared" * 5000)
    os.link(names[0], names[1])
    os.link(names[0], names[2])
    return names


@pytest.mark.parametrize("which", range(3))
def test_names_of_a_file_that_was_written_to_stay_names_of_one_file(top: Path, which: int) -> None:
    names = links(top)
    repository, result, _stored = during(top, lambda: names[which].write_bytes(b"new" * 100))
    assert result.problems == ()
    assert_same(repository, result, top)
    assert_same(repository, back_up(top, repository), top)


@pytest.mark.parametrize("which", range(3))
def test_a_name_that_is_anothers_by_now_is_told_apart(top: Path, which: int) -> None:
    names = links(top)

    def replace() -> None:
        (top / "new").write_bytes(b"of its own")
        (top / "new").rename(names[which])

    repository, result, _stored = during(top, replace)
    assert result.problems == ()
    assert_same(repository, result, top, busy=True)
    assert_same(repository, back_up(top, repository), top)


@pytest.mark.parametrize("which", range(3))
def test_a_file_that_lost_a_name_keeps_its_content(top: Path, which: int) -> None:
    names = links(top)
    _repository, result, stored = during(top, names[which].unlink)
    assert result.problems == ()
    for number, name in enumerate(names):
        assert stored[name.name][0] == (GONE if number == which else 0)


@pytest.mark.parametrize("which", range(3))
def test_a_large_file_of_several_names_that_changed_is_said_to_have(top: Path, which: int) -> None:
    names = links(top)
    with names[0].open("ab") as file:
        file.write(os.urandom(1 << 20))

    def write() -> None:
        with names[which].open("r+b") as file:
            file.write(b"!")

    repository, result, stored = during(top, write)
    assert {stored[name.name][0] for name in names} == {CHANGED}
    assert len(result.problems) == 3
    (top / "new").touch()
    assert_same(repository, back_up(top, repository), top)


def test_a_file_that_is_emptied_while_it_is_walked_is_looked_at_again(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "file").write_bytes(b"before" * 1000)
    plain = Contents.pieces

    def pieces(self: Contents, descriptor: int, size: int, into: bytearray, *, own: bool = True) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(top / "file"):
            monkeypatch.setattr(Contents, "pieces", plain)
            os.truncate(top / "file", 0)
            found = plain(self, descriptor, size, into, own=own)
            (top / "file").write_bytes(b"afterwards")
            return found
        return plain(self, descriptor, size, into, own=own)

    monkeypatch.setattr(Contents, "pieces", pieces)
    repository = Memory()
    assert_same(repository, back_up(top, repository), top)


def test_a_file_that_cannot_be_read_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filesystem("tmpfs", tmp_path) as top:
        (top / "broken").write_bytes(b"broken" * 100)
        (top / "sound").write_bytes(b"sound" * 100)
        plain, inode = os.preadv, os.stat(top / "broken").st_ino
        plain_one = os.pread

        def broken(descriptor: int) -> None:
            if os.fstat(descriptor).st_ino == inode:
                raise OSError(errno.EIO, "Input/output error")

        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            broken(descriptor)
            return plain(descriptor, buffers, offset)

        def pread(descriptor: int, length: int, offset: int) -> bytes:
            broken(descriptor)
            return plain_one(descriptor, length, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pread", pread)
        repository = Memory()
        result = back_up(top, repository)
        assert result.problems == ((os.fsencode(top / "broken"), "Input/output error"),)
        group = opened(repository, result)
        stored = dict(zip(group.table.paths(), contents(group), strict=True))
        assert stored == {b"": b"", b"broken": b"", b"sound": b"sound" * 100}


def test_another_hosts_snapshots_of_the_same_name_are_passed_by(top: Path, disk: Path) -> None:
    repository = Memory()
    mine = back_up(top, repository)
    other = disk / f"{top.name}-other"
    other.mkdir()
    assert back_up(other, repository).result.record.base is None
    assert back_up(top, repository).result.record.base == mine.result.snapshot.id


def test_times_of_change_are_waited_out_whatever_is_in_the_future() -> None:
    now = time.time_ns()
    wait_out(np.array([now - 10**10, now + 10**15 + 7, now | 1]))
    assert time.time_ns() - now >= 50_000_000
    before = time.monotonic()
    wait_out(np.array([now - 10**10, now + 10**15 + 7]))
    assert time.monotonic() - before < 0.04
    whole_second = time.time_ns() // 10**9 * 10**9
    wait_out(np.array([whole_second]))
    assert time.time_ns() - whole_second > 2 * 10**9


def test_a_second_look_finds_the_state_of_each_file_in_any_number_of_batches(top: Path) -> None:
    for number in range(300):
        (top / f"f{number}").write_bytes(b"%d" % number)

    def change() -> None:
        for number in range(0, 300, 3):
            (top / f"f{number}").write_bytes(b"changed %d" % number)

    repository, result, _stored = during(top, change)
    assert result.problems == ()
    assert_same(repository, result, top)
