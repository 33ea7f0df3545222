"""The holes of image files."""

from __future__ import annotations

import os
import time

import pytest

from blockferry.extents import ExtentSet
from blockferry.used import sparse
from blockferry.volume import Volume
from volumes_support import ask, make_image

KIB, MIB = 1 << 10, 1 << 20


def write(path, *places):
    with path.open("r+b") as file:
        for start, length in places:
            file.seek(start)
            file.write(os.urandom(length))


def test_holes_are_left_out_and_every_byte_of_data_is_in(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    write(image, (MIB, 64 * KIB), (10 * MIB, 3 * MIB), (64 * MIB - 4096, 4096))
    used, reasons = ask(sparse, Volume.discover(image))
    assert (used.method, reasons) == ("sparse file", [])
    assert used.extents == ExtentSet.from_pairs([(MIB, 64 * KIB), (10 * MIB, 3 * MIB), (64 * MIB - 4096, 4096)])


def test_a_window_has_its_own_offsets(tmp_path):
    image = make_image(tmp_path / "disk.img", 64 * MIB)
    write(image, (0, MIB), (10 * MIB, MIB), (20 * MIB, MIB), (30 * MIB, MIB))
    window = Volume.discover(image).window(10 * MIB + 512 * KIB, 10 * MIB)
    used, _ = ask(sparse, window)
    assert used.extents == ExtentSet.from_pairs([(0, 512 * KIB), (9 * MIB + 512 * KIB, 512 * KIB)])


def test_a_file_without_a_byte_of_data_has_nothing_in_use(tmp_path):
    used, _ = ask(sparse, Volume.discover(make_image(tmp_path / "disk.img", 1 << 40)))
    assert used.extents == ExtentSet.empty()


def test_a_file_without_holes_is_not_sparse(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    assert ask(sparse, Volume.discover(image)) == (None, [])


@pytest.mark.root
def test_a_device_has_no_holes(tmp_path, attach):
    device = attach(make_image(tmp_path / "disk.img", 16 * MIB))
    assert ask(sparse, Volume.discover(device)) == (None, [])


def test_a_file_of_many_holes_is_soon_read_and_misses_nothing(tmp_path):
    image = make_image(tmp_path / "disk.img", 1 << 40)
    descriptor = os.open(image, os.O_WRONLY)
    # A block every 32 KiB, then one every 10 MiB: stretches of 1 MiB each, then short ones.
    places = [number * 32 * KIB for number in range(4096)] + [1 << 30 | number * 10 * MIB for number in range(80_000)]
    for place in places:
        os.pwrite(descriptor, b"x", place)
    os.close(descriptor)
    began = time.monotonic()
    used, _ = ask(sparse, Volume.discover(image))
    assert time.monotonic() - began < 20
    assert len(used.extents) <= 80_000 + 128
    assert used.extents.intersection(ExtentSet.from_pairs([(place, 1) for place in places])).total == len(places)
    assert used.extents.total < 80_128 * (MIB + 4096)
