"""What a configuration says, whatever the format of its file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pluggy

from blockferry.config.section import Where, nearest
from blockferry.errors import UsageError
from blockferry.groups.definition import Group

USUAL = "/etc/blockferry/config.yaml"


@dataclasses.dataclass(frozen=True)
class NamedVolume:
    """A volume that has a name in the configuration."""

    name: str
    path: str
    """What `backup` takes: a device, an image file."""
    mount: str = ""
    """Where its filesystem is mounted, for the groups on it."""
    repository: str = ""
    """A reference; "" for wherever the command says."""
    keep: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    """How many snapshots to keep: any of `blockferry.retention.KEEPS`."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The repository, the volumes and the groups that a user named. Empty where there is no file."""

    file: str = ""
    repository: str = ""
    """The reference for what has none of its own; "" if none is named. Volumes and groups hold it already."""
    metrics: str = ""
    """The directory for files of metrics; "" for none."""
    volumes: Mapping[str, NamedVolume] = dataclasses.field(default_factory=dict, hash=False)
    groups: Mapping[str, Group] = dataclasses.field(default_factory=dict, hash=False)
    below: Callable[..., Where] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Gives, for the keys down to a mapping, what names the place of a key in it; None if it has no lines."""

    def group(self, name: str) -> Group:
        """Return the group of a name; raise UsageError if there is none."""
        if name not in self.groups:
            raise self._missing("group", name, self.groups)
        return self.groups[name]

    def volume(self, name: str) -> NamedVolume:
        """Return the volume of a name; raise UsageError if there is none."""
        if name not in self.volumes:
            raise self._missing("volume", name, self.volumes)
        return self.volumes[name]

    def _missing(self, kind: str, name: str, known: Mapping[str, object]) -> UsageError:
        where = f"in {self.file}" if self.file else f"for want of {USUAL}"
        return UsageError(f"{name}: no {kind} of that name {where}", remedy=nearest(name, known.keys()))


def load_configuration(manager: pluggy.PluginManager, named: str | None = None) -> Configuration:
    """Return what a file says: `named`, else BLOCKFERRY_CONFIG, else the usual one, which may be missing.

    Raise UsageError if the file cannot be read, is of no known format, or has a mistake.
    """
    named = named or os.environ.get("BLOCKFERRY_CONFIG")
    path = named or USUAL
    if not Path(path).exists():
        if named:
            raise UsageError(f"{path}: no such configuration file", remedy="Name one that is there: --config FILE.")
        return Configuration()
    configuration: Configuration | None = manager.hook.blockferry_load_config(path=path)
    if configuration is None:
        raise UsageError(f"{path}: is no configuration file of a known format", remedy="Name one that is in YAML.")
    return configuration
