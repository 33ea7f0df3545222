"""An incremental backup reads and stores what changed, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from blockferry.errors import BaseUnusableError
from blockferry.extents import ExtentSet
from blockferry_restic.format import File, RepositoryReader
from restic_support import MIB, PASSWORD, Image, content_of, open_repository, restic, store

UNIT = 4 * MIB


def test_only_segments_with_a_change_are_read(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    image.write(13 * MIB, b"new")
    stored, source = store(repository, image, base, ExtentSet.from_pairs([(13 * MIB, 4096)]))
    assert {offset // UNIT for offset, _length in source.reads} == {3}
    assert stored.snapshot.base == base.id
    assert stored.bytes_stored < 2 * UNIT
    assert content_of(repository, stored.snapshot) == image.expected()


def test_a_chain_of_backups_keeps_every_state(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    rng = random.Random(7)
    states = [(store(repository, image)[0].snapshot, image.expected())]
    for _ in range(3):
        changed = ExtentSet.empty()
        for _ in range(2):
            offset = rng.randrange(0, image.size - 5000)
            image.write(offset, rng.randbytes(5000))
            changed = changed.union(ExtentSet.from_pairs([(offset, 5000)]))
        stored, source = store(repository, image, states[-1][0], changed)
        touched = {start // UNIT for start, _length in changed.intersection(image.used).align(UNIT, image.size)}
        assert {offset // UNIT for offset, _length in source.reads} >= touched
        states.append((stored.snapshot, image.expected()))
    # Back to an older base: what changed since then is the union of all that changed.
    whole = ExtentSet.whole(image.size)
    states.append((store(repository, image, states[0][0], whole)[0].snapshot, image.expected()))
    for snapshot, expected in states:
        assert content_of(repository, snapshot) == expected
    restic(repository_path, "check", "--read-data")


def test_nothing_changed_stores_no_segment_again(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    stored, source = store(repository, image, base, ExtentSet.empty())
    assert source.reads == []
    assert stored.bytes_stored < 16384
    trees = [json.loads(line) for line in restic(repository_path, "ls", "--json", base.archive).splitlines()]
    again = [json.loads(line) for line in restic(repository_path, "ls", "--json", stored.snapshot.archive).splitlines()]
    volume = [[entry for entry in each if entry.get("path", "").startswith("/volume")] for each in (trees, again)]
    assert volume[0] == volume[1] != []
    assert content_of(repository, stored.snapshot) == image.expected()


def test_a_full_backup_skips_nothing_although_restic_has_seen_the_files(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    store(repository, image)
    _stored, source = store(repository, image)
    read = ExtentSet.from_pairs(source.reads)
    assert read == image.used.align(UNIT, image.size)


def test_a_base_that_lost_its_data_aborts_and_leaves_no_snapshot(
    repository_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTIC_PACK_SIZE", "4")
    image.write(0, random.Random(3).randbytes(image.size))
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    pack_of_a_segment(repository_path, base.archive).unlink()
    restic(repository_path, "repair", "index")
    with pytest.raises(BaseUnusableError, match="no longer has the segment") as caught:
        store(repository, image, base, ExtentSet.empty())
    assert "full backup" in caught.value.remedy
    assert repository.snapshots() == [base]


def pack_of_a_segment(repository: Path, snapshot: str) -> Path:
    """Return a pack that holds data of the image and none of the small files beside it."""
    reader = RepositoryReader(repository, PASSWORD)
    index = reader.index()
    root = reader.root(index, snapshot)
    directory = reader.tree(index, reader.tree(index, root.directories["volume"]).directories["000000"])

    def packs(files: Iterable[File]) -> set[str]:
        return {index.place(row)[0] for file in files for row in reader.locate(index, file.content).tolist()}

    name = min(packs(directory.files.values()) - packs(root.files.values()))
    return repository / "data" / name[:2] / name


def test_a_base_of_another_size_is_refused(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    image.content = image.content[:-4096]
    image.used = image.used.clip(0, image.size)
    with pytest.raises(BaseUnusableError, match="the volume now"):
        store(repository, image, base, ExtentSet.empty())


def test_the_same_where_the_base_has_nothing_is_refused(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    base = store(repository, image)[0].snapshot
    image.used = image.used.union(ExtentSet.from_pairs([(5 * MIB, 4096)]))
    with pytest.raises(BaseUnusableError, match=f"the base has nothing at {UNIT}"):
        store(repository, image, base, ExtentSet.empty())
