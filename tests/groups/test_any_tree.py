"""Any tree, under any names, on real filesystems: it is stored as it is, and again after it changed, and comes back."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockferry.groups.files import restore_files
from groups_disks_support import Memory, assert_same, back_up, filesystem
from groups_support import Quiet, state_of

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

EXAMPLES = int(os.environ.get("BLOCKFERRY_TEST_TREES", "25"))

_ANY = st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"/", b"\n").replace(b"\0", b"\xff"))
_HOSTILE = [
    b"\n",
    b"-",
    b"...",
    b" ",
    b"\x1b[31m",
    b"\xff\xfe",
    b"%s",
    b"*",
    b"n" * 255,
    b"\xc3" * 255,
    b".\n.",
    b"a\\",
]
names = st.one_of(_ANY, st.sampled_from(_HOSTILE)).filter(lambda name: name not in (b".", b".."))
content = st.lists(
    st.tuples(st.sampled_from([0, 1, 100, 4096, 5000, 70_000]), st.booleans()), max_size=4
)  # lengths, and whether there is data or a hole
attributes = st.dictionaries(
    st.sampled_from(["user.a", "trusted.b", "user.caf\udce9"]), st.binary(max_size=60), max_size=2
)
modes = st.sampled_from([0o644, 0o600, 0o4755, 0o2711, 0o1777, 0])
leaves = st.one_of(
    st.tuples(st.just("file"), content, modes, attributes),
    st.tuples(st.just("link"), _ANY),
    st.tuples(st.just("hard")),
    st.tuples(st.just("fifo")),
)
trees: Any = st.recursive(
    st.dictionaries(names, leaves, max_size=6),
    lambda below: st.dictionaries(names, st.one_of(leaves, below), max_size=5),
    max_leaves=12,
)


def grow(tree: dict[bytes, Any], top: bytes, files: list[bytes], number: int = 1) -> None:
    """Make a tree, over whatever is there."""
    for name, what in tree.items():
        path = os.path.join(top, name)
        _clear(path)
        number += 1
        if isinstance(what, dict):
            os.mkdir(path)
            grow(what, path, files, number)
        elif what[0] == "link":
            os.symlink(what[1], path)
        elif what[0] == "fifo":
            os.mkfifo(path)
        elif what[0] == "hard" and files and os.path.isfile(files[-1]) and not os.path.islink(files[-1]):
            os.link(files[-1], path)
        else:
            _write(path, *(what[1:] if len(what) == 4 else ([], 0o640, {})), number)
            files.append(path)


def _clear(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _write(path: bytes, pieces: list[tuple[int, bool]], mode: int, extra: dict[str, bytes], number: int) -> None:
    with open(path, "wb") as file:
        for length, is_data in pieces:
            if is_data:
                file.write(bytes([number % 251 + 1]) * length)
            else:
                file.seek(length, os.SEEK_CUR)
        file.truncate(sum(length for length, _is_data in pieces))
    for name, value in extra.items():
        os.setxattr(path, name, value)
    os.chmod(path, mode)
    os.utime(path, ns=(0, number * 10**15 + 7))


@contextlib.contextmanager
def _room(top: Path) -> Iterator[tuple[Path, Path]]:
    """Give two empty directories on one filesystem."""
    tree, back = top / "tree", top / "back"
    tree.mkdir()
    try:
        yield tree, back
    finally:
        for each in (tree, back):
            _clear(os.fsencode(each))


@pytest.mark.parametrize("kind", ["ext4", "ext4-inline", "xfs", "btrfs"])
def test_any_tree_comes_back_and_so_does_what_became_of_it(kind: str, tmp_path: Path) -> None:
    with filesystem(kind, tmp_path) as top:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(first=trees, then=trees)
        def check(first: dict[bytes, Any], then: dict[bytes, Any]) -> None:
            with _room(top) as (tree, back):
                repository, files = Memory(), []
                for step in (first, then):
                    grow(step, os.fsencode(tree), files)
                    result = back_up(tree, repository)
                    assert result.problems == ()
                    group = assert_same(repository, result, tree)
                    image = repository.open(result.result.snapshot)
                    restored = restore_files(
                        type(group)(group.record, group.table, image),
                        np.arange(len(group.table)),
                        back,
                        Quiet(),
                        force=True,
                    )
                    assert restored.problems == []
                    assert _comparable(state_of(back)) == _comparable(state_of(tree))
                    _clear(os.fsencode(back))

        check()


def _comparable(state: dict[bytes, tuple[Any, ...]]) -> dict[bytes, Any]:
    """Return all that can be told of a tree but where its holes are: that is for the filesystem to say."""
    return {path: (*facts[:5], _bytes(facts[5]), facts[6]) for path, facts in state.items()}


def _bytes(told: Any) -> Any:
    if not isinstance(told, tuple):
        return told
    size, pieces = told
    whole = bytearray(size)
    for start, length, data in pieces:
        whole[start : start + length] = data
    return bytes(whole)
