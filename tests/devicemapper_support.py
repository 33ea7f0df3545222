"""Trackers asked as a backup asks them, and what really changed: two images of the volume, compared."""

from __future__ import annotations

import subprocess
from types import ModuleType

import numpy as np

from blockferry.extents import ExtentSet
from blockferry.hookspecs import Checkpoint, FreezeOptions
from blockferry.volume import Volume
from freeze_support import hold, read

GRAIN = 512


def run(*command: str) -> str:
    """Run a command; return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def begin(tracker: ModuleType, device: str, snapshot: str = "0123456789ab") -> Checkpoint:
    """Make a checkpoint of a volume, which has to work."""
    reasons: list[str] = []
    made: Checkpoint | None = tracker.blockferry_checkpoint(
        Volume.discover(device), snapshot, tracker.TRACKER, reasons.append
    )
    assert made is not None, reasons
    return made


def declines_to_begin(tracker: ModuleType, device: str) -> list[str]:
    """Return why no checkpoint can be made: nothing if the volume is not of the tracker's kind."""
    reasons: list[str] = []
    assert (
        tracker.blockferry_checkpoint(Volume.discover(device), "0123456789ab", tracker.TRACKER, reasons.append) is None
    )
    return reasons


def declines(tracker: ModuleType, device: str, since: Checkpoint) -> str:
    """Return why a tracker does not answer."""
    reasons: list[str] = []
    assert tracker.blockferry_changed_extents(Volume.discover(device), since, reasons.append) is None
    (reason,) = reasons
    return reason


def changed(tracker: ModuleType, device: str, since: Checkpoint) -> ExtentSet:
    """Return a tracker's answer, which has to be one."""
    reasons: list[str] = []
    answer = tracker.blockferry_changed_extents(Volume.discover(device), since, reasons.append)
    assert answer is not None, reasons
    return answer.extents  # type: ignore[no-any-return]


def back_up(
    tracker: ModuleType, device: str, snapshot: str, since: list[Checkpoint], options: FreezeOptions | None = None
) -> tuple[Checkpoint, bytes, list[ExtentSet]]:
    """Do what a backup does, in its order; return its checkpoint, the image, what changed since each of the others."""
    made = begin(tracker, device, snapshot)
    with hold(device, options) as frozen:
        answers = [changed(tracker, device, each) for each in since]
        image = read(frozen)
        frozen.check()
    return made, image, answers


def contents(device: str) -> bytes:
    """Return all bytes of a volume that nobody writes to."""
    volume = Volume.discover(device)
    buffer = bytearray(volume.size)
    with volume.open() as disk:
        disk.read_into(0, memoryview(buffer))
    return bytes(buffer)


def differing(before: bytes, after: bytes) -> ExtentSet:
    """Return what two images differ in, to the sector."""
    rows = [np.frombuffer(image, np.uint8).reshape(-1, GRAIN) for image in (before, after)]
    starts = np.flatnonzero((rows[0] != rows[1]).any(axis=1)) * GRAIN
    return ExtentSet.from_ranges(starts, starts + GRAIN)


def check(answer: ExtentSet, before: bytes, after: bytes, *, most: float = 0.5) -> None:
    """Fail unless an answer has all that two images differ in, something, and at most a share of the volume."""
    truth = differing(before, after)
    assert truth
    assert truth.difference(answer) == ExtentSet.empty()
    assert answer.total <= most * len(after)
