"""The plugin: it asks the process that tracks a device, if there is one (`blockferry track start`).

Who never started one is not told that it could be. Who did, and whose tracking broke off, is.
"""

from __future__ import annotations

from typing import Any

from blockferry.changed.bpf.device import numbers_of
from blockferry.changed.bpf.protocol import NotTrackedError, ask
from blockferry.errors import BlockferryError
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.service import DeclinedError
from blockferry.volume import Volume

NAME = "bpf"
_KEEP = 64


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Begin a generation of what is written to a tracked device."""
    if not volume.is_device or volume.offset or named not in ("", NAME):
        return None
    try:
        state, _none = ask(numbers_of(volume.path), {"do": "checkpoint"})
    except NotTrackedError as error:
        if error.broken_off:
            declined(f"{NAME}: {error.message}: `blockferry track start {volume.path}` starts it again")
        return None
    except BlockferryError as error:
        declined(f"{NAME}: {error.message}")
        return None
    return Checkpoint(NAME, snapshot, state, keep=_KEEP)


@hookimpl
def blockferry_changed_extents(volume: Volume, since: Checkpoint, declined: Declined) -> ChangedBlocks | None:
    """Return what was written to a tracked device since a checkpoint."""
    if since.tracker != NAME:
        return None
    try:
        if not volume.is_device or volume.offset:
            raise DeclinedError(f"{volume.path} is not the device that was tracked")
        _answer, extents = ask(numbers_of(volume.path), {"do": "changed", **_named(since)})
    except BlockferryError as error:
        declined(f"{NAME}: {error.message}")
        return None
    return ChangedBlocks(extents, "bpftrace on the device")


@hookimpl
def blockferry_release_checkpoint(checkpoint: Checkpoint) -> None:
    """Let the process that tracks the device forget a checkpoint; without that process it is forgotten already."""
    device = checkpoint.state.get("device")
    if checkpoint.tracker != NAME or not isinstance(device, list) or len(device) != 2:
        return
    try:
        ask((int(device[0]), int(device[1])), {"do": "release", **_named(checkpoint)})
    except (NotTrackedError, DeclinedError):
        return


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint is called in questions."""
    return {name: checkpoint.state.get(name) for name in ("session", "generation")}
