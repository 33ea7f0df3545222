"""How a volume is cut into shares, from nothing in use to everything; and that what comes back is right."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.cluster.copying import cut
from blockferry.extents import ExtentSet
from blockferry.manager import plugin_manager, repository_named
from cluster_hosts_support import MIB, back_up, sharing
from commands_support import Depot
from sets_support import SharedVolume, common_record, make_set

BLOCK, UNIT = 512, 4096
SIZE = 40 * UNIT + 3 * BLOCK
"""No multiple of the repository's chunks."""

runs = st.lists(st.tuples(st.integers(0, SIZE // BLOCK - 1), st.integers(1, 60)), max_size=12)


def in_use(runs: list[tuple[int, int]]) -> ExtentSet:
    starts, counts = (np.array(column, np.int64) * BLOCK for column in zip(*(runs or [(0, 0)]), strict=True))
    return ExtentSet.from_ranges(starts, np.minimum(starts + counts, SIZE))


@given(runs=runs, count=st.integers(1, 50))
def test_shares_have_all_that_is_in_use_once_and_no_chunk_is_in_two(runs: list[tuple[int, int]], count: int):
    used = in_use(runs)
    shares = cut(used, count, UNIT, SIZE)
    assert ExtentSet.empty().union(*shares) == used
    assert len(shares) <= count
    assert all(shares), "a share is empty"
    chunks = [share.align(UNIT, SIZE) for share in shares]
    for one, other in itertools.pairwise(chunks):
        assert one.end <= int(other.starts[0])
    whole = used.align(UNIT, SIZE).total
    assert all(each.total <= whole / count + UNIT for each in chunks)


def test_nothing_in_use_is_no_share_and_less_than_there_are_hosts_fewer():
    assert cut(ExtentSet.empty(), 3, UNIT, SIZE) == []
    little = ExtentSet.from_pairs([(5 * UNIT, UNIT + BLOCK)])
    assert cut(little, 3, UNIT, SIZE) == [
        ExtentSet.from_pairs([(5 * UNIT, UNIT)]),
        ExtentSet.from_pairs([(6 * UNIT, BLOCK)]),
    ]
    assert [share.total for share in cut(ExtentSet.whole(SIZE), 4, UNIT, SIZE)] == [
        10 * UNIT,
        10 * UNIT,
        10 * UNIT,
        10 * UNIT + 3 * BLOCK,
    ]


@pytest.mark.root
@pytest.mark.parametrize("depot", [pytest.param("borg", marks=pytest.mark.thorough), "restic"], indirect=True)
def test_nothing_comes_back_as_nothing_and_a_little_as_it_was(depot: Depot, tmp_path: Path):
    image = tmp_path / "volume.img"
    size = 24 * MIB
    image.touch()
    os.truncate(image, size)
    with sharing(1, tmp_path, str(image), f"sqlite://{tmp_path / 'index.sqlite'}") as (host,):
        host.start()
        for used, most in ((0, 0), (100_000, 1)):
            with image.open("r+b") as file:
                file.seek((size - used) // 4096 * 4096)
                file.write(random.Random(used).randbytes(used))
            said = back_up(depot, host, "--processes", "3")
            assert used <= said["bytes_used"] < used + 2 * 4096
            assert said["shares"] == most
            restored = tmp_path / "restored.img"
            assert depot.ferry("restore", said["snapshot"], restored).code == 0
            assert restored.read_bytes() == image.read_bytes()
            restored.unlink()


def test_a_set_with_an_empty_share_comes_back(depot: Depot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in depot.env.items():
        monkeypatch.setenv(name, value)
    volume = SharedVolume(random.Random(3).randbytes(9 * MIB))
    used = ExtentSet.from_pairs([(MIB, 2 * MIB), (8 * MIB, MIB)])
    cuts = [ExtentSet.from_ranges([begin * MIB], [end * MIB]) for begin, end in ((0, 4), (4, 8), (8, 9))]
    writes = {1: [(MIB + 100, b"later"), (5 * MIB, b"in free space")]}
    with contextlib.closing(repository_named(plugin_manager(), depot.reference)) as repository:
        record = common_record(9 * MIB, repository.unit(9 * MIB))
        made = make_set(repository, volume, used, cuts, writes, record)
    assert len(made.shares) == 3
    restored = tmp_path / "restored.img"
    assert depot.ferry("restore", made.snapshot.id, restored).code == 0
    made.assert_is(restored.read_bytes())
