"""What the trackers on device-mapper share: tables, status lines and messages; their tools' XML; snapshots kept in LVM.

A device is asked about by its number, with dmsetup(8); the fields of tables and status lines are those of the kernel's
Documentation/admin-guide/device-mapper. A kept snapshot is a logical volume `blockferry-ID`, ID being the snapshot in
the repository that it belongs to, with the tag `blockferry-checkpoint`; it is known again by its LV UUID alone.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from xml.parsers import expat

import numpy as np

from blockferry import kernel
from blockferry.extents import ExtentSet
from blockferry.freeze import CannotHoldError
from blockferry.freeze.lvm import lvs_report, remove_volume, run_lvm
from blockferry.hookspecs import Checkpoint, Declined
from blockferry.inuse import Numbers, device_name
from blockferry.programs import look_for, package_of
from blockferry.volume import Volume

log = logging.getLogger(__name__)

SECTOR = 512
"""The unit of every length in a table."""
_TAG = "blockferry-checkpoint"
_LV_UUID = r"\w{6}(-\w{4}){5}-\w{6}"
_PIECE = 1 << 16
"""How much of a tool's output is taken at a time."""

Answer = TypeVar("Answer")
Elements = Iterable[tuple[str, dict[str, str]]]


class CannotTrackError(Exception):
    """This tracker cannot begin, or cannot answer; the message says why, in a phrase."""


def attempt(tracker: str, work: Callable[[], Answer], declined: Declined) -> Answer | None:
    """Return what `work` returns; None, after telling `declined` why, if it cannot be done."""
    try:
        return work()
    except (CannotTrackError, CannotHoldError) as reason:
        declined(f"{tracker}: {reason}")
    except OSError as error:
        declined(f"{tracker}: {error.filename or 'the device'}: {error.strerror}")
    return None


# -- devices -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What a device consists of, where that is one thing."""

    kind: str
    size: int
    """In bytes."""
    fields: list[str]
    """What the line says beyond that."""


def device_of(volume: Volume) -> Numbers | None:
    """Return the number of the device-mapper device that a whole volume is; None if it is none."""
    if not volume.is_device or volume.offset:
        return None
    number = os.stat(volume.path).st_rdev
    device = os.major(number), os.minor(number)
    return device if _sysfs(device, "dm").exists() else None


def table(device: Numbers) -> Target | None:
    """Return what a device consists of; None if that is several targets."""
    return parse_target(_dmsetup("table", device))


def status(device: Numbers) -> Target | None:
    """Return the state of what a device consists of; None if that is several targets."""
    return parse_target(_dmsetup("status", device))


def message(device: Numbers, words: str) -> None:
    """Tell a device's target to do something; raise CannotTrackError if it refuses."""
    _dmsetup("message", device, "0", words)


def parse_target(output: str) -> Target | None:
    """Return the one line of a table or status; None if there are several, or none."""
    match = re.fullmatch(r"0 (\d+) (\S+)((?: \S+)*) ?\n", output)
    return Target(match[2], int(match[1]) * SECTOR, match[3].split()) if match else None


def parse_device(field: str) -> Numbers:
    """Return the device that a field of a table names."""
    match = re.fullmatch(r"(\d+):(\d+)", field)
    if not match:
        raise CannotTrackError(f"the device-mapper names a device {field!r}")
    return int(match[1]), int(match[2])


