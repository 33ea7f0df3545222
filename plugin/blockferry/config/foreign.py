"""What the plugins for other tools' files have in common: references into them, and what stands there of ours."""

from __future__ import annotations

import abc
import importlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pluggy

from blockferry.config.configuration import Configuration
from blockferry.config.own import understand
from blockferry.config.reference import ForeignReference
from blockferry.config.yaml_file import YamlFile
from blockferry.errors import UsageError
from blockferry.hookspecs import Job, hookimpl

if TYPE_CHECKING:
    from blockferry.repository import Repository


class ForeignTool(abc.ABC):
    """A plugin that opens the repositories of a tool's file, and makes backups as that tool's jobs."""

    tool: ClassVar[str]

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self.manager = manager

    @hookimpl
    def blockferry_open_repository(self, reference: str, environment: Mapping[str, str]) -> Repository | None:
        """Open what a reference into a file of this tool means."""
        named = self._meant(reference)
        return self.open(named, environment) if named else None

    @hookimpl
    def blockferry_run_as_job(
        self, reference: str, environment: Mapping[str, str], volume: str, store: Callable[[Repository], object]
    ) -> Job | None:
        """Do all that the tool does around a backup, with `store` in the place of its own; raise if none was made."""
        named = self._meant(reference)
        if named is None:
            return None
        # Only who makes backups needs it.
        jobs = importlib.import_module(f"blockferry.config.{self.tool}_job")
        return cast("Job", jobs.run_job(self.manager, named, environment, volume, store))

    @abc.abstractmethod
    def open(self, named: ForeignReference, environment: Mapping[str, str]) -> Repository:
        """Open a repository with the tool's credentials; UsageError if there is not exactly one that is meant."""

    def _meant(self, reference: str) -> ForeignReference | None:
        return ForeignReference.parse(reference) if reference.startswith(f"{self.tool}:") else None

    def understand(self, file: YamlFile, keys: tuple[str, ...], ours: Any, repositories: int) -> Configuration:
        """Return what `ours` says, which stands below `keys`; the file's only repository, if there is one, is meant."""
        ours = ours or {}
        if not isinstance(ours, Mapping):
            raise UsageError(
                f"{file.place(*keys)}: is no mapping", remedy="Write volumes: and groups: below it, indented."
            )
        only = f"{self.tool}:{os.path.abspath(file.path)}" if repositories == 1 else ""  # noqa: PTH100  # links stay
        return understand(file.path, ours, lambda *more: file.below(*keys, *more), repository=only)
