"""What the trackers on device-mapper read: exception tables, tables and status lines, their tools' XML."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.changed import devicemapper, dmsnapshot, era, thin
from blockferry.changed.devicemapper import CannotTrackError, Target
from blockferry.extents import ExtentSet

CHUNK = 4096
SIZE = 1000 * CHUNK + 512
"""The last chunk of the volume is not a whole one."""


def table(old: list[int], chunk: int = CHUNK, **header: int) -> bytearray:
    """Return a copy-on-write device as the kernel fills it: what it copied out is left zero."""
    facts = {"magic": 0x70416E53, "valid": 1, "version": 1, "sectors": chunk // 512} | header
    per_area = chunk // 16
    device = bytearray((2 + (len(old) // per_area + 1) * (per_area + 1)) * chunk)
    struct.pack_into("<4I", device, 0, *facts.values())
    for index, place in enumerate(old):
        area, entry = divmod(index, per_area)
        first = 1 + area * (per_area + 1)
        struct.pack_into("<2Q", device, first * chunk + entry * 16, place, first + 1 + entry)
    return device


def read_table(device: bytes, chunk: int = CHUNK) -> ExtentSet:
    descriptor = os.memfd_create("cow")
    try:
        os.write(descriptor, device)
        return dmsnapshot.read_changed(descriptor, chunk, SIZE)
    finally:
        os.close(descriptor)


@given(old=st.lists(st.integers(0, 1000), unique=True, max_size=600), chunk=st.sampled_from([4096, 8192]))
def test_a_table_lists_each_chunk_that_was_copied_out(old: list[int], chunk: int) -> None:
    old = [place for place in old if place * chunk < SIZE]
    expected = ExtentSet.from_pairs((place * chunk, min(chunk, SIZE - place * chunk)) for place in old)
    assert read_table(table(old, chunk), chunk) == expected


def test_a_table_whose_areas_are_exactly_full_goes_on_in_the_next() -> None:
    assert read_table(table(list(range(512)))).total == 512 * CHUNK


def test_areas_are_joined_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmsnapshot, "_BATCH", 1)
    old = list(range(0, 1000, 2))
    assert read_table(table(old)) == ExtentSet.from_pairs((place * CHUNK, CHUNK) for place in old)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (table([1], magic=1), "does not begin"),
        (table([1], version=2), "does not begin"),
        (table([1], valid=0), "void"),
        (table([1], sectors=16), "another size"),
        (table([1001]), "do not have"),
        (table([2**63]), "do not have"),
        (table([1]).replace(struct.pack("<2Q", 1, 2), struct.pack("<2Q", 1, 2**40)), "do not have"),
        (table(list(range(256)))[: 258 * CHUNK], "no end"),
        (bytearray(100), "cut short"),
    ],
)
def test_a_table_that_the_kernel_does_not_write_is_no_answer(device: bytearray, reason: str) -> None:
    with pytest.raises(CannotTrackError, match=reason):
        read_table(device)


@pytest.mark.parametrize("chunk", [0, 512, 4096 * 3])
def test_chunks_of_a_size_that_the_kernel_does_not_allow_are_no_answer(chunk: int) -> None:
    with pytest.raises(CannotTrackError, match="chunks of"):
        read_table(table([1]), chunk)


def test_a_device_of_one_target_is_understood_and_one_of_several_is_not() -> None:
    assert devicemapper.parse_target("0 81920 snapshot 254:6 254:7 P 8\n") == Target(
        "snapshot", 81920 * 512, ["254:6", "254:7", "P", "8"]
    )
    assert devicemapper.parse_target("0 196608 linear \n") == Target("linear", 196608 * 512, [])
    for output in ("", "0 8 linear 7:0 0\n8 8 linear 7:0 99\n", "8 8 linear 7:0 0\n", "Device does not exist.\n"):
        assert devicemapper.parse_target(output) is None
    assert devicemapper.parse_device("254:7") == (254, 7)
    with pytest.raises(CannotTrackError):
        devicemapper.parse_device("/dev/sda")


# As thin_delta 0.9.0 printed it.
DELTA = b"""<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">
  <diff left="2" right="1">
    <left_only begin="0" length="16"/>
    <same begin="16" length="34"/>
    <different begin="50" length="3"/>
    <same begin="53" length="47"/>
    <right_only begin="200" length="3"/>
  </diff>
