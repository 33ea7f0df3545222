"""Trackers of changed blocks in tests: asking them as a backup does, and the truth to compare them with."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from blockferry.extents import ExtentSet
from blockferry.hookspecs import Checkpoint
from blockferry.volume import Volume

CHUNK = 64 << 10
SECTOR = 512
TRACEFS = Path("/sys/kernel/tracing")


def why_no_bpftrace() -> str:
    """Return why bpftrace cannot run here, "" if it can. Mounts tracefs, as systemd does on every host."""
    if os.geteuid() or shutil.which("bpftrace") is None:
        return "needs root and bpftrace: sudo scripts/bootstrap --packages --test"
    if not (TRACEFS / "events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], check=False, capture_output=True)
    if not (TRACEFS / "events" / "block").exists():
        return "needs a kernel with tracepoints of the block layer, and its tracefs on /sys/kernel/tracing"
    return ""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A volume, and the plugin that is asked about it through its hooks."""

    plugin: ModuleType
    path: Path | str

    @property
    def volume(self) -> Volume:
        return Volume.discover(self.path)

    def checkpoint(self, snapshot: str = "snapshot") -> Checkpoint:
        reasons: list[str] = []
        made = self.plugin.blockferry_checkpoint(self.volume, snapshot, "", reasons.append)
        assert made is not None, reasons
        assert (made.snapshot, reasons) == (snapshot, [])
        return made  # type: ignore[no-any-return]

    def no_checkpoint(self) -> list[str]:
        """Assert that no checkpoint can be had; return the reasons that were given."""
        reasons: list[str] = []
        assert self.plugin.blockferry_checkpoint(self.volume, "snapshot", "", reasons.append) is None
        return reasons

    def changed(self, since: Checkpoint) -> ExtentSet:
        reasons: list[str] = []
        answer = self.plugin.blockferry_changed_extents(self.volume, since, reasons.append)
        assert answer is not None, reasons
        assert answer.extents.end <= self.volume.size
        return answer.extents  # type: ignore[no-any-return]

    def declined(self, since: Checkpoint) -> str:
        """Assert that the plugin does not know what changed; return the reason."""
        reasons: list[str] = []
        answer = self.plugin.blockferry_changed_extents(self.volume, since, reasons.append)
        assert answer is None
        (reason,) = reasons
        return reason


def difference(before: Path | bytes, after: Path | bytes) -> ExtentSet:
    """Return the sectors in which two images of one size differ."""
    one, other = (
        np.frombuffer(each, np.uint64) if isinstance(each, bytes) else np.memmap(each, np.uint64, "r")
        for each in (before, after)
    )
    assert one.size == other.size
    return ExtentSet.from_bits((one != other).reshape(-1, SECTOR // 8).any(axis=1), SECTOR)


def assert_covers(answer: ExtentSet, truth: ExtentSet) -> None:
    """Assert that nothing that differs is missing from an answer, and that there is something to miss."""
    assert truth
    assert not truth.difference(answer), (truth.difference(answer), answer)


def copy(image: Path, name: str) -> Path:
    """Return a copy of an image beside it, as it is at this instant."""
    target = image.with_name(name)
    subprocess.run(["cp", "--sparse=always", str(image), str(target)], check=True)
    return target


def eventually(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something holds; an AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
