"""The plugin: opens repositories that are written `borg:PATH-OR-URL`.

What follows the prefix is what borg takes: a path, `ssh://user@host:port/path`, `user@host:path`; nothing stands for
BORG_REPO. All of borg's own variables work, for borg runs in the environment that comes with the reference: ours, or
what another tool's configuration makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockferry.errors import UsageError
from blockferry.hookspecs import hookimpl

if TYPE_CHECKING:
    from blockferry.repository import Repository

PREFIX = "borg:"


@hookimpl
def blockferry_open_repository(reference: str, environment: Mapping[str, str]) -> Repository | None:
    """Return the repository behind a `borg:` reference; whether it is there turns out when it is first used."""
    if not reference.startswith(PREFIX):
        return None
    # Every command loads every plugin; only one that opens a repository of ours has to load the rest of the adapter.
    from blockferry_borg.command import Borg  # noqa: PLC0415
    from blockferry_borg.environment import BorgEnvironment  # noqa: PLC0415
    from blockferry_borg.failures import without_credentials  # noqa: PLC0415
    from blockferry_borg.installation import Way, find_installation  # noqa: PLC0415
    from blockferry_borg.location import canonical  # noqa: PLC0415
    from blockferry_borg.mapped import MappedRepository  # noqa: PLC0415
    from blockferry_borg.repository import WorkerRepository  # noqa: PLC0415
    from blockferry_borg.standalone import StandaloneRepository  # noqa: PLC0415

    location = reference.removeprefix(PREFIX) or environment.get("BORG_REPO", "")
    if not location:
        raise UsageError(f"{reference}: names no repository", remedy="Write borg:PATH-OR-URL, or set BORG_REPO.")
    if "::" in location:
        raise UsageError(
            f"{without_credentials(reference)}: names an archive", remedy="Leave out :: and what follows it."
        )
    location = canonical(location)
    installation = find_installation(environment)
    if installation.way is Way.WORKER:
        return WorkerRepository(location, installation, BorgEnvironment(environment))
    borg = Borg(installation.command, location, BorgEnvironment(environment))
    return MappedRepository(borg) if installation.way is Way.MAPPED else StandaloneRepository(borg)
