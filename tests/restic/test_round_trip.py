"""What goes into a restic repository comes out of it, by every way that there is."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blockferry.blockmap import Kind
from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet
from blockferry_restic.archive import RemoteArchive
from blockferry_restic.repository import ResticRepository
from restic_support import MIB, Image, content_of, make_image, mounts, open_repository, restic, restic_mounts, store

BY_HAND = r"""
set -e
truncate -s SIZE "$2"
find "$1/volume" -type f | while read -r segment; do
    dd if="$segment" of="$2" bs=64K conv=notrunc,sparse status=none \
        oflag=seek_bytes seek="$((0x$(basename "$segment")))"
done
"""
"""The recovery without blockferry, as the documentation gives it."""


@pytest.fixture
def through_restic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as from a repository that is not a local directory."""
    monkeypatch.setattr(
        ResticRepository, "_archive", lambda self, snapshot: RemoteArchive(self._restic, snapshot.archive)
    )


@pytest.mark.parametrize("repository_path", ["1", "2"], indirect=True)
def test_a_snapshot_holds_the_bytes_in_use_and_zeros_elsewhere(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    told: list[int] = []
    stored, _source = store(repository, image, told=told)
    snapshot = stored.snapshot
    assert repository.snapshots() == [snapshot]
    assert (snapshot.volume, snapshot.size, snapshot.tier, snapshot.base) == (
        image.volume,
        image.size,
        "used",
        None,
    )
    record, block_map = repository.describe(snapshot)
    assert (record.snapshot, record.size) == (snapshot.id, image.size)
    assert block_map == image.block_map()
    assert content_of(repository, snapshot) == image.expected()
    assert mounts(image) == []
    assert sum(told) == image.block_map().on_grid(repository.unit(image.size)).extents(Kind.DATA).total
    assert 0 < stored.bytes_stored < image.size


def test_reading_through_restic_gives_the_same_bytes_as_reading_the_format(
    repository_path: Path, image: Image, request: pytest.FixtureRequest
) -> None:
    snapshot = store(open_repository(repository_path), image)[0].snapshot
    direct = open_repository(repository_path)
    directly = (direct.describe(snapshot), content_of(direct, snapshot))
    request.getfixturevalue("through_restic")
    mounted = open_repository(repository_path)
    assert (mounted.describe(snapshot), content_of(mounted, snapshot)) == directly
    assert directly[1] == image.expected()
    assert restic_mounts(repository_path) == []


@pytest.mark.parametrize("reader", ["format", "mount"])
def test_a_stream_gives_the_extents_in_order_in_bounded_pieces(
    repository_path: Path, image: Image, reader: str, request: pytest.FixtureRequest
) -> None:
    if reader == "mount":
        request.getfixturevalue("through_restic")
    repository = open_repository(repository_path)
    layer = repository.open(store(repository, image)[0].snapshot)
    rng = np.random.default_rng(4)
    pairs = [(int(start), int(length)) for start, length in zip(
        rng.integers(0, image.size - 70000, 300), rng.integers(1, 70000, 300), strict=True
    )]  # fmt: skip
    extents = ExtentSet.from_pairs(pairs)
    expected = image.expected()
    position, total = 0, 0
    for offset, piece in layer.stream(extents, 100_000):
        assert offset >= position
        assert len(piece) <= 100_000
        assert piece == expected[offset : offset + len(piece)]
        position, total = offset + len(piece), total + len(piece)
    assert total == extents.total
    layer.close()
    assert restic_mounts(repository_path) == []


def test_a_stream_that_is_left_early_lets_go_of_its_threads(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    with pytest.raises(KeyError), repository.open(store(repository, image)[0].snapshot) as layer:
        for _offset, _piece in layer.stream(layer.extents, 4096):
            raise KeyError


def test_restic_and_a_shell_bring_the_image_back_without_blockferry(
    repository_path: Path, image: Image, tmp_path: Path
) -> None:
    repository = open_repository(repository_path)
    first = store(repository, image)[0].snapshot
    image.write(12 * MIB, b"changed")
    second = store(repository, image, first, ExtentSet.from_pairs([(12 * MIB, 4096)]))[0].snapshot
    restic(repository_path, "check", "--read-data")
    restic(repository_path, "restore", second.archive, "--target", tmp_path / "files")
    script = BY_HAND.replace("SIZE", str(image.size))
    subprocess.run(["bash", "-c", script, "bash", tmp_path / "files", tmp_path / "by-hand.img"], check=True)
    # Whole segments are stored, so what shares one with bytes in use is as the source gave it: zero.
    assert (tmp_path / "by-hand.img").read_bytes() == image.expected()


def test_an_image_smaller_than_a_segment_and_one_without_a_byte_in_use(repository_path: Path, tmp_path: Path) -> None:
    repository = open_repository(repository_path)
    small = make_image(tmp_path / "small.img", 1000, ExtentSet.whole(1000))
    empty = make_image(tmp_path / "empty.img", 9 * MIB, ExtentSet.empty())
    for image in (small, empty):
        assert content_of(repository, store(repository, image)[0].snapshot) == image.expected()


def test_a_snapshot_that_lacks_a_segment_is_not_opened(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    snapshot = store(repository, image)[0].snapshot
    restic(repository_path, "rewrite", "--forget", "--exclude", "/volume/000000/0000000000c00000", snapshot.archive)
    assert repository.snapshots() == []
    (rewritten,) = json.loads(restic(repository_path, "snapshots", "--json"))
    with pytest.raises(DamagedSnapshotError, match=f"1 of 6 segments.*the first at {12 * MIB}"):
        repository.open(dataclasses.replace(snapshot, archive=rewritten["id"]))


def test_deleted_snapshots_are_gone_and_others_are_not(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    first = store(repository, image)[0].snapshot
    second = store(repository, image)[0].snapshot
    repository.delete([first])
    assert repository.snapshots() == [second]
    restic(repository_path, "prune")
    assert content_of(repository, second) == image.expected()


def test_what_others_stored_and_what_is_incomplete_is_not_listed(repository_path: Path, image: Image) -> None:
    restic(repository_path, "backup", "--tag", "mine", image.path)
    tags = ["snapshot=0123456789ab", "volume=v", "tier=used", "size=1000", "files=2"]
    restic(repository_path, "backup", "--tag", ",".join(["blockferry", *tags]), image.path)
    assert open_repository(repository_path).snapshots() == []
