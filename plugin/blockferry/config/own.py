"""blockferry's own format: YAML with `repository`, `volumes`, `groups` and `metrics`.

repository: borg:/srv/borg
volumes:
  vm: {path: /srv/vm.img}
groups:
  small: {volume: /mnt/data, paths: [/mnt/data/mail], schedule: hourly, keep_daily: 7}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockferry.config.configuration import Configuration, NamedVolume
from blockferry.config.section import Section, Where, nearest
from blockferry.errors import UsageError
from blockferry.groups.definition import Group, check_name
from blockferry.hookspecs import hookimpl


@hookimpl
def blockferry_load_config(path: str) -> Configuration:
    """Read any file: this is the last that is asked."""
    mapping = _parse(path)
    top = Section(mapping, _places(path, mapping, ""), ("repository", "volumes", "groups", "metrics"))
    repository, metrics = top.text("repository"), top.text("metrics")
    if metrics and not metrics.startswith("/"):
        raise top.wrong("metrics", f"{metrics} is not absolute", "Write the whole path of a directory.")
    volumes, groups = top.mapping("volumes"), top.mapping("groups")
    named = {name: _volume(path, volumes, name, repository) for name in volumes}
    return Configuration(
        file=path,
        repository=repository,
        metrics=metrics,
        volumes=named,
        groups={name: _group(path, groups, name, named, repository) for name in groups},
    )


def _volume(path: str, volumes: Mapping[Any, Any], name: str, repository: str) -> NamedVolume:
    """Read one of the volumes."""
    mapping = Section(volumes, _places(path, volumes, "volumes."), volumes.keys()).mapping(name)
    where = _places(path, mapping, f"volumes.{name}.", _line(volumes, name, 1))
    section = Section(mapping, where, ("path", "mount", "repository"))
    check_name(name, section)
    volume = NamedVolume(name, section.text("path"), section.text("mount"), section.text("repository") or repository)
    if not volume.path:
        raise section.wrong("", "has no path", "Write path: /dev/vg/data, for example.")
    return volume


def _group(
    path: str, groups: Mapping[Any, Any], name: str, volumes: Mapping[str, NamedVolume], repository: str
) -> Group:
    """Read one of the groups, whose volume may be one that has a name."""
    mapping = Section(groups, _places(path, groups, "groups."), groups.keys()).mapping(name)
    where = _places(path, mapping, f"groups.{name}.", _line(groups, name, 1))
    own = dict(mapping)
    named = own.get("volume")
    if isinstance(named, str) and named and "/" not in named:
        if named not in volumes:
            raise UsageError(f"{where('volume')}: {named}: no volume of that name", remedy=nearest(named, volumes))
        volume = volumes[named]
        own["volume"] = volume.mount or volume.path
        own["repository"] = own.get("repository") or volume.repository
        if Path(own["volume"]).exists() and not Path(own["volume"]).is_dir():
            raise UsageError(
                f"{where('volume')}: {volume.path} is no directory, and a group is of files",
                remedy=f"Say below volumes.{named} where it is mounted: mount: /mnt/data, for example.",
            )
    own["repository"] = own.get("repository") or repository
    return Group.parse(name, own, where)


def _parse(path: str) -> Mapping[Any, Any]:
    """Return the file's mapping, which knows of each key on which line it is; empty if there is nothing in it."""
    from ruamel.yaml import YAML  # noqa: PLC0415  # takes a while, and few commands need it
    from ruamel.yaml.error import MarkedYAMLError, YAMLError  # noqa: PLC0415

    remedy = "Have a look at its indentation, brackets and quotes."
    try:
        mapping = YAML(typ="rt", pure=True).load(Path(path).read_bytes())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{mark.line + 1}:" if mark else ""
        raise UsageError(f"{path}:{line} {error.problem or error.context}", remedy=remedy) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", remedy="Name another with --config.") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no YAML: {str(error).splitlines()[0]}", remedy=remedy) from None
    if mapping is not None and not isinstance(mapping, Mapping):
        raise UsageError(f"{path}:1: is no mapping", remedy="Write KEY: VALUE, as in groups: and volumes:.")
    return mapping or {}


def _places(path: str, mapping: Mapping[Any, Any], prefix: str, line: int = 1) -> Where:
    """Return what names the file, the line and the keys down to one of a mapping's own, which begins at `line`."""

    def where(key: str) -> str:
        return f"{path}:{_line(mapping, key, line)}: {prefix}{key}".removesuffix(".")

    return where


def _line(mapping: Mapping[Any, Any], key: str, otherwise: int) -> int:
    """Return the line of a key, counted from 1; `otherwise` if it has none, as what a merge (`<<`) brought."""
    lines = getattr(getattr(mapping, "lc", None), "data", None) or {}
    return int(lines[key][0]) + 1 if key in lines else otherwise
