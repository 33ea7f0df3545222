"""blockferry's own format: YAML with `repository`, `volumes`, `groups` and `metrics`.

repository: borg:/srv/borg
volumes:
  vm: {path: /srv/vm.img, keep_daily: 7}
groups:
  small: {volume: /mnt/data, paths: [/mnt/data/mail], schedule: hourly, keep_daily: 7}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from blockferry.config.configuration import Configuration, NamedVolume
from blockferry.config.section import ConfigurationError, Section, Where, nearest, raise_all
from blockferry.config.yaml_file import YamlFile
from blockferry.groups.definition import Group, check_name, rules_of
from blockferry.hookspecs import hookimpl
from blockferry.retention import KEEPS

KEYS = ("repository", "volumes", "groups", "metrics")
VOLUME_KEYS = ("path", "mount", "repository", *KEEPS)

Read = TypeVar("Read")
Below = Callable[..., Where]
"""Gives, for the keys down to a mapping, what names the place of a key in it."""


@hookimpl
def blockferry_load_config(path: str) -> Configuration:
    """Read any file: this is the last that is asked."""
    file = YamlFile(path)
    return understand(path, file.mapping, file.below)


def understand(path: str, mapping: Mapping[Any, Any], below: Below, *, repository: str = "") -> Configuration:
    """Return what a mapping says of repository, volumes and groups, wherever in the file it stands.

    `repository` is the reference if it names none. Raise the first ConfigurationError, which has all the `others`.
    """
    mistakes: list[ConfigurationError] = []
    own = dict(mapping)
    _attempt(own, lambda own: _top(own, below()), mistakes)
    top = _top(own, below())
    repository = top.text("repository") or repository
    volumes, groups = top.mapping("volumes"), top.mapping("groups")
    named: dict[str, NamedVolume] = {}
    for name in volumes:
        read = functools.partial(_volume, where=below("volumes", str(name)), name=name, repository=repository)
        if volume := _attempt(_entry(volumes, name, below("volumes"), mistakes), read, mistakes):
            named[name] = volume
    read_groups: dict[str, Group] = {}
    for name in groups:
        entry = _entry(groups, name, below("groups"), mistakes)
        if entry and entry.get("volume") in volumes and entry["volume"] not in named:
            continue  # that volume's own mistake is what has to be mended
        read_group = functools.partial(
            _group, where=below("groups", str(name)), name=name, volumes=named, repository=repository
        )
        if group := _attempt(entry, read_group, mistakes):
            read_groups[name] = group
    raise_all(mistakes)
    return Configuration(
        file=path,
        repository=repository,
        metrics=top.text("metrics"),
        volumes=named,
        groups=read_groups,
        below=below,
    )


def _attempt(
    own: dict[Any, Any] | None, read: Callable[[dict[Any, Any]], Read], mistakes: list[ConfigurationError]
) -> Read | None:
    """Return what `read` makes of a mapping; None if that is wrong. After a mistake it looks on without its key.

    A group without a volume would not be looked at any further: it gets one.
    """
    good = True
    while own is not None:
        try:
            result = read(own)
        except ConfigurationError as error:
            good = False
            mistakes.append(error)
            if error.key == "volume" and own.get("volume") != "/":
                own["volume"] = "/"
            elif error.key in own:
                del own[error.key]
            else:
                return None
        else:
            return result if good else None
    return None


def _entry(
    mapping: Mapping[Any, Any], name: Any, where: Where, mistakes: list[ConfigurationError]
) -> dict[Any, Any] | None:
    """Return a mapping that is in a mapping, None if it is none."""
    return _attempt({name: mapping[name]}, lambda own: dict(Section(own, where, own).mapping(name)), mistakes)


def _top(mapping: Mapping[Any, Any], where: Where) -> Section:
    """Read what stands at the top."""
    section = Section(mapping, where, KEYS)
    section.text("repository")
    section.mapping("volumes")
    section.mapping("groups")
    metrics = section.text("metrics")
    if metrics and not metrics.startswith("/"):
        raise section.wrong("metrics", f"{metrics} is not absolute", "Write the whole path of a directory.")
    return section


def _volume(mapping: Mapping[Any, Any], where: Where, name: Any, repository: str) -> NamedVolume:
    """Read one of the volumes."""
    section = Section(mapping, where, VOLUME_KEYS)
    check_name(name, section)
    to = section.text("repository") or repository
    volume = NamedVolume(name, section.text("path"), section.text("mount"), to, rules_of(section))
    if not volume.path:
        raise section.wrong("", "has no path", "Write path: /dev/vg/data, for example.")
    return volume


def _group(
    mapping: Mapping[Any, Any], where: Where, name: Any, volumes: Mapping[str, NamedVolume], repository: str
) -> Group:
    """Read one of the groups, whose volume may be one that has a name."""
    own = dict(mapping)
    named = own.get("volume")
    if isinstance(named, str) and named and "/" not in named:
        if named not in volumes:
            raise ConfigurationError(
                f"{where('volume')}: {named}: no volume of that name", remedy=nearest(named, volumes), key="volume"
            )
        volume = volumes[named]
        own["volume"] = volume.mount or volume.path
        own["repository"] = own.get("repository") or volume.repository
        if Path(own["volume"]).exists() and not Path(own["volume"]).is_dir():
            raise ConfigurationError(
                f"{where('volume')}: {volume.path} is no directory, and a group is of files",
                remedy=f"Say below volumes.{named} where it is mounted: mount: /mnt/data, for example.",
                key="volume",
            )
    own["repository"] = own.get("repository") or repository
    return Group.parse(name, own, where)
