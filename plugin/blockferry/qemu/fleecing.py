"""What a backup adds to a running machine, and takes away again.

QEMU calls it fleecing (docs/interop/live-block-operations, image-fleecing among its iotests; libvirt's pull-mode
backup does the same): a backup job with sync=none puts a filter on top of the disk, and copies each block that the
guest is about to overwrite into an overlay first. The overlay, with the disk as its backing file, is the disk as it was
when the job began, and is exported over NBD.

    guest -> blockferry-filter -> NODE <- backing of - blockferry-overlay <- NBD export <- nbdfuse <- blockferry

It needs a directory, `Scratch`, which outlives no backup: who made it holds a lock on it.

    blockferry-qemu-XXXX/        ours, the machine may pass through
        disk                     the disk, by nbdfuse
        machine/                 the machine's own: it may run as another user, and is not trusted with what we own
            overlay.qcow2        has no name any more once the machine has it open
            nbd.sock
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockferry.errors import NotNowError, VolumeError
from blockferry.programs import find
from blockferry.qemu.name import DiskName
from blockferry.qemu.qmp import GoneError, Monitor, QmpError, connected, wait_until
from blockferry.volume import all_mounts

PREFIX = "blockferry-"
"""Of every name that we give in a machine."""

OVERLAY, FILTER, JOB, EXPORT = (f"{PREFIX}{what}" for what in ("overlay", "filter", "backup", "disk"))
CHANGED = f"{PREFIX}changed"
"""A copy of a bitmap, and the export that shows it, while it is read."""

_RUNNING = {"running", "paused"}


@dataclasses.dataclass(frozen=True)
class Scratch:
    """The directory of one backup."""

    path: Path

    @property
    def disk(self) -> Path:
        """Where the disk is to be read."""
        return self.path / "disk"

    @property
    def overlay(self) -> Path:
        """What the machine keeps overwritten blocks in."""
        return self.path / "machine" / "overlay.qcow2"

    @property
    def nbd(self) -> Path:
        """The socket of the machine's NBD server."""
        return self.path / "machine" / "nbd.sock"

    def uri(self, export: str) -> str:
        """Return the NBD URI of an export of the machine's."""
        return f"nbd+unix:///{export}?socket={urllib.parse.quote(str(self.nbd))}"

    def mounted(self) -> bool:
        """Tell whether something is mounted there, also if whoever served it is dead."""
        return any(mount.point == str(self.disk) for mount in all_mounts())

    def unmount(self) -> None:
        """Unmount the disk if it is mounted: lazily, for a reader may hang in it. nbdfuse ends with its mount."""
        if self.mounted():
            command = [find("fusermount3"), "-u", "-z", str(self.disk)]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=False)

    def remove(self) -> None:
        """Unmount the disk and remove the directory, as much of it as there is."""
        self.unmount()
        for file in (self.disk, self.overlay, self.nbd):
            file.unlink(missing_ok=True)
        for directory in (self.nbd.parent, self.path):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()


def scratch_parent() -> Path:
    """Return the directory for large temporary files (file-hierarchy(7)), which TMPDIR overrides."""
    return Path(os.environ.get("TMPDIR", "/var/tmp")).resolve()  # noqa: S108  # mkdtemp makes what lies in it


