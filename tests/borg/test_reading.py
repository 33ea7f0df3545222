"""Images are read at random, by several readers, while backups go on; what cannot be had is never made up."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockferry.blockmap import BlockMap
from blockferry.errors import BaseUnusableError, DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry_borg.client import SLOTS
from borg_support import MIB, Volume, content, expected, newest, read_all, store, used

SIZE = 40 * MIB + 999
USED = used((0, 2.5), (3, 1), (4.25, 0.1), (6, 20), (30, 99), size=SIZE)


@pytest.fixture
def stored(place, open_repository):
    """A repository, a snapshot in it, and the image that it is of."""
    repository = open_repository(place)
    volume = Volume(content(SIZE))
    snapshot = store(repository, volume, BlockMap.build(SIZE, data=USED)).snapshot
    return repository, snapshot, expected(volume.content, USED)


@newest
@pytest.mark.parametrize("batch", [1000 * 999, 4 * MIB, 64 * MIB])
def test_a_stream_gives_any_extents_in_order(batch, stored):
    repository, snapshot, image = stored
    wanted = ExtentSet.from_pairs([(5, 10), (2 * MIB, 5 * MIB), (9 * MIB + 1, 1), (20 * MIB, 19 * MIB)])
    with repository.open(snapshot) as layer:
        for extents in (wanted, ExtentSet.whole(SIZE), layer.extents, ExtentSet.empty()):
            pieces = [(offset, bytes(piece)) for offset, piece in layer.stream(extents, batch)]
            assert all(len(piece) <= batch for _offset, piece in pieces)
            assert ExtentSet.from_pairs([(offset, len(piece)) for offset, piece in pieces]) == extents
            assert sum(len(piece) for _offset, piece in pieces) == extents.total
            assert [offset for offset, _piece in pieces] == sorted(offset for offset, _piece in pieces)
            assert all(piece == image[offset : offset + len(piece)] for offset, piece in pieces)


@newest
def test_several_threads_read_at_random_while_one_streams(stored):
    repository, snapshot, image = stored
    with repository.open(snapshot) as layer, ThreadPoolExecutor(4) as pool:

        def read_here_and_there(seed: int) -> None:
            drawn = random.Random(seed)
            for _ in range(20):
                offset = drawn.randrange(SIZE)
                piece = memoryview(bytearray(min(drawn.choice([1, 4096, 3 * MIB]), SIZE - offset)))
                layer.read_into(offset, piece)
                assert piece == image[offset : offset + len(piece)]

        streams = [pool.submit(read_all, layer) for _ in range(2)]
        for reader in [pool.submit(read_here_and_there, seed) for seed in range(3)]:
            reader.result()
        assert [stream.result() == image for stream in streams] == [True, True]


@newest
def test_a_stream_that_is_left_half_way_does_no_harm(stored):
    repository, snapshot, image = stored
    with repository.open(snapshot) as layer:
        for _ in range(SLOTS + 1):
            for _offset, _piece in layer.stream(layer.extents, MIB):
                break
        assert read_all(layer) == image


def test_a_reader_is_in_nobodys_way(stored):
    repository, snapshot, image = stored
    with repository.open(snapshot) as layer:
        later = store(repository, Volume(content(SIZE, seed=4)), BlockMap.build(SIZE, data=USED)).snapshot
        assert read_all(layer) == image
        repository.delete([later])
        assert read_all(layer) == image


def test_a_reader_finds_what_compaction_moved(place, open_repository):
    place.run("config", place.location, "max_segment_size", "2M")
    repository = open_repository(place)
    volume = Volume(content(12 * MIB))
    base = store(repository, volume, BlockMap.build(volume.size, data=volume.extents)).snapshot
    later = Volume(volume.content.copy())
    for start in range(0, volume.size, 3 * MIB):
        later.content[start : start + MIB] = content(MIB, seed=start)
    changed = used(*((start, 1) for start in range(0, 12, 3)), size=volume.size)
    increment = BlockMap.build(volume.size, data=changed, same=changed.complement(volume.size))
    snapshot = store(repository, later, increment, base=base).snapshot
    segments = set(Path(place.location, "data").rglob("*"))
    with repository.open(snapshot) as one, repository.open(snapshot) as another:
        repository.delete([base])
        place.run("compact", "--threshold", "0", place.location)
        assert len(segments - set(Path(place.location, "data").rglob("*"))) > 3
        assert read_all(one) == later.content.tobytes()
        repository.delete([snapshot])
        place.run("compact", place.location)
        with pytest.raises(DamagedSnapshotError):
            read_all(another)
    place.check()


def test_bytes_that_a_repair_replaced_are_not_given(make_repository, open_repository, monkeypatch):
    """`borg check --repair` puts zeros in the place of a chunk that is lost; nobody asked for those."""
    place = make_repository("none")
    repository = open_repository(place)
    volume = Volume(content(SIZE))
    image = expected(volume.content, USED)
    snapshot = store(repository, volume, BlockMap.build(SIZE, data=USED)).snapshot
    # Without encryption a chunk's id is the SHA-256 of its content.
    lost = hashlib.sha256(image[10 * MIB : 11 * MIB]).hexdigest()
    place.run("debug", "delete-obj", place.location, lost)
    monkeypatch.setenv("BORG_CHECK_I_KNOW_WHAT_I_AM_DOING", "YES")
    place.run("check", "--repair", place.location)
    with repository.open(snapshot) as layer:
        piece = memoryview(bytearray(MIB))
        layer.read_into(9 * MIB, piece)
        assert piece == image[9 * MIB : 10 * MIB]
        with pytest.raises(DamagedSnapshotError, match="lost"):
            layer.read_into(10 * MIB + 5, piece[:1])
        layer.read_into(11 * MIB, piece)
        assert piece == image[11 * MIB : 12 * MIB]
        with pytest.raises(DamagedSnapshotError, match="lost"):
            read_all(layer)
    volume = Volume(content(SIZE))
    same = BlockMap.build(SIZE, data=ExtentSet.empty(), same=USED)
    with pytest.raises(BaseUnusableError, match="repaired"):
        store(repository, volume, same, base=snapshot)
    again = store(repository, volume, BlockMap.build(SIZE, data=USED))
    with repository.open(again.snapshot) as layer:
        assert read_all(layer) == image


def test_a_flipped_bit_is_noticed(place, stored):
    repository, snapshot, _image = stored
    for segment in sorted(Path(place.location, "data").rglob("*")):
        if segment.is_file() and segment.stat().st_size > 5 * MIB:
            damaged = bytearray(segment.read_bytes())
            damaged[3 * MIB] ^= 1
            segment.write_bytes(damaged)
    with repository.open(snapshot) as layer, pytest.raises(DamagedSnapshotError) as caught:
        read_all(layer)
    assert "borg check" in str(caught.value)


@newest
def test_closing_ends_the_worker(stored):
    repository, snapshot, _image = stored
    layer = repository.open(snapshot)
    threads = threading.active_count()
    layer.close()
    layer.close()
    repository.close()
    repository.close()
    assert threading.active_count() < threads