def flush(volume: Volume) -> None:
    """Make durable what was written to a volume."""
    with _opened(volume.path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def metadata_snapshot(device: Numbers, metadata: Numbers, take: str, drop: str) -> Iterator[str]:
    """Have a thin pool or an era hold its metadata as they are now; give the path of the device to read them from.

    There is one such snapshot a pool or era. Raise CannotTrackError if somebody has it.
    """
    state = status(device)
    if state is None or len(state.fields) < 4:
        raise CannotTrackError(f"{device_name(device)} is not in working order (dmsetup status)")
    if state.fields[3] != "-":
        raise CannotTrackError(
            f"not now: somebody holds the metadata snapshot of {_name(device)}"
            f" (`dmsetup message {_name(device)} 0 {drop}` gives up one that was left behind)"
        )
    message(device, take)
    try:
        path = device_name(metadata)
        with _opened(path) as descriptor:
            kernel.forget_pages(descriptor)  # the kernel writes metadata past the page cache
        yield path
    finally:
        message(device, drop)


def _dmsetup(command: str, device: Numbers, *words: str) -> str:
    """Run a command of dmsetup on a device; return what it prints."""
    numbers = ["--major", str(device[0]), "--minor", str(device[1])]
    done = subprocess.run(
        [_program("dmsetup"), command, *numbers, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"LC_ALL": "C"},
        check=False,
    )
    if done.returncode != 0:
        raise CannotTrackError(f"dmsetup: {' '.join(done.stderr.split())}")
    return done.stdout


def _program(name: str) -> str:
    found = look_for(name)
    if found is None:
        raise CannotTrackError(f"{name} is not installed (it comes with {package_of(name)})")
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _name(device: Numbers) -> str:
    return _sysfs(device, "dm/name").read_text().strip()


def _sysfs(device: Numbers, entry: str) -> Path:
    return Path(f"/sys/dev/block/{device[0]}:{device[1]}/{entry}")


# -- what the tools say of metadata ------------------------------------------------------------------------------------


def tool_version(name: str) -> tuple[int, ...]:
    """Return the version of one of the thin-provisioning-tools."""
    done = subprocess.run([_program(name), "-V"], capture_output=True, text=True, check=False)
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", done.stdout)
    if not match:
        raise CannotTrackError(f"{name} does not tell its version")
    return tuple(int(part) for part in match.groups())


def elements(name: str, *arguments: str) -> Elements:
    """Run one of the thin-provisioning-tools; return the elements of the XML that it prints, as it prints them."""
    return parse_xml(_output(_program(name), *arguments))


def parse_xml(pieces: Iterable[bytes]) -> Elements:
    """Yield (name, attributes) of each element of an XML document; raise CannotTrackError if it is not whole."""
    found: list[tuple[str, dict[str, str]]] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))
    parser.StartDoctypeDeclHandler = _refuse  # nothing here has one, and entities could expand without end
    try:
        for piece in pieces:
            parser.Parse(piece, False)
            yield from found
            found.clear()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise CannotTrackError(f"what was read of the metadata is not whole ({error})") from None
    yield from found


def number(attributes: dict[str, str], name: str) -> int:
    """Return an attribute that is a count."""
    value = attributes.get(name, "")
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise CannotTrackError(f"the metadata have {name}={value!r} where a number belongs")
    return int(value)


