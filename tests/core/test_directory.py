"""A directory as a repository: what it takes for a snapshot, and what it refuses of what may lie there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockferry.blockmap import BlockMap
from blockferry.directory import DirectoryRepository, blockferry_open_repository
from blockferry.errors import DamagedSnapshotError, RepositoryError, UsageError
from blockferry.extents import ExtentSet
from blockferry.segments import directory_name, segment_name
from blockferry.snapshot import Record, Stability, Tier, new_snapshot_id, now

UNIT, SIZE = 4096, 300 * 4096 + 77
USED = ExtentSet.from_pairs([(10, 20), (260 * UNIT, 5000), (SIZE - 5, 5)])


def lay_out(place: Path, name: str, *, as_segments: bool, names: tuple[str, str, str, str] | None = None) -> bytes:
    """Write a snapshot as a stock tool extracts it; return the image."""
    content = bytearray(SIZE)
    for start, length in USED:
        content[start : start + length] = os.urandom(length)
    record = Record(
        snapshot=new_snapshot_id(), created=now(), host="h", volume=name, path=f"/dev/{name}", size=SIZE,
        block_size=512, filesystem="", identity={}, tier=Tier.USED, tier_reason="", method="a test",
        stability=Stability.OFFLINE, freeze="", unit=UNIT, bytes_used=0, bytes_changed=0,
    )  # fmt: skip
    record_name, map_name, image, directory = names or tuple(
        name + ending for ending in (".json", ".map", ".img", ".segments")
    )
    place.mkdir(parents=True, exist_ok=True)
    (place / record_name).write_bytes(record.to_json())
    (place / map_name).write_bytes(BlockMap.build(SIZE, data=USED).to_bytes())
    if not as_segments:
        (place / image).write_bytes(content)
        return bytes(content)
    for start, length in USED.align(UNIT, SIZE):
        for offset in range(start, start + length, UNIT):
            below = place / directory / directory_name(offset // UNIT)
            below.mkdir(parents=True, exist_ok=True)
            (below / segment_name(offset // UNIT, UNIT)).write_bytes(content[offset : offset + UNIT])
    return bytes(content)


def opened(place: Path) -> DirectoryRepository:
    repository = blockferry_open_repository(f"dir:{place}")
    assert isinstance(repository, DirectoryRepository)
    return repository


def content_of(repository: DirectoryRepository, volume: str) -> bytes:
    (snapshot,) = [each for each in repository.snapshots() if each.volume == volume]
    layer = repository.open(snapshot)
    try:
        buffer = bytearray(layer.size)
        layer.read_into(0, memoryview(buffer))
        return bytes(buffer)
    finally:
        layer.close()


def test_both_ways_are_read_and_the_path_of_the_export_need_not_be_named(tmp_path: Path) -> None:
    place = tmp_path / "var" / "lib" / "export"
    one, other = lay_out(place, "one", as_segments=True), lay_out(place, "other", as_segments=False)
    repository = opened(tmp_path)
    assert content_of(repository, "one") == one
    assert content_of(repository, "other") == other


@pytest.mark.parametrize("as_segments", [True, False])
def test_an_archive_that_blockferry_made_itself_is_read_as_well(tmp_path: Path, as_segments: bool) -> None:
    names = ("blockferry.json", "blockferry.map", "volume.img", "volume")
    image = lay_out(tmp_path, "vm", as_segments=as_segments, names=names)
    assert content_of(opened(tmp_path), "vm") == image


def remove_segment(place: Path) -> None:
    next(iter((place / "vm.segments").glob("*/*"))).unlink()


def cut_segment(place: Path) -> None:
    os.truncate(next(iter((place / "vm.segments").glob("*/*"))), 100)


def lead_segment_elsewhere(place: Path) -> None:
    segment = next(iter((place / "vm.segments").glob("*/*")))
    segment.rename(place / "elsewhere")
    segment.symlink_to(place / "elsewhere")


def lead_directory_elsewhere(place: Path) -> None:
    directory = next(iter((place / "vm.segments").iterdir()))
    directory.rename(place / "elsewhere")
    directory.symlink_to(place / "elsewhere")


def add_what_is_no_segment(place: Path) -> None:
    (next(iter((place / "vm.segments").iterdir())) / "0000000000000001").touch()


def tear_the_map(place: Path) -> None:
    (place / "vm.map").write_bytes((place / "vm.map").read_bytes()[:-2])


@pytest.mark.parametrize(
    "harm",
    [
        remove_segment,
        cut_segment,
        lead_segment_elsewhere,
        lead_directory_elsewhere,
        add_what_is_no_segment,
        tear_the_map,
    ],
)
def test_segments_that_are_not_what_they_should_be_are_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    lay_out(tmp_path, "vm", as_segments=True)
    harm(tmp_path)
    with pytest.raises(DamagedSnapshotError):
        content_of(opened(tmp_path), "vm")


def test_an_image_that_is_cut_short_or_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "vm", as_segments=False)
    image = tmp_path / "vm.img"
    os.truncate(image, SIZE - 1)
    with pytest.raises(DamagedSnapshotError):
        content_of(opened(tmp_path), "vm")
    image.unlink()
    image.symlink_to("/etc/shadow")
    with pytest.raises(DamagedSnapshotError):
        content_of(opened(tmp_path), "vm")


def test_a_directory_without_records_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no record"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        opened(tmp_path / "nowhere")


def test_nothing_is_stored_or_deleted_there(tmp_path: Path) -> None:
    lay_out(tmp_path, "vm", as_segments=False)
    repository = opened(tmp_path)
    with pytest.raises(RepositoryError, match="can only be read"):
        repository.delete(repository.snapshots())
