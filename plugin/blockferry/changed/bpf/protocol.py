"""What the plugin and the commands ask the process that tracks a device.

A question is `{"do": "checkpoint" | "changed" | "release" | "status" | "stop", ...}`. The payload of an answer is
extents: starts and then ends, 64-bit little-endian. The socket is named by the device's numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blockferry import service
from blockferry.changed.bpf.device import Numbers
from blockferry.errors import BlockferryError
from blockferry.extents import ExtentSet
from blockferry.service import DeclinedError

KIND = "track"


class NotTrackedError(BlockferryError):
    """Nobody tracks the device. `broken_off`: somebody did, and did not end as asked."""

    def __init__(self, message: str, *, broken_off: bool = False) -> None:
        super().__init__(message, remedy="Start it: blockferry track start VOLUME")
        self.broken_off = broken_off


def socket_path(numbers: Numbers) -> Path:
    """Return where the process that tracks a device listens."""
    return service.runtime_directory(KIND) / f"{numbers[0]}-{numbers[1]}.socket"


def tracked() -> list[Numbers]:
    """Return the devices for which there is a socket."""
    found = (path.stem.split("-") for path in service.runtime_directory(KIND).glob("*.socket"))
    return sorted((int(major), int(minor)) for major, minor in found)


def device_named(numbers: Numbers) -> str:
    """Return what a device is called where only its numbers are known."""
    return f"device {numbers[0]}:{numbers[1]}"


def ask(numbers: Numbers, question: dict[str, Any]) -> tuple[dict[str, Any], ExtentSet]:
    """Ask the process that tracks a device; return its answer, and the extents that came with it.

    Raise NotTrackedError if there is none, DeclinedError with its reason if it cannot answer.
    """
    name = device_named(numbers)
    try:
        answer, payload = service.ask(socket_path(numbers), question, name=name)
    except service.NobodyThereError as error:
        what = "what tracked it was killed" if error.broken_off else "is not tracked"
        raise NotTrackedError(f"{name}: {what}", broken_off=error.broken_off) from None
    if len(payload) % 16:
        raise DeclinedError(f"{name}: what tracks it does not answer as it should")
    offsets = np.frombuffer(payload, "<i8").astype(np.int64)
    return answer, ExtentSet.from_ranges(offsets[: offsets.size // 2], offsets[offsets.size // 2 :])


def bytes_of(extents: ExtentSet) -> bytes:
    """Return extents as a payload."""
    return np.concatenate([extents.starts, extents.ends]).astype("<i8").tobytes()
