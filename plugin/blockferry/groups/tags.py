"""Directories that say of themselves that they are not to be backed up."""

from __future__ import annotations

import os
from collections.abc import Container

from blockferry.groups.definition import Group

CACHE_TAG = "CACHEDIR.TAG"
_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
"""How the file begins (https://bford.info/cachedir/): one that does not is no tag."""


def tag_in(directory: int, names: Container[str], group: Group) -> str:
    """Return the name of what has a group leave a directory out, "" if nothing does.

    `directory` is an open descriptor, `names` are those in it: only a tag of a cache that is there is opened.
    """
    for name in group.exclude_if_present:
        if name in names:
            return name
    return CACHE_TAG if group.exclude_caches and CACHE_TAG in names and _is_cache(directory) else ""


def _is_cache(directory: int) -> bool:
    """Tell whether the tag in a directory is a file with the right signature."""
    try:
        # Whoever made it may have made a link or a pipe: neither is followed or waited for.
        tag = os.open(CACHE_TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        return os.read(tag, len(_SIGNATURE)) == _SIGNATURE
    except OSError:
        return False
    finally:
        os.close(tag)
