"""What a group is: a named set of files on one mounted filesystem."""

from __future__ import annotations

import dataclasses
import functools
import os.path
import re
from collections.abc import Mapping
from typing import Any

from blockferry.config.section import Section, Where
from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.groups.patterns import Rules
from blockferry.retention import KEEPS

_KEYS = ("volume", "paths", "patterns", "exclude_if_present", "exclude_caches", "schedule", "repository", *KEEPS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Group:
    """A named set of files: where they are, which of them, and when and where to they are backed up."""

    name: str
    """Of letters, digits, `.`, `_` and `-`: it becomes part of the names of units and snapshots."""
    root: str
    """The absolute path of the directory where the filesystem is mounted, or of one below it."""
    paths: tuple[str, ...]
    """Where the files are: absolute paths, the root or below it, none of them below another."""
    patterns: tuple[str, ...] = ()
    """Which of them, in borg's words (`patterns.py`); matched against the path relative to the root."""
    exclude_if_present: tuple[str, ...] = ()
    """A directory that has something of one of these names is left out."""
    exclude_caches: bool = False
    """Whether directories that say that they are caches (`tags.py`) are left out."""
    schedule: str = ""
    """When, as systemd's OnCalendar; "" for never by itself."""
    keep: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    """How many snapshots to keep: any of `KEEPS`."""
    repository: str = ""
    """A reference; "" for wherever the command says."""

    @classmethod
    def parse(cls, name: str, mapping: Mapping[Any, Any], where: Where | str) -> Group:
        """Read a definition as it stands in a configuration, with the root under the key `volume`.

        `where` says what to call the place in a message. Raise UsageError, with it, if anything is off.
        """
        section = Section(mapping, where, _KEYS)
        check_name(name, section)
        root = _path(section, "volume", section.text("volume"))
        patterns = section.texts("patterns")
        _check_patterns(section, root, patterns)
        keep = rules_of(section)
        return cls(
            name=name,
            root=root,
            paths=_paths(section, root),
            patterns=patterns,
            exclude_if_present=_tags(section),
            exclude_caches=section.flag("exclude_caches"),
            schedule=" ".join(section.text("schedule").split()),
            keep=keep,
            repository=section.text("repository"),
        )

    @functools.cached_property
    def rules(self) -> Rules:
        """The patterns, ready to be asked."""
        return Rules.parse(self.patterns)

    def as_json(self) -> dict[str, Any]:
        """Return what a snapshot's record says of the group. Not its repository, whose URL may hold a password."""
        values = dataclasses.asdict(self)
        del values["repository"]
        return values | {key: list(value) for key, value in values.items() if isinstance(value, tuple)}

    @classmethod
    def from_json(cls, values: object) -> Group:
        """Read what `as_json` returned, or a later version of it; raise DamagedSnapshotError if it is not that."""
        try:
            if not isinstance(values, Mapping):
                raise UsageError("the group is no mapping")
            record = Section(values, "group", values.keys())
            same = {key: values[key] for key in _KEYS if key in values}
            root_and_keep = {"volume": record.text("root"), **record.mapping("keep")}
            return cls.parse(record.text("name"), same | root_and_keep, "group")
        except UsageError as error:
            raise DamagedSnapshotError(f"the record does not describe its group: {error.message}") from None


def rules_of(section: Section) -> dict[str, int]:
    """Return which snapshots are to be kept, of what stands in a section."""
    return {key: count for key in KEEPS if (count := section.count(key)) is not None}


def check_name(name: object, section: Section) -> None:
    """Raise UsageError if a group or volume cannot be called that."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise section.wrong(
            "", f"{name!r} cannot be a name", "A name is of letters, digits, '.', '_' and '-', at most 64."
        )


def _path(section: Section, key: str, path: str) -> str:
    """Return an absolute path in its normal form."""
    if not path.startswith("/"):
        what = f"{path!r} is no absolute path" if path else "is missing"
        raise section.wrong(key, what, f"Write {key}: /mnt/data, for example.")
    if ".." in path.split("/"):
        raise section.wrong(key, f"{path!r} has '..' in it", "Write the path without.")
    return "/" + os.path.normpath(path).lstrip("/")


def _paths(section: Section, root: str) -> tuple[str, ...]:
    """Return the paths, without those that others include; raise UsageError for one that is not below the root."""
    paths = [_path(section, "paths", path) for path in section.texts("paths")] or [root]
    for path in paths:
        if not _is_below(path, root):
            raise section.wrong("paths", f"{path!r} is not below {root}", "A group is on one filesystem: make another.")
    outermost = [path for path in paths if not any(path != other and _is_below(path, other) for other in paths)]
    return tuple(dict.fromkeys(outermost))


def _is_below(path: str, root: str) -> bool:
    """Tell whether a path is a directory or below it."""
    return f"{path}/".startswith(f"{root.rstrip('/')}/")


def _check_patterns(section: Section, root: str, patterns: tuple[str, ...]) -> None:
    """Raise UsageError for a pattern that cannot be read, or that names the root: it would never match."""
    try:
        Rules.parse(patterns)
    except UsageError as error:
        raise section.wrong("patterns", error.message, error.remedy) from None
    for number, line in enumerate(patterns, 1):
        found = re.match(r"\s*[-+!]\s*(?:(?:sh|fm|pp|pf):)?(?=/)", line)
        if found and root != "/" and _is_below(line[found.end() :].rstrip(), root):
            raise section.wrong(
                "patterns",
                f"pattern {number}, {line!r}: would be looked for below {root}",
                f"Patterns are matched against the path below {root}: write {found[0]}... without it.",
            )


def _tags(section: Section) -> tuple[str, ...]:
    """Return the names whose presence has a directory left out."""
    tags = section.texts("exclude_if_present")
    for tag in tags:
        if not tag or "/" in tag or tag in {".", ".."}:
            raise section.wrong("exclude_if_present", f"{tag!r} is no file name", "Write names without a directory.")
    return tags
