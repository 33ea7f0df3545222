"""The catalog: an index that can be lost, damaged and made again."""

import contextlib
import dataclasses

import pytest

from blockferry.catalog import Catalog
from blockferry.errors import BlockferryError
from blockferry.snapshot import Record, Snapshot, Stability, Tier

RECORD = Record(
    snapshot="0123456789ab",
    created="2026-01-02T03:04:05Z",
    host="nas",
    volume="vm",
    path="/srv/vm.img",
    size=1 << 30,
    block_size=512,
    filesystem="ext4",
    identity={},
    tier=Tier.USED,
    tier_reason="",
    method="ext4 bitmaps",
    stability=Stability.OFFLINE,
    freeze="offline",
    unit=1 << 20,
    bytes_used=1,
    bytes_changed=1,
)
SNAPSHOT = Snapshot("0123456789ab", "vm-1", "vm", RECORD.created, RECORD.size, "used")


def test_what_was_added_is_found_by_the_next_command(tmp_path):
    path = tmp_path / "catalog.sqlite"
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.add("borg:/repo", SNAPSHOT, RECORD, {"bytes_read": 7})
        catalog.add("borg:/repo", SNAPSHOT, RECORD, {"bytes_read": 8})
        catalog.add("borg:/other", dataclasses.replace(SNAPSHOT, id="x"), RECORD, {})
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.statistics("borg:/repo") == {"0123456789ab": {"bytes_read": 8}}


def test_a_file_that_is_no_catalog_is_named_and_left_alone(tmp_path):
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"my precious notes" * 100)
    with pytest.raises(BlockferryError, match="cannot be used") as caught:
        Catalog(path)
    assert "catalog rebuild" in caught.value.remedy
    assert path.read_bytes() == b"my precious notes" * 100


def test_a_catalog_of_another_version_is_refused(tmp_path):
    path = tmp_path / "catalog.sqlite"
    with contextlib.closing(Catalog(path)) as catalog:
        catalog.connection.execute("PRAGMA user_version = 9")
    with pytest.raises(BlockferryError, match="schema 9"):
        Catalog(path)
