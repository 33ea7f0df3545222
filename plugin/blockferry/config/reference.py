"""References into the configuration of another tool: `TOOL:FILE#NAME`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from blockferry.errors import UsageError

TOOLS = ("borgmatic", "resticprofile", "autorestic")


@dataclasses.dataclass(frozen=True)
class ForeignReference:
    """A repository that another tool's file describes."""

    tool: str
    file: str
    """An absolute path."""
    name: str
    """Which of those in the file; "" for the one that the tool would take."""

    @classmethod
    def parse(cls, reference: str) -> ForeignReference | None:
        """Return what a reference names; None if it is no such reference, UsageError if its file is not there."""
        tool, separator, rest = reference.partition(":")
        if not separator or tool not in TOOLS:
            return None
        path = os.path.expanduser(rest)  # noqa: PTH111
        file, hash_sign, name = (path, "", "") if Path(path).exists() else path.rpartition("#")
        file = file if hash_sign else path
        if not Path(file).is_file():
            raise UsageError(
                f"{reference}: {file or 'nothing'} is no file", remedy=f"Write {tool}:FILE or {tool}:FILE#NAME."
            )
        return cls(tool, os.path.abspath(file), name if hash_sign else "")  # noqa: PTH100  # links stay

    def __str__(self) -> str:
        return f"{self.tool}:{self.file}#{self.name}" if self.name else f"{self.tool}:{self.file}"


def absolute(reference: str) -> str:
    """Return a reference as it is understood from any directory, if it is one of these."""
    found = ForeignReference.parse(reference)
    return str(found) if found else reference


def is_foreign(reference: str) -> bool:
    """Tell whether a reference is into the configuration of another tool."""
    return reference.partition(":")[0] in TOOLS
