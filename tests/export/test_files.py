"""What an export shows: the volume as it is, holes where nothing is in use, times that tell what changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockferry.blockmap import BlockMap, Kind
from blockferry.extents import ExtentSet
from changes_support import install_mischief
from commands_support import blockferry, run
from export_support import MIB, SEGMENT, Host

pytestmark = pytest.mark.root


def used_bytes(volume: Path) -> tuple[ExtentSet, bytes]:
    """Return the extents in use, and the volume with zeros everywhere else."""
    used = ExtentSet.from_pairs([tuple(pair) for pair in blockferry("used", volume, "--json").json()["extents"]])
    content, kept = volume.read_bytes(), bytearray(volume.stat().st_size)
    for start, length in used:
        kept[start : start + length] = content[start : start + length]
    return used, bytes(kept)


def holes_of(path: Path) -> list[tuple[int, int]]:
    """Return the extents that have data, as the file says."""
    found, place = [], 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), place, os.SEEK_DATA)
            except OSError:
                return found
            place = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, place - start))


def segments(host: Host) -> dict[int, Path]:
    return {int(path.name, 16): path for path in (host.at / "vm.img.segments").glob("*/*")}


def stamps(host: Host) -> dict[int, tuple[int, int, int]]:
    facts = {offset: path.stat() for offset, path in segments(host).items()}
    return {offset: (each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for offset, each in facts.items()}


def write(volume: Path, offset: int, data: bytes) -> None:
    with volume.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_an_image_holds_what_is_in_use_and_holes_elsewhere(host: Host, volume: Path) -> None:
    used, kept = used_bytes(volume)
    said = host.export(volume, image=True)
    (each,) = said["volumes"]
    shown = Path(each["content"])
    assert shown == host.at / "vm.img.img"
    assert holes_of(host.at / "vm.img.json") == [(0, Path(each["record"]).stat().st_size)]
    assert shown.read_bytes() == kept
    assert holes_of(shown) == list(used)
    record = json.loads(Path(each["record"]).read_bytes())
    assert (record["size"], record["snapshot"]) == (volume.stat().st_size, each["snapshot"])
    assert BlockMap.from_bytes((host.at / "vm.img.map").read_bytes()).extents(Kind.DATA) == used
    released = host.release()
    assert released["bytes_read"] == volume.stat().st_size
    assert list(host.at.iterdir()) == []


def test_segments_are_the_image_cut_up_and_those_not_in_use_are_absent(host: Host, volume: Path) -> None:
    used, kept = used_bytes(volume)
    host.export(volume)
    found = segments(host)
    wanted = {
        number for start, length in used.align(SEGMENT, len(kept)) for number in range(start, start + length, SEGMENT)
    }
    assert found.keys() == wanted
    for offset, path in found.items():
        assert path.read_bytes() == kept[offset : offset + SEGMENT], offset


def test_a_segment_has_another_stamp_if_and_only_if_it_was_written_to(host: Host, volume: Path) -> None:
    used, _kept = used_bytes(volume)
    host.export(volume)
    before = stamps(host)
    host.release()
    written = int(used.starts[len(used) // 2])
    place = written // SEGMENT * SEGMENT
    write(volume, written + 123, b"changed")
    said = host.export(volume)
    after = stamps(host)
    assert said["volumes"][0]["tier"] == "changed"
    assert {offset for offset in after if after[offset] != before[offset]} == {place}
    assert after[place][2] == before[place][2]  # the inode stays
    host.release()
    again = host.export(volume)
    assert stamps(host) == after
    assert again["volumes"][0]["bytes_new"] == 0


@pytest.mark.thorough
def test_an_image_keeps_its_time_as_long_as_nothing_is_written(host: Host, volume: Path) -> None:
    times = []
    for number in range(3):
        if number == 2:
            write(volume, 40 * MIB, b"changed")
        host.export(volume, image=True)
        times.append((host.at / "vm.img.img").stat().st_mtime_ns)
        host.release()
    assert times[0] == times[1] != times[2]


def test_blocks_that_were_freed_give_their_segment_another_stamp_and_read_as_zeros(host: Host, volume: Path) -> None:
    host.export(volume)
    before = stamps(host)
    host.release()
    used, _kept = used_bytes(volume)
    run("debugfs", "-w", "-R", 'rm "file 3"', volume)
    fewer, kept = used_bytes(volume)
    freed = used.difference(fewer).align(SEGMENT, len(kept))
    assert freed
    host.export(volume)
    after = stamps(host)
    for start, length in freed:
        for offset in range(start, start + length, SEGMENT):
            assert after.get(offset) != before[offset]
    for offset, path in segments(host).items():
        assert path.read_bytes() == kept[offset : offset + SEGMENT], offset


def test_without_its_state_everything_has_a_new_stamp(host: Host, volume: Path) -> None:
    host.export(volume)
    before = stamps(host)
    host.release()
    for path in (host.directory / "state" / "exported" / "volumes" / "vm.img").iterdir():
        path.write_bytes(b"torn" + path.read_bytes()[4:])
    said = host.export(volume)
    assert said["volumes"][0]["tier"] == "used"
    after = stamps(host)
    assert after.keys() == before.keys()
    assert all(after[offset] != before[offset] for offset in after)


def test_the_record_is_newer_than_all_else(host: Host, volume: Path) -> None:
    host.export(volume)
    record = (host.at / "vm.img.json").stat()
    assert all(mtime < record.st_mtime_ns for mtime, _ctime, _inode in stamps(host).values())


def test_a_tracker_that_leaves_out_a_change_is_caught_and_nothing_is_shown(
    host: Host, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mischief = install_mischief(tmp_path / "plugin")
    monkeypatch.setenv("PYTHONPATH", f"{mischief['PYTHONPATH']}:{os.environ.get('PYTHONPATH', '')}")
    host.export(volume)
    host.release()
    size = volume.stat().st_size
    used, _kept = used_bytes(volume)
    content = bytearray(volume.read_bytes())
    for start, length in used.difference(ExtentSet.from_pairs([(0, 20 * MIB)])):
        content[start : start + length] = os.urandom(length)
    with volume.open("r+b") as file:
        file.write(content)
    monkeypatch.setenv("LIE", f"{MIB} {size}")
    host.ferry("export", volume).refused(1, "said not to have changed")
    assert list(host.at.iterdir()) == []
    monkeypatch.delenv("LIE")
    assert host.export(volume)["volumes"][0]["tier"] != "changed"
