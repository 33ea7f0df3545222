"""Which blocks of a running machine's disk changed: QEMU's dirty bitmaps (docs/interop/bitmaps of QEMU).

A checkpoint is a bitmap named `blockferry-SNAPSHOT` that records from its making on, 64 KiB a bit. In a qcow2 image it
is persistent: it lies in the image, survives a restart of the machine, and goes where the image goes, so that it always
tells of this image's own past. QEMU marks it inconsistent if the machine crashed, and then it is not used. For other
formats it lives in the machine's memory and is gone with it.

What is read is a copy of the bitmap, over NBD (docs/interop/nbd of QEMU: the context `qemu:dirty-bitmap:NAME`): QEMU
does not export one that records, and the one asked about has to go on.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry.errors import VolumeError
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, Checkpoint, Declined, hookimpl
from blockferry.programs import find
from blockferry.qemu.disk import node_of
from blockferry.qemu.fleecing import CHANGED, OVERLAY, PREFIX, Scratch, remove_export, running
from blockferry.qemu.name import DiskName
from blockferry.qemu.qmp import Monitor, QmpError, connected
from blockferry.volume import Volume

NAME = "qemu"

_GRANULARITY = 64 << 10

_CLEAN = "0"
"""Of a run in the context `qemu:dirty-bitmap`: bit 0 says dirty."""


@hookimpl
def blockferry_checkpoint(volume: Volume, snapshot: str, named: str, declined: Declined) -> Checkpoint | None:
    """Begin a bitmap, in the image if its format has room for one."""
    disk = DiskName.parse(volume.path)
    if disk is None or named not in ("", NAME):
        return None
    bitmap = {"node": disk.node, "name": f"{PREFIX}{snapshot}", "granularity": _GRANULARITY}
    with connected(disk.socket) as monitor:
        try:
            try:
                monitor.execute("block-dirty-bitmap-add", **bitmap, persistent=True)
            except QmpError:
                monitor.execute("block-dirty-bitmap-add", **bitmap)
        except QmpError as error:
            declined(f"{NAME}: {error.message}")
            return None
    return Checkpoint(NAME, snapshot, {"socket": disk.socket, "node": disk.node, "size": volume.size})


@hookimpl
def blockferry_changed_extents(
    volume: Volume, still: Volume, since: Checkpoint, declined: Declined
) -> ChangedBlocks | None:
    """Read the bitmap that began at the checkpoint."""
    disk = DiskName.parse(volume.path)
    if since.tracker != NAME or disk is None:
        return None
    if since.state != {"socket": disk.socket, "node": disk.node, "size": volume.size}:
        declined(f"{NAME}: the checkpoint is of another disk, or of another size")
        return None
    with connected(disk.socket) as monitor:
        flaw = _flaw(_bitmap(monitor, disk, _name(since)))
        # Only while the machine keeps the disk as it is read does the bitmap hold all that was written before.
        if not flaw and not running(monitor):
            flaw = "the disk does not hold still"
        if flaw:
            declined(f"{NAME}: {flaw}")
            return None
        place = Scratch(Path(still.path).parent)
        with _copy(monitor, disk, _name(since)):
            extents = _dirty(place.uri(CHANGED), volume.size)
    return ChangedBlocks(extents, "QEMU dirty bitmap")


@hookimpl
def blockferry_release_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove the bitmap; an error if the machine does not run, for a bitmap in the image is still there."""
    if checkpoint.tracker != NAME:
        return
    disk = DiskName(checkpoint.state["socket"], checkpoint.state["node"])
    with connected(disk.socket) as monitor:
        if _bitmap(monitor, disk, _name(checkpoint)):
            monitor.execute("block-dirty-bitmap-remove", node=disk.node, name=_name(checkpoint))


def _name(checkpoint: Checkpoint) -> str:
    return f"{PREFIX}{checkpoint.snapshot}"


def _bitmap(monitor: Monitor, disk: DiskName, name: str) -> dict[str, Any] | None:
    """Return what the machine says of a bitmap, None if the node has none of that name."""
    bitmaps: list[dict[str, Any]] = node_of(monitor, disk).get("dirty-bitmaps", [])
    return next((bitmap for bitmap in bitmaps if bitmap.get("name") == name), None)


def _flaw(bitmap: dict[str, Any] | None) -> str:
    """Return why a bitmap does not tell all that was written since it began; "" if it does."""
    if bitmap is None:
        return "the bitmap is gone: the machine was restarted, or somebody removed it"
    if bitmap.get("inconsistent"):
        return "the bitmap is inconsistent: the machine was killed while it recorded"
    if bitmap["busy"]:
        return "the bitmap is in use by somebody else"
    if not bitmap["recording"]:
        return "somebody stopped the bitmap's recording"
    return ""


@contextlib.contextmanager
def _copy(monitor: Monitor, disk: DiskName, name: str) -> Iterator[None]:
    """Export a copy of a bitmap: with the overlay, for which QEMU looks in its backing file, the disk, too."""
    monitor.execute("block-dirty-bitmap-add", node=disk.node, name=CHANGED, granularity=_GRANULARITY, disabled=True)
    try:
        monitor.execute("block-dirty-bitmap-merge", node=disk.node, target=CHANGED, bitmaps=[name])
        monitor.execute("block-export-add", type="nbd", id=CHANGED, node_name=OVERLAY, name=CHANGED, bitmaps=[CHANGED])
        try:
            yield
        finally:
            remove_export(monitor, CHANGED)
    finally:
        monitor.execute("block-dirty-bitmap-remove", node=disk.node, name=CHANGED)


def _dirty(uri: str, size: int) -> ExtentSet:
    """Return the dirty runs of the exported bitmap; VolumeError if nbdinfo does not tell of every byte."""
    command = [find("nbdinfo"), f"--map=qemu:dirty-bitmap:{CHANGED}", uri]
    environment = {**os.environ, "LC_ALL": "C"}
    pairs, end = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None  # noqa: S101
        for line in process.stdout:
            start, length, kind = line.decode("ascii", "replace").split()[:3]
            if int(start) != end:
                break
            end += int(length)
            if kind != _CLEAN:
                pairs.append((int(start), int(length)))
    if process.returncode != 0 or end < size:
        raise VolumeError(f"{uri}: nbdinfo told of the bitmap's first {end} bytes only, of {size}")
    return ExtentSet.from_pairs(pairs).clip(0, size)
