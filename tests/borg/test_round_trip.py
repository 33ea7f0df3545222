"""What goes into a repository of borg 1.2 and 1.4 comes out again: through us, and through the stock borg."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import BaseUnusableError
from blockferry.extents import ExtentSet
from blockferry.repository import Base
from blockferry_borg.plugin import blockferry_open_repository
from borg_support import MIB, Volume, content, expected, newest, read_all, record_of, store, used

SIZE = 23 * MIB + 4321


def first_map(size: int = SIZE) -> BlockMap:
    return BlockMap.build(size, data=used((0, 3.3), (5, 1), (9.5, 11), (22, 9), size=size))


@pytest.mark.parametrize(
    ("series", "encryption"),
    [("1.2", "none"), ("1.2", "keyfile"), ("1.4", "repokey-blake2"), ("1.4", "authenticated")],
    indirect=["series"],
)
def test_an_image_comes_back_as_it_was(encryption, make_repository, open_repository):
    place = make_repository(encryption)
    repository = open_repository(place)
    volume, block_map = Volume(content(SIZE)), first_map()
    record = record_of(SIZE)
    seen = []
    stored = repository.store(volume, block_map, record, bases=[], advance=seen.append)
    image = expected(volume.content, block_map.on_grid(MIB).extents(Kind.DATA))

    assert repository.snapshots() == [stored.snapshot]
    assert repository.describe(stored.snapshot) == (record, block_map)
    assert sum(seen) == volume.bytes_read == block_map.on_grid(MIB).extents(Kind.DATA).total
    assert 0 < stored.bytes_stored < volume.bytes_read
    with repository.open(stored.snapshot) as layer:
        assert read_all(layer) == expected(volume.content, block_map.extents(Kind.DATA))
    assert place.extract(stored.snapshot.archive) == image
    assert json.loads(place.extract(stored.snapshot.archive, "blockferry.json"))["snapshot"] == record.snapshot
    assert BlockMap.from_bytes(place.extract(stored.snapshot.archive, "blockferry.map")) == block_map
    place.check()


@newest
def test_an_archive_is_of_ordinary_private_files(place, open_repository):
    stored = store(open_repository(place), Volume(content(SIZE)), first_map())
    lines = place.run("list", "--json-lines", f"{place.location}::{stored.snapshot.archive}").stdout.splitlines()
    items = [json.loads(line) for line in lines]
    assert [item["path"] for item in items] == ["blockferry.json", "blockferry.map", "volume.img"]
    assert {item["mode"] for item in items} == {"-rw-------"}
    assert {item["user"] for item in items} == {getpass.getuser()}
    assert items[-1]["size"] == SIZE
    name = stored.snapshot.archive
    assert name == f"vm.disk-{stored.snapshot.created[:19]}-{stored.snapshot.id}"


@newest
@pytest.mark.parametrize("compression", ["none", "zstd,3", "auto,zlib"])
def test_borgs_compressions_work(compression, place, open_repository, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG_COMPRESSION", compression)
    volume = Volume(content(3 * MIB))
    stored = store(open_repository(place), volume, BlockMap.build(volume.size, data=volume.extents))
    assert place.extract(stored.snapshot.archive) == volume.content.tobytes()
    assert (stored.bytes_stored >= volume.size) == (compression == "none")


def test_an_unused_volume_costs_nothing(place, open_repository):
    size = 5 << 40
    repository = open_repository(place)
    assert repository.unit(size) == 4 * MIB
    volume = Volume(np.zeros(0, np.uint8))
    volume.size = size
    stored = store(repository, volume, BlockMap.build(size, data=ExtentSet.empty()), unit=4 * MIB)
    assert stored.bytes_stored < 2 * MIB
    with repository.open(stored.snapshot) as layer:
        piece = bytearray(b"x" * 1000)
        layer.read_into(3 << 40, memoryview(piece))
        assert piece == bytes(1000)
        assert not layer.extents
    repository.delete([stored.snapshot])
    place.check()


@pytest.mark.parametrize("cache", ["as it is", "lost"])
def test_what_is_as_in_the_base_is_not_read(cache, place, open_repository):
    repository = open_repository(place)
    volume, full = Volume(content(SIZE)), first_map()
    base = store(repository, volume, full).snapshot
    if cache == "lost":
        place.run("delete", "--cache-only", place.location)
    later = Volume(volume.content.copy())
    changed = used((2, 1), (12, 0.5), size=SIZE)
    for start, length in changed:
        later.content[start : start + length] = content(length, seed=9)
    increment = BlockMap.build(SIZE, data=changed, same=full.extents(Kind.DATA))
    stored = store(repository, later, increment, base=base)

    assert later.bytes_read == 2 * MIB
    assert stored.bytes_stored < 2 * MIB + 10_000
    assert stored.snapshot.base == base.id
    image = expected(later.content, full.on_grid(MIB).extents(Kind.DATA))
    assert place.extract(stored.snapshot.archive) == image
    with repository.open(stored.snapshot) as layer:
        assert read_all(layer) == expected(later.content, increment.extents(Kind.DATA, Kind.SAME))
    place.check()

    repository.delete([base])
    place.run("compact", place.location)
    place.check()
    assert place.extract(stored.snapshot.archive) == image
    assert repository.snapshots() == [stored.snapshot]


def test_deleting_gives_all_space_back(place, open_repository):
    repository = open_repository(place)
    first = store(repository, Volume(content(SIZE)), first_map()).snapshot
    same = BlockMap.build(SIZE, data=ExtentSet.empty(), same=first_map().extents(Kind.DATA))
    second = store(repository, Volume(content(SIZE)), same, base=first).snapshot
    repository.delete([first, second])
    place.run("compact", place.location)
    assert repository.snapshots() == []
    assert sum(path.stat().st_size for path in Path(place.location, "data").rglob("*") if path.is_file()) < 10_000


@newest
def test_a_volume_that_grew_keeps_its_base(place, open_repository):
    repository = open_repository(place)
    volume = Volume(content(6 * MIB))
    base = store(repository, volume, BlockMap.build(volume.size, data=volume.extents)).snapshot
    grown = Volume(np.concatenate([volume.content, content(3 * MIB + 5, seed=3)]))
    grew = BlockMap.build(grown.size, data=used((6, 9), size=grown.size), same=volume.extents)
    stored = store(repository, grown, grew, base=base)
    assert grown.bytes_read == 3 * MIB + 5
    assert place.extract(stored.snapshot.archive) == grown.content.tobytes()


@newest
@pytest.mark.parametrize("cause", ["gone", "another chunk size", "shorter", "recreated"])
def test_a_base_that_cannot_be_used_is_refused_before_anything_is_kept(cause, place, open_repository):
    repository = open_repository(place)
    volume = Volume(content(4 * MIB))
    whole = BlockMap.build(volume.size, data=volume.extents)
    if cause == "shorter":
        short = Volume(volume.content[: 2 * MIB])
        base = store(repository, short, BlockMap.build(2 * MIB, data=short.extents)).snapshot
    else:
        base = store(repository, volume, whole, unit=4 * MIB if cause == "another chunk size" else MIB).snapshot
    if cause == "gone":
        repository.delete([base])
    if cause == "recreated":
        name = f"{place.location}::{base.archive}"
        place.run("recreate", "--chunker-params", "10,16,12,4095", "--recompress", "if-different", name)
    same = BlockMap.build(volume.size, data=ExtentSet.empty(), same=volume.extents)
    before = place.archives()
    with pytest.raises(BaseUnusableError, match="the base"):
        store(repository, volume, same, base=base)
    assert place.archives() == before
    stored = store(repository, volume, whole)
    assert place.extract(stored.snapshot.archive) == volume.content.tobytes()
    place.check()


@newest
def test_chunks_come_from_several_bases(place, open_repository):
    """What a part holds is taken from it, the rest from what it lies on: no byte is read."""
    repository = open_repository(place)
    volume = Volume(content(6 * MIB))
    full = store(repository, volume, BlockMap.build(volume.size, data=volume.extents)).snapshot
    volume.content[MIB : 2 * MIB] = content(MIB, seed=4)
    volume.content[4 * MIB : 6 * MIB] = content(2 * MIB, seed=5)
    changed = used((1, 1), (4, 2), size=volume.size)
    record = dataclasses.replace(record_of(volume.size, base=full), part=True)
    increment = BlockMap.build(volume.size, data=changed, same=volume.extents)
    part = repository.store(volume, increment, record, bases=[], advance=lambda _count: None).snapshot
    assert repository.open(part).extents == changed
    volume.bytes_read = 0
    bases = [Base(part, changed), Base(full, changed.complement(volume.size))]
    same = BlockMap.build(volume.size, data=ExtentSet.empty(), same=volume.extents)
    record = record_of(volume.size)
    stored = repository.store(volume, same, record, bases=bases, advance=lambda _count: None)
    assert volume.bytes_read == 0
    repository.delete([part, full])
    assert place.extract(stored.snapshot.archive) == volume.content.tobytes()
    place.check()
    with pytest.raises(ValueError, match="do not have all"):
        repository.store(volume, same, record_of(volume.size), bases=bases[:1], advance=lambda _count: None)


def test_archives_of_others_are_left_alone(place, open_repository, tmp_path):
    (tmp_path / "file").write_text("hello")
    place.run("create", "--comment", "blockferry is nice", f"{place.location}::theirs", str(tmp_path / "file"))
    place.run("create", f"{place.location}::vm.disk-2020-01-01T00:00:00-abcdef123456", str(tmp_path / "file"))
    repository = open_repository(place)
    assert repository.snapshots() == []
    stored = store(repository, Volume(content(MIB)), BlockMap.build(MIB, data=ExtentSet.whole(MIB)))
    assert [snapshot.id for snapshot in repository.snapshots()] == [stored.snapshot.id]
    place.run("rename", f"{place.location}::{stored.snapshot.archive}", "renamed")
    (renamed,) = repository.snapshots()
    assert (renamed.id, renamed.archive) == (stored.snapshot.id, "renamed")
    assert repository.describe(renamed)[0].snapshot == stored.snapshot.id
    assert len(place.archives()) == 3


@newest
def test_the_environment_names_the_repository(place, open_repository, monkeypatch):
    stored = store(open_repository(place), Volume(content(MIB)), BlockMap.build(MIB, data=ExtentSet.whole(MIB)))
    monkeypatch.setenv("BORG_REPO", place.location)
    repository = blockferry_open_repository("borg:", os.environ)
    assert repository.snapshots() == [stored.snapshot]
    repository.close()
    assert blockferry_open_repository("restic:/srv", os.environ) is None


@newest
def test_two_repositories_are_kept_apart_in_one_process(make_repository, open_repository):
    places = [make_repository("none"), make_repository("keyfile")]
    shutil.rmtree(places[0].location)
    places[0] = make_repository("none")
    stored = []
    for seed, place in enumerate(places):
        volume = Volume(content(2 * MIB, seed))
        stored.append(store(open_repository(place), volume, BlockMap.build(2 * MIB, data=volume.extents)).snapshot)
    for seed, (place, snapshot) in enumerate(zip(places, stored, strict=True)):
        assert place.extract(snapshot.archive) == content(2 * MIB, seed).tobytes()
