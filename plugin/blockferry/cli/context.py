"""What the commands share: the plugins, the repository that the user means, the snapshot that they name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import click
import pluggy

from blockferry.catalog import Catalog
from blockferry.cli.output import Output
from blockferry.config.configuration import Configuration, NamedVolume, load_configuration
from blockferry.config.reference import absolute
from blockferry.errors import BlockferryError, UsageError
from blockferry.hookspecs import Job
from blockferry.joined import repository_with_log
from blockferry.manager import mask, plugin_manager, tell
from blockferry.repository import Repository
from blockferry.state import state_directory
from blockferry.systemd import journal
from blockferry.volume import default_name

no_job_option = click.option(
    "--no-job",
    is_flag=True,
    help="Without the hooks, monitoring and retention of the tool whose file names the repository.",
)
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Result = TypeVar("Result")

_ENVIRONMENT = {"borg": ("BORG_REPO",), "restic": ("RESTIC_REPOSITORY", "RESTIC_REPOSITORY_FILE")}


@dataclasses.dataclass
class Context:
    """One invocation."""

    output: Output
    config: str | None = None
    """The configuration file that `--config` names."""
    problems: list[BlockferryError] = dataclasses.field(default_factory=list)
    """What went wrong although a snapshot was stored."""

    @functools.cached_property
    def manager(self) -> pluggy.PluginManager:
        """The plugins, loaded when the first is needed."""
        return plugin_manager()

    @functools.cached_property
    def configuration(self) -> Configuration:
        """What the configuration file says, read when it is first needed."""
        return load_configuration(self.manager, self.config)

    def reference(self, reference: str | None) -> str:
        """Return a reference, or else the one that the configuration names, or else the environment.

        It is understood from any directory if it is into another tool's file.
        """
        return absolute(reference or self.configuration.repository or reference_from_environment())

    def volume(self, volume: str, name: str, reference: str | None) -> NamedVolume:
        """Return the volume that a path or a name of the configuration means; what was said by options goes before."""
        found = self.configuration.volumes.get(volume) if "/" not in volume else None
        found = found or NamedVolume(default_name(volume), volume)
        return dataclasses.replace(found, name=name or found.name, repository=reference or found.repository)

    @contextlib.contextmanager
    def repository(self, reference: str | None, log_reference: str | None = None) -> Iterator[Repository]:
        """Open the repository that a reference, or else the configuration or the environment, names.

        With `log_reference` the snapshots of that repository are there as well.
        """
        named = self.reference(reference)
        with contextlib.closing(repository_with_log(self.manager, named, log_reference)) as repository:
            yield repository

    def back_up(
        self,
        reference: str | None,
        volume: str,
        store: Callable[[Repository], Result],
        *,
        job: bool,
        known_as: str | None = None,
    ) -> Result:
        """Make a backup in the repository that is named, within the job of the tool whose file names it, if one does.

        With `job` false by itself in any case. What goes wrong after the snapshot is stored is noted in `problems`;
        plugins learn if there is none, in that repository or the one that it is `known_as`.
        """
        named = self.reference(reference)
        where = mask(self.reference(known_as)) if known_as else mask(named)
        journal.about(volume=volume)

        def noted(repository: Repository) -> Result:
            nonlocal where
            where = where if known_as else repository.reference
            return store(repository)

        try:
            done: Job | None = None
            if job:
                done = self.manager.hook.blockferry_run_as_job(
                    reference=named, environment=os.environ, volume=volume, store=noted
                )
            if done:
                self.problems += [done.problem] if done.problem else []
                return cast("Result", done.result)
            with self.repository(named) as repository:
                return noted(repository)
        except BaseException as error:
            self.tell_failure(volume, where, error)
            raise

    def complain(self) -> None:
        """Raise the first of the problems, once the results are told."""
        if self.problems:
            raise self.problems[0]

    def tell_failure(self, volume: str, repository: str, error: BaseException) -> None:
        """Tell plugins of a backup that failed; `repository` without credentials."""
        tell(self.manager.hook.blockferry_backup_failed, volume=volume, repository=repository, error=error)

    @contextlib.contextmanager
    def catalog(self) -> Iterator[Catalog]:
        """Open the catalog of this host."""
        with contextlib.closing(Catalog(state_directory() / "catalog.sqlite")) as catalog:
            yield catalog


def reference_from_environment() -> str:
    """Return `borg:` or `restic:`, whichever the environment names a repository for.

    Raise UsageError if it names none or both.
    """
    named = [tool for tool, variables in _ENVIRONMENT.items() if any(os.environ.get(each) for each in variables)]
    if len(named) != 1:
        said = "both BORG_REPO and RESTIC_REPOSITORY are set" if named else "no repository was named"
        raise UsageError(said, remedy="Say --repo borg:PATH-OR-URL or --repo restic:PATH-OR-URL.")
    return f"{named[0]}:"


def repository_option(function: Decorated) -> Decorated:
    """Add `--repo`, as the parameter `reference`."""
    return click.option(
        "--repo",
        "reference",
        metavar="REF",
        help="borg:PATH-OR-URL, restic:PATH-OR-URL, borgmatic:FILE#LABEL, resticprofile:FILE#PROFILE or "
        "autorestic:FILE#BACKEND; else as configured, or BORG_REPO or RESTIC_REPOSITORY.",
    )(function)


def index_option(function: Decorated) -> Decorated:
    """Add `--index`, which has to be said, by an option or in the environment."""
    return click.option(
        "--index",
        required=True,
        envvar="BLOCKFERRY_INDEX",
        metavar="URL",
        help="What all hosts share: redis://HOST:PORT/0, sqlite:///PATH on a single one; else BLOCKFERRY_INDEX.",
    )(function)


def log_repository_option(function: Decorated) -> Decorated:
    """Add `--log-repo`, as the parameter `log_reference`."""
    return click.option(
        "--log-repo",
        "log_reference",
        metavar="REF",
        help="Of a set whose log is kept apart: the repository with the log.",
    )(function)


def json_option(function: Decorated) -> Decorated:
    """Add `--json` behind the command's name too."""

    def choose(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            context.find_object(Context).output.as_json = True  # type: ignore[union-attr]  # set before any command

    return click.option("--json", is_flag=True, expose_value=False, callback=choose, help="Print the result as JSON.")(
        function
    )
