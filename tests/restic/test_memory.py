"""What a host remembers of a repository spares it the key, and is never believed over the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockferry.errors import PassphraseError
from blockferry.extents import ExtentSet
from restic_support import Image, content_of, open_repository, restic, store

NOTHING = ExtentSet.empty()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.usefixtures("state")
def test_what_was_stored_here_is_known_without_the_key(
    repository_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    later = store(repository, image, base, NOTHING)[0].snapshot
    listed, described = repository.snapshots(), repository.describe(later)
    monkeypatch.delenv("RESTIC_PASSWORD")
    without = open_repository(repository_path)
    assert without.snapshots(about_to_store=True) == listed == [base, later]
    assert without.describe(later)[0] == described[0]
    assert without.describe(later)[1].to_bytes() == described[1].to_bytes()
    for asks in (without.snapshots, lambda: without.open(later)):
        with pytest.raises(PassphraseError):
            asks()


def test_another_host_lists_and_describes_the_same(
    repository_path: Path, image: Image, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    here = repository.snapshots(), repository.describe(base)
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "another"))
    assert (open_repository(repository_path).snapshots(), open_repository(repository_path).describe(base)) == here
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(state))
    assert list(state.glob("restic/*/*"))
    assert all(path.parent.stat().st_mode & 0o077 == 0 for path in state.glob("restic/*/*"))


def test_what_the_repository_lost_or_has_from_others_is_noticed(
    repository_path: Path, image: Image, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = open_repository(repository_path)
    first = store(repository, image)[0].snapshot
    second = store(repository, image)[0].snapshot
    restic(repository_path, "forget", first.archive)
    assert repository.snapshots() == [second]
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "another"))
    third = store(open_repository(repository_path), image)[0].snapshot
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(state))
    assert repository.snapshots() == [second, third]
    assert not list(state.glob(f"restic/*/{first.archive}*"))


def cut_off(path: Path) -> None:
    """Leave what a power cut leaves of a file."""
    os.truncate(path, path.stat().st_size // 2)


def fill_with_zeros(path: Path) -> None:
    """Leave what a filesystem leaves that had the size and not the data."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut_off, fill_with_zeros, Path.unlink])
def test_what_is_damaged_in_memory_is_read_from_the_repository(
    repository_path: Path, image: Image, state: Path, damage: Callable[[Path], None]
) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    described = repository.describe(base)
    for path in state.glob("restic/*/*"):
        damage(path)
    repository = open_repository(repository_path)
    assert repository.snapshots() == [base]
    assert repository.describe(base) == described
    image.write(0, b"new")
    for path in state.glob("restic/*/*"):
        damage(path)
    stored, source = store(repository, image, base, ExtentSet.from_pairs([(0, 4096)]))
    assert len({offset >> 22 for offset, _length in source.reads}) == 1
    assert content_of(repository, stored.snapshot) == image.expected()


def test_a_state_directory_that_cannot_be_written_costs_only_time(
    repository_path: Path, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "file"))
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    assert open_repository(repository_path).snapshots() == [base]
    assert repository.describe(base)[0].snapshot == base.id
