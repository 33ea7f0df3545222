"""What is armed: which device, as soon as it shows up, is to be restored from which snapshot.

A file a match lies in the state directory, named as the match is written (`serial:WD-42`): that it is there is all that
udev's rule has to know, and it outlives a reboot. It holds no credentials. When all of a snapshot is on its device, the
match is disarmed: who boots with the restored disk does not restore it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from blockferry.errors import BlockferryError, UsageError
from blockferry.hookspecs import hookimpl
from blockferry.kernel import sync_directory
from blockferry.snapshot import Snapshot
from blockferry.state import state_directory

VALUE_CHARACTERS = "A-Za-z0-9:_.-"
"""Of what a value is made: those that are safe in a file's name and stand for themselves in a unit's."""
_LONGEST = 128


class Kind(NamedTuple):
    """By what a device is known: the property that udev gives it, and the only type of device that is meant.

    A partition has its disk's serial number too: without the type an empty one would be restored onto.
    """

    property: str
    type: str


KINDS = {
    "serial": Kind("ID_SERIAL_SHORT", "disk"),
    "wwn": Kind("ID_WWN", "disk"),
    "path": Kind("ID_PATH", "disk"),
    "partuuid": Kind("ID_PART_ENTRY_UUID", "partition"),
}


@dataclasses.dataclass(frozen=True)
class Match:
    """A device, by one of its properties."""

    kind: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `kind:value` means; raise UsageError if that cannot be the name of a device."""
        kind, separator, value = text.partition(":")
        if not separator or kind not in KINDS:
            raise UsageError(
                f"{text!r}: does not say by what the device is known",
                remedy=f"Write {', '.join(f'{each}:VALUE' for each in KINDS)}; see `udevadm info /dev/sdX`.",
            )
        if not re.fullmatch(f"[{VALUE_CHARACTERS}]{{1,{_LONGEST}}}", value):
            raise UsageError(
                f"{text!r}: a value is of 1 to {_LONGEST} letters, digits, ':', '_', '.' and '-'",
                remedy="Name the device by another of its properties: " + ", ".join(KINDS) + ".",
            )
        return cls(kind, value.lower() if kind == "partuuid" else value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


@dataclasses.dataclass(frozen=True)
class Armed:
    """What is to be restored as soon as a device shows up."""

    match: Match
    name: str
    """What the hot restore will be called."""
    snapshot: str
    """The whole id."""
    repository: str
    """The reference, without credentials, as it is understood from any directory."""
    mount: str = ""
    """Where the restored filesystem is to be mounted; "" for nowhere."""
    rate: int | None = None
    """Bytes a second, at most, for hydration."""
    refused: str = ""
    """Why the last try came to nothing."""

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return dataclasses.asdict(self) | {"match": str(self.match)}


def armed_directory() -> Path:
    """Return the directory of the files, made if it is not there."""
    path = state_directory() / "armed"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def load(match: Match) -> Armed | None:
    """Return what a device is armed for; None if it is not. Raise BlockferryError if that cannot be read."""
    path = armed_directory() / str(match)
    try:
        return Armed(**json.loads(path.read_text()) | {"match": match})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BlockferryError(
            f"{path}: cannot be read: {error}", remedy=f"Disarm it (blockferry disarm {match}), and arm it again."
        ) from None


def load_all() -> list[Armed]:
    """Return all that is armed, by match."""
    names = sorted(each.name for each in armed_directory().iterdir() if not each.name.startswith("."))
    return [found for found in (load(Match.parse(name)) for name in names) if found]


def arm(armed: Armed) -> None:
    """Arm a device, durably, instead of what it was armed for; raise UsageError if another one has the name."""
    with _locked():
        for other in load_all():
            if other.name == armed.name and other.match != armed.match:
                raise UsageError(f"{armed.name}: is what {other.match} is called", remedy="Give it another --name.")
        _write(armed)


def disarm(match: Match) -> bool:
    """Forget what a device is armed for; tell whether it was armed."""
    with _locked():
        path = armed_directory() / str(match)
        was_armed = path.exists()
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
        return was_armed


def note(match: Match, refused: str) -> None:
    """Note why the last try came to nothing, or by "" that it did not; what was disarmed meanwhile stays so."""
    with _locked():
        armed = load(match)
        if armed and armed.refused != refused:
            _write(dataclasses.replace(armed, refused=refused))


@hookimpl
def blockferry_restore_finished(snapshot: Snapshot, target: str, statistics: dict[str, Any]) -> None:
    """Disarm a device when all of its snapshot is there."""
    del target  # has another name after each reboot
    for armed in load_all():
        if (armed.name, armed.snapshot) == (statistics.get("name"), snapshot.id):
            disarm(armed.match)


def _write(armed: Armed) -> None:
    path = armed_directory() / str(armed.match)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        json.dump(armed.to_json(), file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the right to change what is armed."""
    with (armed_directory() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