</superblock>
"""
# As era_invalidate 0.9.0 printed it.
BLOCKS = b"""<blocks>
  <range begin="3" end = "5"/>
  <block block="10"/>
</blocks>
"""


def delta(xml: bytes, left: str = "2", right: str = "1", block: int = 65536) -> list[tuple[int, int]]:
    return list(thin.parse_delta(devicemapper.parse_xml([xml]), left, right, block))


def test_blocks_that_were_written_or_discarded_differ_between_thin_devices() -> None:
    assert delta(DELTA) == [(0, 16), (50, 53), (200, 203)]


@pytest.mark.parametrize(
    "xml",
    [
        DELTA.replace(b'left="2"', b'left="3"'),
        DELTA.replace(b'right="1"', b'right="3"'),
        DELTA.replace(b'"128"', b'"256"'),
        DELTA.replace(b"right_only", b"unheard_of"),
        DELTA.replace(b'length="3"', b'length="-3"'),
        DELTA.replace(b'begin="50"', b'begin="' + b"9" * 30 + b'"'),
        DELTA.replace(b'begin="50" ', b""),
        DELTA.replace(b'<diff left="2" right="1">', b"").replace(b"</diff>", b""),
        b'<superblock data_block_size="128"/>',
        b"",
        b'<!DOCTYPE a [<!ENTITY a "b">]>' + DELTA,
    ],
)
def test_a_comparison_that_is_not_the_one_asked_for_is_no_answer(xml: bytes) -> None:
    with pytest.raises(CannotTrackError):
        delta(xml)


@pytest.mark.parametrize("xml", [DELTA, BLOCKS])
def test_xml_that_is_cut_anywhere_is_no_answer(xml: bytes) -> None:
    assert list(devicemapper.parse_xml(xml[place : place + 1] for place in range(len(xml))))
    for length in range(len(xml.rstrip())):
        with pytest.raises(CannotTrackError, match="not whole"):
            list(devicemapper.parse_xml([xml[:length]]))


def test_blocks_of_an_era_are_single_ones_and_ranges_without_their_end() -> None:
    assert list(era.parse_blocks(devicemapper.parse_xml([BLOCKS]))) == [(3, 5), (10, 11)]
    with pytest.raises(CannotTrackError):
        list(era.parse_blocks(devicemapper.parse_xml([BLOCKS.replace(b"<block ", b"<clock ")])))


def test_blocks_become_bytes_of_the_volume() -> None:
    assert list(devicemapper.extents([(3, 5), (10, 11), (5, 6)], 100, 1050)) == [(300, 300), (1000, 50)]
    assert list(devicemapper.extents([(9, 10**18)], 100, 1050)) == [(900, 150)]
    assert not devicemapper.extents([(11, 12)], 100, 1050)
    assert not devicemapper.extents([], 100, 1050)
    with pytest.raises(CannotTrackError):
        devicemapper.extents([(5, 5)], 100, 1050)


def script(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(("version", "fits"), [("0.7.3", False), ("0.7.4", True), ("thin_delta 1.0.12", True)])
def test_a_thin_delta_that_loses_blocks_is_not_used(
    version: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "thin_delta", f"echo {version}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if fits:
        thin.check_tool()
    else:
        with pytest.raises(CannotTrackError, match=r"0\.7\.3 loses blocks"):
            thin.check_tool()


def test_a_tool_that_fails_after_all_is_no_answer_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "era_invalidate", "echo '<blocks></blocks>'; echo bad checksum >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(CannotTrackError, match="era_invalidate: bad checksum"):
        list(devicemapper.elements("era_invalidate"))
