"""The same over ssh: the worker's borg talks to a borg at the other end."""

from __future__ import annotations

import getpass

import pytest

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import RepositoryError
from borg_support import BORGS, MIB, Volume, content, expected, read_all, store, used

SIZE = 25 * MIB + 4321


@pytest.fixture
def place(make_repository, ssh_port, series, tmp_path, monkeypatch):
    monkeypatch.setenv("BORG_REMOTE_PATH", BORGS[series])
    return make_repository(location=f"ssh://{getpass.getuser()}@127.0.0.1:{ssh_port}{tmp_path}/remote")


@pytest.mark.slow
def test_an_image_and_its_increment_come_back(place, open_repository):
    repository = open_repository(place)
    volume = Volume(content(SIZE))
    full = BlockMap.build(SIZE, data=used((0, 10), (11.5, 99), size=SIZE))
    base = store(repository, volume, full).snapshot
    later = Volume(volume.content.copy())
    changed = used((4, 2), (24, 9), size=SIZE)
    for start, length in changed:
        later.content[start : start + length] = content(length, seed=9)
    increment = BlockMap.build(SIZE, data=changed, same=full.extents(Kind.DATA))
    stored = store(repository, later, increment, base=base)
    assert later.bytes_read == changed.total
    assert repository.snapshots() == [base, stored.snapshot]
    assert repository.describe(stored.snapshot)[1] == increment
    with repository.open(stored.snapshot) as layer:
        image = expected(later.content, full.extents(Kind.DATA))
        assert read_all(layer) == image
        piece = memoryview(bytearray(3 * MIB))
        layer.read_into(17 * MIB + 1, piece)
        assert piece == image[17 * MIB + 1 :][: len(piece)]
    assert place.extract(stored.snapshot.archive) == expected(
        later.content, full.on_grid(MIB).extents(Kind.DATA, Kind.SAME)
    )
    repository.delete([base])
    place.check()


def test_a_borg_that_is_not_there_is_told_of(place, open_repository, monkeypatch):
    monkeypatch.setenv("BORG_REMOTE_PATH", "/nowhere/borg")
    with pytest.raises(RepositoryError, match="borg") as caught:
        open_repository(place).snapshots()
    assert "BORG_REMOTE_PATH" in str(caught.value)


def test_a_repository_that_is_not_there_is_told_of(place, open_repository):
    place.location += "-not"
    with pytest.raises(RepositoryError) as caught:
        open_repository(place).snapshots()
    assert "borg init" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
