"""Which entries below a group's root are of the group. Paths are absolute and bytes, as the kernel has them."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator

from blockferry.groups.definition import Group
from blockferry.groups.patterns import Verdict
from blockferry.groups.tags import tag_in


@dataclasses.dataclass(frozen=True)
class Scope:
    """What of a directory tree is a group's."""

    group: Group
    root: bytes
    only: dict[bytes, frozenset[bytes]]
    """Of directories that merely lead to the group's paths: the names that do."""

    @classmethod
    def of(cls, group: Group) -> Scope:
        """Return the scope of a group."""
        root = os.fsencode(group.root)
        wanted = {os.fsencode(path) for path in group.paths}
        only: dict[bytes, set[bytes]] = {}
        for path in wanted:
            for above, name in _steps(path, root):
                only.setdefault(above, set()).add(name)
        return cls(group, root, {path: frozenset(names) for path, names in only.items()})

    def verdict(self, path: bytes) -> tuple[bool, bool]:
        """Return whether an entry is included, and whether what is in it is to be looked at."""
        if not self.group.rules:
            return True, True
        below = path[len(self.root) :].lstrip(b"/")
        found = self.group.rules.verdict(os.fsdecode(below))
        return found is Verdict.INCLUDE, found is not Verdict.EXCLUDE_NO_RECURSE

    def missing(self) -> Iterator[tuple[bytes, str]]:
        """Yield those of the group's paths that no walk comes to, and why."""
        device = os.stat(self.root).st_dev
        for path in map(os.fsencode, self.group.paths):
            try:
                above = [each for each, _name in _steps(path, self.root) if each != self.root]
                if any(stat.S_ISLNK(os.lstat(each).st_mode) for each in above):
                    yield path, "a symbolic link leads there: name the place itself"
                elif os.stat(path, follow_symlinks=path == self.root).st_dev != device:
                    yield path, "it is on another filesystem"
            except OSError as error:
                yield path, error.strerror or str(error)

    def is_left_out(self, directory: int) -> bool:
        """Tell whether an open directory holds what says that its content is not wanted."""
        group = self.group
        if not (group.exclude_if_present or group.exclude_caches):
            return False
        return bool(tag_in(directory, frozenset(os.listdir(directory)), group))


def _steps(path: bytes, top: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each directory from a path up to the top, with the name in it that leads to the path."""
    while path != top:
        above, name = os.path.split(path)
        yield above, name
        path = above
