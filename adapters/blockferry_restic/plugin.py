"""The entry point: references that begin with `restic:` are ours."""

from __future__ import annotations

from blockferry.hookspecs import hookimpl
from blockferry.repository import Repository
from blockferry_restic.command import Restic
from blockferry_restic.location import Location
from blockferry_restic.repository import ResticRepository

_PREFIX = "restic:"


@hookimpl
def blockferry_open_repository(reference: str) -> Repository | None:
    """Open the repository that restic would call by what follows `restic:`; nothing: the one of the environment."""
    if not reference.startswith(_PREFIX):
        return None
    return ResticRepository(Restic(Location.named(reference.removeprefix(_PREFIX))))
