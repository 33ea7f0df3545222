"""Which entries below a group's root are of the group."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

_CACHE_TAG, _CACHE_SIGNATURE = "CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55"
"""What marks a directory as a cache: the Cache Directory Tagging Specification."""


class Verdicts(Protocol):
    """Rules to include and exclude by path; false if there are none."""

    def __bool__(self) -> bool: ...

    def verdict(self, path: str) -> tuple[bool, bool]:
        """Return whether an entry is included, and whether what is in it is to be looked at."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """What of a directory tree is a group's. All paths are absolute and bytes, as the kernel has them."""

    root: bytes
    only: dict[bytes, frozenset[bytes]]
    """Of directories that merely lead to the group's paths: the names that do."""
    rules: Verdicts | None = None
    tags: tuple[str, ...] = ()
    """A directory that holds a file of such a name is left empty."""
    exclude_caches: bool = False

    @classmethod
    def below(
        cls,
        root: str,
        paths: Sequence[str],
        *,
        rules: Verdicts | None = None,
        tags: Sequence[str] = (),
        exclude_caches: bool = False,
    ) -> Scope:
        """Return the scope of some paths at or below a root."""
        top = os.fsencode(root)
        only: dict[bytes, set[bytes]] = {}
        whole = {os.fsencode(path) for path in paths}
        for path in whole:
            for above, name in _steps(path, top):
                only.setdefault(above, set()).add(name)
        inside = {path for path in only if any(above in whole for above, _name in _steps(path, top))}
        leading = {path: frozenset(names) for path, names in only.items() if path not in whole | inside}
        return cls(top, leading, rules, tuple(tags), exclude_caches)

    def verdict(self, path: bytes) -> tuple[bool, bool]:
        """Return whether an entry is included, and whether what is in it is to be looked at; without rules both."""
        return self.rules.verdict(os.fsdecode(path)) if self.rules else (True, True)

    def is_left_out(self, directory: int) -> bool:
        """Tell whether an open directory holds what marks its content as not wanted."""
        if any(_exists(tag, directory) for tag in self.tags):
            return True
        return self.exclude_caches and _is_cache(directory)


def _steps(path: bytes, top: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each directory from a path up to the top, with the name in it that leads to the path."""
    while path != top:
        above, name = os.path.split(path)
        yield above, name
        path = above


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _is_cache(directory: int) -> bool:
    """Tell whether a directory says of itself that it is a cache."""
    try:
        tag = os.open(_CACHE_TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        return os.read(tag, len(_CACHE_SIGNATURE)) == _CACHE_SIGNATURE
    except OSError:
        return False
    finally:
        os.close(tag)
