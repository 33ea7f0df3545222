"""Records: what they say of themselves survives, and what a repository may hold instead is refused."""

import dataclasses
import json

import pytest

from blockferry.errors import DamagedSnapshotError
from blockferry.snapshot import Record, Stability, Tier, new_snapshot_id


def record() -> Record:
    return Record(
        snapshot=new_snapshot_id(),
        created="2026-01-02T03:04:05Z",
        host="nas",
        volume="vm",
        path="/srv/vm.img",
        size=1 << 30,
        block_size=512,
        filesystem="ext4",
        identity={"filesystem_uuid": "1234"},
        tier=Tier.USED,
        tier_reason="",
        method="ext4 bitmaps",
        stability=Stability.OFFLINE,
        freeze="offline",
        unit=1 << 20,
        bytes_used=12345,
        bytes_changed=12345,
        blockferry="0.1",
    )


def test_a_record_survives():
    given = record()
    assert Record.from_json(given.to_json(), "here") == given


def test_fields_of_a_later_version_are_passed_over():
    fields = json.loads(record().to_json()) | {"moon_phase": "full"}
    assert Record.from_json(json.dumps(fields).encode(), "here").volume == "vm"


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 99},
        {"size": -1},
        {"size": "big"},
        {"unit": 0},
        {"tier": "guessed"},
        {"stability": None},
        {"snapshot": 7},
        {"size": 1 << 70},
    ],
)
def test_a_record_that_cannot_be_is_refused(damage):
    fields = json.loads(record().to_json()) | damage
    with pytest.raises(DamagedSnapshotError, match="here"):
        Record.from_json(json.dumps(fields).encode(), "here")


@pytest.mark.parametrize("noise", [b"", b"{", b"[]", b"\xff\xfe", b"7", b"{}"])
def test_noise_is_refused(noise):
    with pytest.raises(DamagedSnapshotError, match="here"):
        Record.from_json(noise, "here")


@pytest.mark.parametrize("name", ["snapshot", "volume", "size", "tier"])
def test_a_record_that_lacks_a_field_is_refused(name):
    fields = {key: value for key, value in dataclasses.asdict(record()).items() if key != name}
    with pytest.raises(DamagedSnapshotError, match="here"):
        Record.from_json(json.dumps(fields).encode(), "here")
