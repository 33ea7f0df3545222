"""Files of a group back in a directory: as they were, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockferry.errors import DamagedSnapshotError, TargetError
from blockferry.extents import ExtentSet
from blockferry.groups import directories, placing, writing
from blockferry.groups.files import Restored, restore_files
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import CHANGED, GONE, UNREADABLE
from groups_support import DIRECTORY, FILE, LINK, Memory, Quiet, group_of, make_tree, state_of, table_of
from volumes_support import make_image, run

Mount = Callable[..., Path]

pytestmark = pytest.mark.root


def bring_back(group: StoredGroup, to: Path, *paths: bytes, force: bool = False) -> Restored:
    table, progress = group.table, Quiet()
    rows = [row for row, path in enumerate(table.paths()) if not paths or path in paths]
    restored = restore_files(group, np.array(rows, np.int64), to, progress, force=force)
    assert progress.done == progress.total
    return restored


def row_of(group: StoredGroup, path: bytes) -> int:
    return list(group.table.paths()).index(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "top")


@pytest.fixture(scope="module")
def group(tree: Path) -> StoredGroup:
    return group_of(tree)


def test_everything_comes_back_as_it_was(tree: Path, group: StoredGroup, tmp_path: Path) -> None:
    restored = bring_back(group, tmp_path / "to")
    assert restored.problems == []
    assert state_of(tmp_path / "to") == state_of(tree)
    assert restored.links == 4
    assert restored.files + restored.directories + restored.links + restored.others == len(group.table) - 1


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("batch", [512, 100_000])
def test_few_open_files_and_small_pieces_make_no_difference(
    most: int, batch: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_MOST", most)
    monkeypatch.setattr(writing, "_FILES", most)
    monkeypatch.setattr("blockferry.groups.files._BATCH", batch)
    monkeypatch.setattr(placing, "_ROWS", most)
    small = tmp_path / "from"
    small.mkdir()
    for number in range(9):
        with (small / f"f{number}").open("wb") as file:
            for place in range(number):
                file.seek(place * 8192)
                file.write(os.urandom(4096))
    group = group_of(small, seed=most)
    assert bring_back(group, tmp_path / "to").problems == []
    assert state_of(tmp_path / "to") == state_of(small)


def test_directories_deeper_than_any_path_come_back(
    group: StoredGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_MOST", 5)
    name, depth = b"d" * 200, 30
    nested = [{"name": name, "mode": DIRECTORY, "parent": row} for row in range(depth)]
    table = table_of(*nested, {"name": b"bottom", "parent": depth, "size": 0})
    group = dataclasses.replace(group, table=table)
    assert bring_back(group, tmp_path / "to").problems == []
    os.chdir(tmp_path / "to")
    try:
        for _ in range(depth):
            os.chdir(name)
        assert os.listdir() == ["bottom"]
    finally:
        os.chdir("/")


def test_only_the_chosen_come_back_in_their_directories(tree: Path, group: StoredGroup, tmp_path: Path) -> None:
    wanted = b"caf\xe9 \xff/new\nline/plain"
    restored = bring_back(group, tmp_path / "to", wanted)
    assert (restored.files, restored.directories) == (1, 2)
    there, before = state_of(tmp_path / "to"), state_of(tree)
    assert there == {path: before[path] for path in (b"", b"caf\xe9 \xff", b"caf\xe9 \xff/new\nline", wanted)}


def test_a_hard_link_whose_first_one_is_not_chosen_has_its_content(
    tree: Path, group: StoredGroup, tmp_path: Path
) -> None:
    paths = [b"caf\xe9 \xff/hard1", b"caf\xe9 \xff/hard2"]
    restored = bring_back(group, tmp_path / "to", *paths)
    assert (restored.files, restored.links) == (1, 1)
    there = state_of(tmp_path / "to")
    assert there[paths[0]][:6] == state_of(tree)[b"big"][:6]
    assert there[paths[0]][6] == there[paths[1]][6] == paths


def test_an_empty_selection_makes_the_directory_alone(group: StoredGroup, tmp_path: Path) -> None:
    restore_files(group, np.empty(0, np.int64), tmp_path / "to", Quiet())
    assert list((tmp_path / "to").iterdir()) == []


def test_the_image_is_read_once_and_only_what_is_wanted(tree: Path, tmp_path: Path) -> None:
    group = group_of(tree)
    bring_back(group, tmp_path / "one", b"big")
    assert group.image.bytes_read < 21 << 20
    group.image.bytes_read = 0
    bring_back(group, tmp_path / "all")
    assert group.image.bytes_read <= group.image.size


def test_a_file_that_is_there_is_refused_and_nothing_is_touched(group: StoredGroup, tmp_path: Path) -> None:
    to = tmp_path / "to"
    (to / "private").mkdir(parents=True)
    (to / "private" / "file").write_text("mine")
    before = state_of(to)
    with pytest.raises(TargetError, match="there already: private/file"):
        bring_back(group, to)
    assert state_of(to) == before


def test_what_is_not_in_the_way_stays(group: StoredGroup, tree: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    (to / "private").mkdir(parents=True)
    (to / "private" / "other").write_text("mine")
    facts = to.stat()
    assert bring_back(group, to).problems == []
    there = state_of(to)
    assert there.pop(b"private/other")[5][1][0][2] == b"mine"
    for path, state in state_of(tree).items():
        if path:
            assert there[path] == state
    assert to.stat().st_mode == facts.st_mode


def test_force_replaces_files_and_links_but_no_directory(group: StoredGroup, tree: Path, tmp_path: Path) -> None:
    to, outside = tmp_path / "to", tmp_path / "outside"
    outside.write_text("mine")
    (to / "big").mkdir(parents=True)
    (to / "empty").symlink_to(outside)
    (to / "fifo").write_text("no fifo")
    (to / "closed").write_text("no directory")
    os.link(outside, to / "sparse")
    restored = bring_back(group, to, force=True)
    assert {problem.path for problem in restored.problems} >= {b"big"}
    there, before = state_of(to), state_of(tree)
    for path in (b"empty", b"fifo", b"closed", b"closed/file", b"sparse"):
        assert there[path] == before[path]
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_symbolic_link_in_place_of_a_directory_leads_nowhere(force: bool, group: StoredGroup, tmp_path: Path) -> None:
    to, outside = tmp_path / "to", tmp_path / "outside"
    to.mkdir()
    outside.mkdir(mode=0o755)
    (to / "private").symlink_to(outside)
    with contextlib.nullcontext() if force else pytest.raises(TargetError):
        bring_back(group, to, force=force)
    assert list(outside.iterdir()) == []
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_directory_that_is_swapped_for_a_link_meanwhile_leads_nowhere(group: StoredGroup, tmp_path: Path) -> None:
    """Somebody who can write there replaces every directory as soon as content comes."""
    to, outside = tmp_path / "to", tmp_path / "outside"
    outside.mkdir(mode=0o755)

    class Swapping(Memory):
        def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
            for name in ("private", "closed"):
                (to / name).rename(tmp_path / name)
                (to / name).symlink_to(outside)
            yield from super().stream(extents, batch)

    many = dataclasses.replace(group, image=Swapping(group.image.content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directories, "_MOST", 1)
        restored = bring_back(many, to)
    assert {problem.path for problem in restored.problems} >= {b"private/file", b"closed/file"}
    assert list(outside.iterdir()) == []
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_nobody_else_can_look_into_a_file_before_it_is_whole(group: StoredGroup, tmp_path: Path) -> None:
    modes = set()

    class Looking(Memory):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            modes.add(stat.S_IMODE((tmp_path / "to").stat().st_mode))
            if (tmp_path / "to" / "big").exists():
                modes.add(stat.S_IMODE((tmp_path / "to" / "big").stat().st_mode) & 0o077)
            super().read_into(offset, buffer)

    bring_back(dataclasses.replace(group, image=Looking(group.image.content)), tmp_path / "to", b"big")
    assert modes <= {0o700, 0}


def test_default_acls_of_the_destination_are_not_handed_down(group: StoredGroup, tree: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.mkdir()
    acl = os.getxattr(tree / "private", "system.posix_acl_default")
    os.setxattr(to, "system.posix_acl_default", acl)
    assert bring_back(group, to).problems == []
    there, before = state_of(to), state_of(tree)
    assert {path: state for path, state in there.items() if path} == {
        path: state for path, state in before.items() if path
    }


def flagged(group: StoredGroup, path: bytes, flag: int) -> StoredGroup:
    entries = group.table.entries.copy()
    entries["flags"][row_of(group, path)] = flag
    return dataclasses.replace(group, table=dataclasses.replace(group.table, entries=entries))


def test_what_changed_during_the_backup_is_a_problem_and_comes_back(group: StoredGroup, tmp_path: Path) -> None:
    (problem,) = bring_back(flagged(group, b"big", CHANGED), tmp_path / "to", b"big").problems
    assert problem.path == b"big"
    assert "changed" in problem.what
    assert (tmp_path / "to" / "big").stat().st_size == 20 << 20


@pytest.mark.parametrize("path", [b"hole", b"private"])
def test_what_could_not_be_read_is_a_problem_and_no_file_of_zeros(
    path: bytes, group: StoredGroup, tmp_path: Path
) -> None:
    (problem,) = bring_back(flagged(group, path, UNREADABLE), tmp_path / "to", path).problems
    assert problem.path == path
    assert "could not be read" in problem.what
    assert not (tmp_path / "to" / "hole").exists()


def test_what_was_removed_during_the_backup_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    table = table_of({"name": b"gone", "flags": GONE}, {"name": b"there", "size": 0}, {"name": b"link", "link": 1})
    restored = bring_back(dataclasses.replace(group_of(_empty(tmp_path)), table=table), tmp_path / "to")
    assert os.listdir(tmp_path / "to") == ["there"]
    ((path, what),) = restored.problems
    assert path == b"link"
    assert "could not be read" in what


def test_bytes_that_files_share_are_read_once_and_written_to_each(tmp_path: Path) -> None:
    image = os.urandom(40_000)
    extents = {
        b"a": (0, 30_000, 0, -1),
        b"b": (0, 30_000, 0, -1),
        b"c": (100, 5_000, 20_000, -1),
        b"d": (0, 9, 39_991, -1),
    }
    table = table_of(*({"name": name, "size": 35_000, "extents": [each]} for name, each in extents.items()))
    memory = Memory(image)
    group = dataclasses.replace(group_of(_empty(tmp_path)), table=table, image=memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockferry.groups.files._BATCH", 7_000)
        patch.setattr(writing, "_FILES", 1)
        assert bring_back(group, tmp_path / "to").problems == []
    for name, (logical, length, place, _address) in extents.items():
        expected = bytearray(35_000)
        expected[logical : logical + length] = image[place : place + length]
        assert (tmp_path / "to" / os.fsdecode(name)).read_bytes() == expected
    assert memory.bytes_read <= len(image)


def test_two_entries_of_one_name_are_one_file_and_a_problem(tmp_path: Path) -> None:
    """A directory that changes while it is listed may name a file twice (readdir(3))."""
    table = table_of(
        {"name": b"a", "mode": LINK, "text": 0},
        {"name": b"a", "mode": DIRECTORY},
        {"name": b"below", "parent": 2, "size": 0},
        texts=(os.fsencode(tmp_path),),
    )
    restored = bring_back(dataclasses.replace(group_of(_empty(tmp_path)), table=table), tmp_path / "to")
    assert {problem.path for problem in restored.problems} >= {b"a"}
    assert not (tmp_path / "below").exists()


def test_an_owner_that_is_none_is_a_problem(tmp_path: Path) -> None:
    table = table_of({"name": b"a", "size": 0, "uid": 0xFFFFFFFF, "mode": FILE | 0o4000})
    (problem,) = bring_back(dataclasses.replace(group_of(_empty(tmp_path)), table=table), tmp_path / "to").problems
    assert "owner" in problem.what
    assert stat.S_IMODE((tmp_path / "to" / "a").stat().st_mode) == 0o644


def test_without_root_everything_else_comes_back_and_no_foreign_setuid(
    group: StoredGroup, tree: Path, tmp_path: Path
) -> None:
    os.chown(tmp_path, 65534, 65534)
    here = os.open(tmp_path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.fchdir(here)  # no other user may come here by the path
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            problems = {problem.path for problem in bring_back(group, Path("to")).problems}
            os._exit(0 if problems == {b"disk", b"null"} else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    os.close(here)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    there, before = state_of(tmp_path / "to"), state_of(tree)
    assert there.keys() == before.keys() - {b"disk", b"null"}
    for path, (mode, uid, gid, mtime, _attributes, content, links) in there.items():
        assert (uid, gid) == (65534, 65534)
        assert not stat.S_ISREG(mode) or not mode & 0o6000
        assert (mode & 0o170777, mtime, content, links) == (
            before[path][0] & 0o170777,
            *(before[path][i] for i in (3, 5, 6)),
        )


def _empty(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


@pytest.mark.parametrize("missing", ["the start", "the middle", "the end", "all"])
def test_content_that_does_not_come_is_an_error_and_leaves_no_file(
    missing: str, group: StoredGroup, tmp_path: Path
) -> None:
    class Short(Memory):
        def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
            pieces = [(offset, bytes(piece)) for offset, piece in super().stream(extents, 1 << 20)]
            cut = {"the start": slice(0, 1), "the middle": slice(3, 4), "the end": slice(19, None), "all": slice(None)}
            del pieces[cut[missing]]
            yield from ((offset, memoryview(piece)) for offset, piece in pieces)

    short = dataclasses.replace(group, image=Short(group.image.content))
    with pytest.raises(DamagedSnapshotError, match="content of big"):
        bring_back(short, tmp_path / "to", b"big")
    assert not (tmp_path / "to" / "big").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DamagedSnapshotError("gone")])
def test_a_restore_that_ends_early_leaves_no_half_file(
    error: BaseException, group: StoredGroup, tmp_path: Path
) -> None:
    class Ending(Memory):
        def stream(self, extents: ExtentSet, batch: int) -> Iterator[tuple[int, memoryview]]:
            for number, piece in enumerate(super().stream(extents, 1 << 20)):
                if number == 7:
                    raise error
                yield piece

    with pytest.raises(type(error)):
        bring_back(dataclasses.replace(group, image=Ending(group.image.content)), tmp_path / "to", b"big")
    assert not (tmp_path / "to" / "big").exists()


def test_a_full_filesystem_is_one_error_with_a_remedy(group: StoredGroup, mount: Mount, tmp_path: Path) -> None:
    image = make_image(tmp_path / "small.img", 8 << 20)
    run("mkfs.ext4", "-q", image)
    place = mount(image, "loop")
    with pytest.raises(TargetError, match="No space left"):
        bring_back(group, place / "to", b"big")
    assert not (place / "to" / "big").exists()


names = st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))
pieces = st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=9000)), max_size=4)
nodes = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), pieces, st.sampled_from([0o600, 0o4755, 0o444, 0]), st.integers(0, 70000)),
        st.tuples(st.just("link"), names),
        st.tuples(st.just("hard"), st.integers(0, 5)),
        st.tuples(st.just("fifo")),
    ),
    lambda below: st.tuples(st.just("directory"), st.dictionaries(names, below, max_size=5), st.integers(0, 0o777)),
    max_leaves=15,
)


def build(path: bytes, node: tuple, files: list[bytes]) -> None:
    kind = node[0]
    if kind == "directory":
        os.mkdir(path)
        for name, below in node[1].items():
            build(os.path.join(path, name), below, files)
        os.chmod(path, node[2])
    elif kind == "link":
        os.symlink(node[1], path)
    elif kind == "hard" and files:
        os.link(files[node[1] % len(files)], path)
    elif kind == "file":
        with open(path, "wb") as file:
            for place, data in node[1]:
                file.seek(place * 4096)
                file.write(data)
            file.truncate(node[3])
        os.chown(path, node[3], 5)
        os.chmod(path, node[2])
        os.setxattr(path, "user.x", bytes([node[3] % 256]))
        files.append(path)
    else:
        os.mkfifo(path)
    os.utime(path, ns=(0, len(files) * 987654321), follow_symlinks=False)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, nodes, max_size=6), st.integers(0, 9))
def test_any_tree_comes_back_as_it_was(entries: dict[bytes, tuple], seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        top = os.path.join(place, "from")
        build(os.fsencode(top), ("directory", entries, 0o755), [])
        group = group_of(top, seed=seed, unit=512)
        assert bring_back(group, Path(place, "to")).problems == []
        assert state_of(Path(place, "to")) == state_of(top)
