"""What is read from a repository that answers wrongly, or not at all."""

from __future__ import annotations

import random
import threading
import time

import pytest

from blockferry.errors import DamagedSnapshotError, RepositoryError
from blockferry.extents import ExtentSet
from blockferry.hot.source import Source, UnavailableError
from blockferry.layers import BaseLayer

UNIT = 65536
IMAGE = random.Random(3).randbytes(4 * UNIT)


class Image(BaseLayer):
    """A layer whose reads raise what `errors` has, in turn."""

    def __init__(self, errors: list[Exception]) -> None:
        self.size, self.extents, self.errors, self.opened = len(IMAGE), ExtentSet.whole(len(IMAGE)), errors, 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.errors:
            raise self.errors.pop(0)
        buffer[:] = IMAGE[offset : offset + len(buffer)]

    def again(self) -> Image:
        self.opened += 1
        return self


def source_of(image: Image, patience: float) -> Source:
    return Source(image, image.again, UNIT, readers=2, patience=patience)


def test_a_read_that_fails_for_ever_although_it_can_be_opened_is_given_up_without_haste() -> None:
    image = Image([RepositoryError("no luck")] * 10_000)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="no luck"):
        source_of(image, patience=1).get(0)
    assert 1 <= time.monotonic() - began < 10
    assert image.opened < 10


def test_what_an_adapter_did_not_think_of_is_tried_again_as_well() -> None:
    image = Image([ValueError("write to closed file"), KeyError("x")])
    source = source_of(image, patience=30)
    assert source.get(1) == IMAGE[UNIT : 2 * UNIT]
    assert not source.damaged


def test_files_that_are_missing_while_a_repository_goes_away_are_not_damage() -> None:
    image = Image([DamagedSnapshotError("pack is gone")] * 2)
    opens = iter([True, False, True])

    def open_another() -> Image:
        if not next(opens, True):
            raise RepositoryError("not there")
        return image

    source = Source(image, open_another, UNIT, readers=2, patience=30)
    assert source.get(0) == IMAGE[:UNIT]
    assert not source.damaged


def test_who_waits_for_a_repository_is_let_go_when_nobody_wants_to_wait_any_more() -> None:
    image = Image([RepositoryError("gone")])

    def open_another() -> Image:
        raise RepositoryError("not there")

    source = Source(image, open_another, UNIT, readers=2, patience=3600)
    threading.Timer(0.2, source.stop_waiting).start()
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        source.get(0)
    assert time.monotonic() - began < 5
