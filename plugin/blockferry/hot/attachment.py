"""What this host knows of each hot restore, in a directory a name: enough to go on after a crash or a reboot.

attachment.json     what is restored where, and whether all of it is there
map                 which blocks are on the target (`state.py`)
head                the first bytes of the target, until all of it is there (`target.py`)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from blockferry.errors import BlockferryError, UsageError
from blockferry.kernel import sync_directory
from blockferry.state import state_directory

KIND = "hot"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Attachment:
    """One hot restore onto a target. Sizes in bytes."""

    name: str
    repository: str
    """The reference, without credentials."""
    snapshot: str
    target: str
    size: int
    block_size: int
    """The logical block size of the disk."""
    total: int
    """What had to be brought in when it began."""
    finished: bool = False
    """All is there: the target alone is the volume."""
    mark: str = ""
    """What the target bears until then, and nothing else in the world: devices get other names at a reboot."""

    @property
    def directory(self) -> Path:
        """Where all of it lies."""
        return directory_of(self.name)

    def about(self) -> dict[str, Any]:
        """Return what the map of the target is bound to."""
        return {"snapshot": self.snapshot, "mark": self.mark}

    def save(self) -> None:
        """Write it, durably, over what was there; raise BlockferryError if that fails."""
        temporary = self.directory / "attachment.new"
        try:
            with temporary.open("w") as file:
                json.dump(dataclasses.asdict(self), file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / "attachment.json")
            sync_directory(self.directory)
        except OSError as error:
            raise BlockferryError(f"{temporary}: writing failed: {error.strerror}", remedy="Make room there.") from None

    def forget(self) -> None:
        """Remove all that is known of it."""
        shutil.rmtree(self.directory, ignore_errors=True)


def directory_of(name: str) -> Path:
    """Return the directory of a name; raise UsageError if it cannot be one."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"{name!r}: not a name", remedy="Use letters, digits, '.', '_' and '-'.")
    return state_directory() / KIND / name


def make_directory(name: str) -> Path:
    """Return the directory of a name, made if it is not there."""
    directory = directory_of(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def load(name: str) -> Attachment | None:
    """Return what is known of a name; None if nothing is. Raise BlockferryError if it cannot be read."""
    path = directory_of(name) / "attachment.json"
    try:
        return Attachment(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BlockferryError(
            f"{path}: cannot be read: {error}", remedy=f"Remove {path.parent} and attach anew with --force."
        ) from None


def load_all() -> list[Attachment]:
    """Return every hot restore that this host knows of, by name; what cannot be read is told and left out."""
    directory, found = state_directory() / KIND, []
    for name in sorted(each.parent.name for each in directory.glob("*/attachment.json")):
        try:
            found.append(load(name))
        except BlockferryError as error:
            log.warning("%s", error.message)
    return [each for each in found if each]
