"""The system's own programs: where they are, and what brings them."""

from __future__ import annotations

import os
import shutil

from blockferry.errors import ToolMissingError

KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "134217728", "MALLOC_MMAP_THRESHOLD_": "134217728"}
"""The environment of a process that makes and drops buffers of a chunk's size all the time, as borg does and a hot
restore: glibc must not map and unmap each (mallopt(3))."""


def look_for(name: str) -> str | None:
    """Return the path of a program, None if it is not there. Those for root are found by others, too."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def find(name: str, package: str) -> str:
    """Return the path of a program; raise ToolMissingError, naming the package that brings it, if it is not there."""
    found = look_for(name)
    if found is None:
        raise ToolMissingError(f"{name} is not installed", remedy=f"Install the package {package}.")
    return found