@contextlib.contextmanager
def scratch(size: int, owner: tuple[int, int]) -> Iterator[Scratch]:
    """Make the directory and the overlay for a disk of `size` bytes and a machine that runs as `owner`."""
    try:
        made = Scratch(Path(tempfile.mkdtemp(prefix=f"{PREFIX}qemu-", dir=scratch_parent())))
    except OSError as error:
        raise VolumeError(
            f"{scratch_parent()}: {error.strerror}", remedy="Set TMPDIR to a directory with room for temporary files."
        ) from None
    with contextlib.ExitStack() as held:
        held.callback(made.remove)
        descriptor = os.open(made.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        made.disk.touch(0o600)
        made.nbd.parent.mkdir(0o700)
        command = [find("qemu-img"), "create", "-q", "-f", "qcow2", str(made.overlay), str(size)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VolumeError(f"{made.overlay}: {done.stderr.strip()}", remedy="Is there room in TMPDIR, or /var/tmp?")
        if os.geteuid() == 0:
            made.path.chmod(0o711)
            os.chown(made.overlay, *owner)
            os.chown(made.nbd.parent, *owner)
        yield made


def remove_stale_scratch() -> None:
    """Remove the directories of backups that were killed, and their watchdogs with them."""
    for path in scratch_parent().glob(f"{PREFIX}qemu-*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Scratch(path).remove()
            finally:
                os.close(descriptor)


def begin(monitor: Monitor, disk: DiskName, place: Scratch) -> None:
    """Have the machine keep its disk as it is now, and export that."""
    file = {"driver": "file", "filename": str(place.overlay)}
    monitor.execute("blockdev-add", driver="qcow2", node_name=OVERLAY, file=file, backing=disk.node)
    place.overlay.unlink()
    # After the node, by which `end` knows that the server is ours.
    _start_server(monitor, place)
    monitor.execute(
        "blockdev-backup", job_id=JOB, device=disk.node, target=OVERLAY, sync="none", filter_node_name=FILTER
    )
    monitor.execute("block-export-add", type="nbd", id=EXPORT, node_name=OVERLAY, name=EXPORT)


def _start_server(monitor: Monitor, place: Scratch) -> None:
    """Have the machine serve NBD; NotNowError if it does so already: it has one server, and does not say where."""
    try:
        monitor.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(place.nbd)}})
    except QmpError as error:
        if "already running" not in error.message:
            raise
        monitor.execute("blockdev-del", node_name=OVERLAY)  # else `end` would stop a server that is not ours
        raise NotNowError(
            f"{monitor.path}: the machine's NBD server is in use by somebody else",
            remedy="Wait for the other backup or migration, or stop its server (nbd-server-stop).",
        ) from None


def running(monitor: Monitor) -> bool:
    """Tell whether the machine still keeps its disk as it was."""
    return any(job["id"] == JOB and job["status"] in _RUNNING for job in monitor.execute("query-jobs"))


def end(socket: str) -> bool:
    """Take away from a machine whatever we added, in whatever state it is; return whether there was anything.

    A machine that does not run has nothing. Checkpoints' bitmaps stay.
    """
    try:
        with connected(socket) as monitor:
            return _end(monitor)
    except GoneError:
        return False


def _end(monitor: Monitor) -> bool:
    nodes = [node for node in _nodes(monitor) if node["node-name"] == OVERLAY]
    exports = [each for each in monitor.execute("query-block-exports") if each["id"].startswith(PREFIX)]
    for export in exports:
        remove_export(monitor, export["id"])
    for job in _ours(monitor, "query-jobs"):
        monitor.execute("job-cancel", id=job)
    wait_until(lambda: not _ours(monitor, "query-jobs"), "QEMU's backup job")
    if nodes and not any(each["type"] == "nbd" for each in monitor.execute("query-block-exports")):
        with contextlib.suppress(QmpError):  # it was stopped already
            monitor.execute("nbd-server-stop")
    for node in _nodes(monitor):
        if any(bitmap.get("name") == CHANGED for bitmap in node.get("dirty-bitmaps", [])):
            monitor.execute("block-dirty-bitmap-remove", node=node["node-name"], name=CHANGED)
    if nodes:
        monitor.execute("blockdev-del", node_name=OVERLAY)
    return bool(nodes or exports)


def remove_export(monitor: Monitor, name: str) -> None:
    """Remove an export, whoever reads it, and wait until it is gone."""
    monitor.execute("block-export-del", id=name, mode="hard")
    wait_until(lambda: name not in _ours(monitor, "query-block-exports"), f"the export {name}")


def _ours(monitor: Monitor, query: str) -> list[str]:
    return [each["id"] for each in monitor.execute(query) if each["id"].startswith(PREFIX)]


def _nodes(monitor: Monitor) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = monitor.execute("query-named-block-nodes", flat=True)
    return nodes


def free_bytes(place: Scratch) -> int:
    """Return how much the machine may still write to the overlay."""
    try:
        facts = os.statvfs(place.path)
    except OSError as error:
        raise VolumeError(f"{place.path}: {error.strerror}") from None
    return facts.f_bavail * facts.f_frsize
