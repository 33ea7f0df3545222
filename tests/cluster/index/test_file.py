"""A log index in a file."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blockferry.cluster import sqlite_index
from blockferry.errors import EpochClosedError, LogIndexError
from cluster_index_support import numbers
from cluster_support import open_index


def test_a_file_is_for_its_owner_alone_and_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.db"
    with contextlib.closing(open_index(f"sqlite://{file}")) as index:
        index.put("a", {})
        assert {name.stat().st_mode & 0o777 for name in tmp_path.glob("index.db*")} == {0o600}
    file.chmod(0o640)
    with pytest.raises(LogIndexError, match="by others") as caught:
        open_index(f"sqlite://{file}")
    assert "chmod" in caught.value.remedy


def test_what_is_in_a_file_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    for expected in (None, {"n": 1}):
        with contextlib.closing(open_index(f"sqlite://{tmp_path}/index.db")) as index:
            assert index.get("a") == expected
            index.put("a", {"n": 1})


def test_an_epoch_that_was_opened_before_the_host_started_or_on_another_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"sqlite://{tmp_path}/index.db"
    with contextlib.closing(open_index(reference)) as index:
        index.open_claims("e")
        index.claim("e", "one", numbers(1))
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(sqlite_index, "_BOOT", tmp_path / "boot_id")
    with contextlib.closing(open_index(reference)) as index:
        for call in (
            lambda: index.claim("e", "two", numbers(1)),
            lambda: index.claimed("e", "one"),
            lambda: index.open_claims("e"),
        ):
            with pytest.raises(EpochClosedError):
                call()


@pytest.mark.parametrize("what", ["text", "database", "directory", "link", "nowhere"])
def test_what_is_no_index_of_ours_is_refused_and_left_as_it_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if what == "text":
        path.write_bytes(b"no database, but long enough to be looked at as one\n" * 100)
        path.chmod(0o600)
    elif what == "database":
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("CREATE TABLE things (name TEXT)")
        path.chmod(0o600)
    elif what == "directory":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path = tmp_path / "none" / "file"
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(LogIndexError) as caught:
        open_index(f"sqlite://{path}")
    assert caught.value.remedy
    assert not (tmp_path / "elsewhere").exists()
    assert before == (path.read_bytes() if path.is_file() else b"")


@pytest.mark.root
def test_a_file_whose_disk_is_full_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=True)
    try:
        with contextlib.closing(open_index(f"sqlite://{tmp_path}/index.db")) as index:
            index.open_claims("e")
            index.claim("e", "one", numbers(1))
            with pytest.raises(LogIndexError, match="is full"):
                for _ in range(100):
                    index.push("q", bytes(50_000))
            with pytest.raises(LogIndexError, match="is full"):
                index.claim("e", "one", np.arange(100_000))
            assert index.claimed("e", "one").tolist() == [1]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
