"""A host whose users may write to a shared volume without its guard: no backup of it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockferry.cluster import coordinator
from blockferry.cluster import epoch as words
from blockferry.cluster.coordinator import coordinated
from blockferry.cluster.index import LogIndex
from blockferry.errors import EpochError, NotNowError, UsageError
from cluster_support import open_index
from commands_support import blockferry

VOLUME = "shared"
SIZE = 1 << 20
ABOUT = {"path": "/dev/lun0", "size": SIZE}


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path / 'index'}"


@pytest.fixture
def index(reference: str) -> Iterator[LogIndex]:
    """An index that knows of one guard, which does nothing."""
    with contextlib.closing(open_index(reference)) as opened:
        opened.put(words.host_key(VOLUME, "a"), ABOUT)
        yield opened


def begin(index: LogIndex) -> None:
    with coordinated(index, VOLUME, SIZE, []):
        pass


def test_no_backup_begins_while_a_device_has_lost_its_guard(index: LogIndex, reference: str) -> None:
    for host in ("a", "b", "b2"):
        index.put(words.device_key(VOLUME, host), {})
    with pytest.raises(UsageError, match="on b, b2, where its guard was killed"):
        begin(index)
    listed = blockferry("cluster", "hosts", VOLUME, "--index", reference, "--json").json()
    assert [each["host"] for each in listed["hosts"]] == ["a"]
    assert listed["unguarded"] == ["b", "b2"]

    blockferry("cluster", "forget", VOLUME, "a", "--index", reference).refused(2, "nothing is to be forgotten")
    blockferry("cluster", "forget", VOLUME, "b", "--index", reference, "--json").json()
    with pytest.raises(UsageError, match="on b2, where"):
        begin(index)


@pytest.mark.parametrize("seen", [True, False])
def test_a_guard_that_may_not_have_seen_the_epoch_s_beginning_is_waited_for(
    index: LogIndex, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    put = index.put

    def put_and_come(key: str, value: dict[str, Any], **options: Any) -> bool:
        if key == words.epoch_key(VOLUME):
            put(words.host_key(VOLUME, "b"), ABOUT)
        return put(key, value, **options)

    monkeypatch.setattr(index, "put", put_and_come)
    monkeypatch.setattr(coordinator, "_PATIENCE_TO_WRITE_OUT", 0.3)
    if seen:
        put(words.host_key(VOLUME, "b"), ABOUT)
        with pytest.raises(EpochError, match="a, b: did not report `ready`"):
            begin(index)
    else:
        with pytest.raises(NotNowError, match="b: its guard was started just now"):
            begin(index)
