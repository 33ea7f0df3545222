"""The entry point: references that begin with `restic:` are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockferry.hookspecs import hookimpl

if TYPE_CHECKING:
    from blockferry.repository import Repository

_PREFIX = "restic:"


@hookimpl
def blockferry_open_repository(reference: str, environment: Mapping[str, str]) -> Repository | None:
    """Open the repository that restic would call by what follows `restic:`; nothing: the one of the environment."""
    if not reference.startswith(_PREFIX):
        return None
    # Every command loads every plugin; only one that opens a repository of ours has to load the rest of the adapter.
    from blockferry_restic.command import Restic  # noqa: PLC0415
    from blockferry_restic.location import Location  # noqa: PLC0415
    from blockferry_restic.repository import ResticRepository  # noqa: PLC0415

    return ResticRepository(Restic(Location.named(reference.removeprefix(_PREFIX), environment)))
