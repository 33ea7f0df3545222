"""Borgs that can be had by their command only: a standalone borg 1, and borg 2."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import (
    BlockferryError,
    PassphraseError,
    RepositoryError,
    RepositoryLockedError,
    SnapshotNotFoundError,
)
from blockferry.extents import ExtentSet
from blockferry_borg.extracted import ExtractedImage, MountedImage
from blockferry_borg.mapped import MappedRepository
from blockferry_borg.standalone import StandaloneRepository
from borg_support import BORGS, MIB, Place, Volume, content, expected, missing, read_all, record_of, store, used

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs /dev/fuse: modprobe fuse")

SIZE = 13 * MIB + 4321
USED = used((0, 3.3), (5, 1), (9.5, 99), size=SIZE)


class SecondPlace(Place):
    """A repository of borg 2."""

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return super().run("--repo", self.location, *arguments, check=check)

    def archives(self) -> list[str]:
        return self.run("repo-list", "--format", "{name}{NL}").stdout.decode().split()

    def extract(self, archive: str, item: str = "volume.img") -> bytes:
        holds = archive if item == "volume.img" else f"{archive}.description"
        return self.run("extract", "--stdout", holds, item).stdout

    def check(self) -> None:
        self.run("check", "--verify-data")


@pytest.fixture(
    params=[pytest.param("1.2", marks=pytest.mark.thorough), "1.4", pytest.param("2", marks=pytest.mark.slow)]
)
def place(request, tmp_path, monkeypatch):
    """A repository of a borg that is no Python script, and one of borg 2."""
    series = request.param
    if missing(series):
        pytest.skip(missing(series))
    launcher = tmp_path / "borg"
    launcher.write_text(f'#!/bin/sh\nexec {BORGS[series]} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("BLOCKFERRY_BORG", str(launcher))
    monkeypatch.setenv("BORG_PASSPHRASE", "correct horse")
    monkeypatch.setenv("BORG_SELFTEST", "disabled")
    if series == "2":
        place = SecondPlace(BORGS[series], str(tmp_path / "repository"))
        place.run("repo-create", "--encryption", "aes256-ocb")
    else:
        place = Place(BORGS[series], str(tmp_path / "repository"))
        place.run("init", "--encryption", "repokey-blake2", place.location)
    return place


def test_an_image_comes_back_as_it_was(place, open_repository):
    repository = open_repository(place)
    assert isinstance(repository, MappedRepository if isinstance(place, SecondPlace) else StandaloneRepository)
    volume, block_map = Volume(content(SIZE)), BlockMap.build(SIZE, data=USED)
    record, seen = record_of(SIZE), []
    stored = repository.store(volume, block_map, record, bases=[], advance=seen.append)

    assert repository.snapshots() == [stored.snapshot]
    assert repository.describe(stored.snapshot) == (record, block_map)
    data = block_map.on_grid(MIB).extents(Kind.DATA)
    assert sum(seen) == data.total
    assert volume.bytes_read <= data.total
    assert 0 < stored.bytes_stored < data.total
    assert place.extract(stored.snapshot.archive) == expected(volume.content, data)
    assert BlockMap.from_bytes(place.extract(stored.snapshot.archive, "blockferry.map")) == block_map
    with repository.open(stored.snapshot) as layer:
        assert read_all(layer) == expected(volume.content, USED)
        for offset in (10 * MIB + 7, 2 * MIB, 11 * MIB):
            piece = memoryview(bytearray(MIB))
            layer.read_into(offset, piece)
            assert piece == expected(volume.content, USED)[offset : offset + MIB]
    place.check()
    repository.delete([stored.snapshot])
    repository.delete([stored.snapshot])
    assert place.archives() == []
    with pytest.raises(SnapshotNotFoundError):
        repository.describe(stored.snapshot)


@pytest.mark.thorough
def test_an_increment_is_a_whole_image(place, open_repository):
    repository = open_repository(place)
    base = store(repository, Volume(content(SIZE)), BlockMap.build(SIZE, data=USED)).snapshot
    later = Volume(content(SIZE))
    changed = used((2, 1), (12, 0.5), size=SIZE)
    for start, length in changed:
        later.content[start : start + length] = content(length, seed=9)
    increment = BlockMap.build(SIZE, data=changed, same=USED)
    stored = store(repository, later, increment, base=base)
    assert stored.bytes_stored < 2 * MIB + 10_000
    if "reuse" in repository.capabilities:
        assert later.bytes_read == 2 * MIB
    data = increment.on_grid(MIB).extents(Kind.DATA, Kind.SAME)
    assert place.extract(stored.snapshot.archive) == expected(later.content, data)
    repository.delete([base])
    place.check()
    assert place.extract(stored.snapshot.archive) == expected(later.content, data)
    assert repository.snapshots() == [stored.snapshot]


def test_a_source_that_fails_leaves_nothing(place, open_repository):
    repository = open_repository(place)
    with pytest.raises(OSError, match="the disk is broken here"):
        store(repository, Volume(content(SIZE), fails_at=11 * MIB), BlockMap.build(SIZE, data=USED))
    assert place.archives() == []
    assert repository.snapshots() == []


def test_failures_are_told(place, open_repository, monkeypatch):
    repository = open_repository(place)
    with monkeypatch.context() as patch:
        patch.setenv("BORG_PASSPHRASE", "wrong horse")
        with pytest.raises(PassphraseError, match="BORG_PASSPHRASE") as caught:
            repository.snapshots()
        assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(RepositoryError, match="not exist") as caught:
        open_repository(Place(place.borg, f"{place.location}-not")).snapshots()
    assert len(str(caught.value).splitlines()) == 2
    monkeypatch.setenv("BLOCKFERRY_BORG_COMPRESSION", "lz5")
    with pytest.raises(BlockferryError):
        store(repository, Volume(content(MIB)), BlockMap.build(MIB, data=ExtentSet.whole(MIB)))
    assert place.archives() == []


def test_a_locked_repository_is_a_reason_to_come_again(place, open_repository, monkeypatch):
    if isinstance(place, SecondPlace):
        pytest.skip("borg 2 locks for moments only: several may write at once")
    monkeypatch.setenv("BLOCKFERRY_LOCK_WAIT", "0")
    with subprocess.Popen(
        [place.borg, "with-lock", place.location, "sh", "-c", "echo locked; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(RepositoryLockedError):
            store(open_repository(place), Volume(content(MIB)), BlockMap.build(MIB, data=ExtentSet.whole(MIB)))
        holder.stdin.close()
    assert place.archives() == []


@pytest.mark.parametrize("way", [MountedImage, ExtractedImage])
@pytest.mark.thorough
def test_an_image_is_read_from_a_mount_or_else_as_a_stream(way, place, open_repository, monkeypatch):
    if way is ExtractedImage:
        monkeypatch.setenv("BORG_FUSE_IMPL", "none")
    repository = open_repository(place)
    volume = Volume(content(3 * MIB))
    snapshot = store(repository, volume, BlockMap.build(volume.size, data=volume.extents)).snapshot
    with repository.open(snapshot) as layer:
        if way is MountedImage and isinstance(layer, ExtractedImage):
            pytest.skip(f"{place.borg} cannot mount: install pyfuse3 or llfuse (1.x), mfusepy (2) beside it")
        assert isinstance(layer, way)
        piece = memoryview(bytearray(MIB))
        for offset in (2 * MIB, 5, MIB + 1):
            layer.read_into(offset, piece)
            assert piece == volume.content[offset : offset + MIB].tobytes()
        time.sleep(1.2)  # by then the kernel asks again what it was told of the file
        assert read_all(layer) == volume.content.tobytes()
