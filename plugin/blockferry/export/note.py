"""What this host knows of each export that was not released: enough to clear it away, whatever became of its process.

exports/KEY.json in the state directory, where KEY stands for the directory that it is shown at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path

from blockferry import service
from blockferry.export.job import Process
from blockferry.state import state_directory

KIND = "export"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Note:
    """One export."""

    at: str
    """The directory."""
    volumes: tuple[tuple[str, str], ...]
    """Name and path of each volume, and of each group."""
    job: tuple[Process, ...] = ()
    ended: str = ""
    """Why it ended, if that was not because it was released."""

    @property
    def names(self) -> list[str]:
        """The names of the volumes and groups."""
        return [name for name, _path in self.volumes]

    @property
    def socket(self) -> Path:
        """Where its process listens."""
        return service.runtime_directory(KIND) / f"{key(self.at)}.socket"

    def save(self) -> None:
        """Write it over what was there."""
        path = _path(self.at)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        unfinished = path.with_suffix(".new")
        with unfinished.open("w") as file:
            json.dump(dataclasses.asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def forget(self) -> None:
        """Remove it."""
        _path(self.at).unlink(missing_ok=True)


def load_all() -> list[Note]:
    """Return every export that was not released."""
    directory = state_directory() / "exports"
    found = map(_read, sorted(directory.glob("*.json")))
    return [each for each in found if each]


def key(at: str) -> str:
    """Return what stands for a directory in names of files."""
    return hashlib.sha256(os.fsencode(at)).hexdigest()[:16]


def _path(at: str) -> Path:
    return state_directory() / "exports" / f"{key(at)}.json"


def _read(path: Path) -> Note | None:
    """Return what a file says; None, and a line in the log, if it is not one of ours any more."""
    try:
        fields = json.loads(path.read_bytes())
        volumes = tuple((str(name), str(place)) for name, place in fields["volumes"])
        job = tuple((int(number), int(began)) for number, began in fields["job"])
        return Note(str(fields["at"]), volumes, job, str(fields["ended"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s: cannot be read: %s", path, error)
        return None