def extents(ranges: Iterable[tuple[int, int]], block: int, size: int) -> ExtentSet:
    """Return ranges of blocks, given as (begin, end), as bytes of a volume; what lies behind its end is left out."""
    most = -(-size // block)
    found = array.array("q")
    for begin, end in ranges:
        if begin >= end:
            raise CannotTrackError(f"the metadata have a range from {begin} to {end}")
        found.extend((min(begin, most), min(end, most)))
    pairs = np.frombuffer(found, np.int64).reshape(-1, 2) * block if found else np.empty((0, 2), np.int64)
    return ExtentSet.from_ranges(*np.minimum(pairs, size).T)


def _output(*command: str) -> Iterator[bytes]:
    """Yield what a program prints; raise CannotTrackError, with its words, if it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment
        ) as program,
    ):
        while program.stdout and (piece := program.stdout.read(_PIECE)):
            yield piece
        if program.wait() != 0:
            errors.seek(0)
            first = errors.readline().decode(errors="replace").strip()
            raise CannotTrackError(f"{Path(command[0]).name}: {first or f'ended with {program.returncode}'}")


def _refuse(*_: object) -> None:
    raise CannotTrackError("what was read of the metadata declares a document type")


# -- snapshots kept in LVM ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogicalVolume:
    """A logical volume, as lvs(8) lists it; sizes in bytes."""

    uuid: str
    group: str
    name: str
    size: int
    pool: str
    """The UUID of its thin pool, "" if it is not thin."""
    thin_id: str
    origin: str
    """The UUID of what it is a snapshot of."""
    device: Numbers
    extent: int
    free_extents: int

    @property
    def full_name(self) -> str:
        """The name by which LVM's programs know it."""
        return f"{self.group}/{self.name}"


def logical_volume(volume: Volume) -> LogicalVolume | None:
    """Return the logical volume that a volume is; None if it is none."""
    device = device_of(volume)
    match = re.fullmatch(r"LVM-\w{32}(\w{32})\n", _sysfs(device, "dm/uuid").read_text()) if device else None
    if not match:
        return None
    dashed = re.sub(r"(\w{6})" + r"(\w{4})" * 5 + r"(\w{6})", r"\1-\2-\3-\4-\5-\6-\7", match[1])
    found = look_up(f'lv_uuid="{dashed}"')
    if found is None:
        raise CannotTrackError("LVM does not list it")
    return found


def look_up(selection: str) -> LogicalVolume | None:
    """Return the one logical volume that a selection (lvmreport(7)) finds, None if there is none."""
    fields = "lv_uuid,vg_name,lv_name,lv_size,pool_lv_uuid,thin_id,origin_uuid,lv_kernel_major,lv_kernel_minor"
    rows = lvs_report("--options", f"{fields},vg_extent_size,vg_free_count", "--select", selection)
    if len(rows) != 1:
        return None
    row = rows[0]
    return LogicalVolume(
        uuid=row["lv_uuid"],
        group=row["vg_name"],
        name=row["lv_name"],
        size=int(row["lv_size"]),
        pool=row["pool_lv_uuid"],
        thin_id=row["thin_id"],
        origin=row["origin_uuid"],
        device=(int(row["lv_kernel_major"]), int(row["lv_kernel_minor"])),
        extent=int(row["vg_extent_size"]),
        free_extents=int(row["vg_free_count"]),
    )


def keep_snapshot(tracker: str, volume: Volume, origin: LogicalVolume, snapshot: str, *kind: str) -> Checkpoint:
    """Take the snapshot of a volume that a checkpoint is; `origin` is what LVM says of it, `kind` goes to lvcreate(8).

    What was written before is made durable: else a power cut could undo, unseen, what the backup is going to read.
    """
    name = f"blockferry-{snapshot}"
    options = ["--snapshot", "--name", name, "--permission", "r", "--addtag", _TAG, "--yes", *kind]
    with contextlib.ExitStack() as undone:
        undone.callback(remove_volume, f"{origin.group}/{name}")
        run_lvm("lvcreate", *options, origin.full_name)
        made = look_up(f'lv_full_name="{origin.group}/{name}"')
        if made is None:
            raise CannotTrackError(f"LVM does not list {origin.group}/{name}, which it made")
        flush(volume)
        undone.pop_all()
    return Checkpoint(tracker, snapshot, {"snapshot_uuid": made.uuid, "origin_uuid": origin.uuid})


def kept_snapshot(since: Checkpoint, origin: LogicalVolume) -> LogicalVolume:
    """Return the snapshot that a checkpoint is; raise CannotTrackError if it is gone or another volume's."""
    if since.state.get("origin_uuid") != origin.uuid:
        raise CannotTrackError(f"the snapshot kept for {since.snapshot} is of another logical volume")
    kept = look_up(f'lv_uuid="{_uuid(since)}"')
    if kept is None:
        raise CannotTrackError(f"the snapshot kept for {since.snapshot} is gone")
    if kept.origin != origin.uuid or kept.group != origin.group:
        raise CannotTrackError(f"{kept.full_name} is not a snapshot of {origin.full_name}")
    return kept


def remove_snapshot(checkpoint: Checkpoint) -> None:
    """Remove the snapshot that a checkpoint is, if it is there; say so if that fails."""

    def remove() -> None:
        kept = look_up(f'lv_uuid="{_uuid(checkpoint)}" && lv_tags="{_TAG}"')
        if kept is not None:
            remove_volume(kept.full_name)

    attempt(checkpoint.tracker, remove, log.warning)


def _uuid(checkpoint: Checkpoint) -> str:
    """Return the UUID of the snapshot that a checkpoint is: it goes into a selection."""
    uuid = str(checkpoint.state.get("snapshot_uuid"))
    if not re.fullmatch(_LV_UUID, uuid, re.ASCII):
        raise CannotTrackError(f"what was noted for {checkpoint.snapshot} names no logical volume")
    return uuid
