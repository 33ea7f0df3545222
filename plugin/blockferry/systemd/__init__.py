"""What whoever writes units for systemd shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from blockferry.errors import BlockferryError
from blockferry.kernel import sync_directory

UNITS = Path("/etc/systemd/system")


def runs() -> bool:
    """Tell whether systemd is what started this machine (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def own_command() -> str:
    """Return the absolute path of the `blockferry` that runs."""
    return os.path.abspath(sys.argv[0])  # noqa: PTH100  # a link stays one


def quoted(text: str) -> str:
    """Return a word as systemd reads it (systemd.service(5))."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def write(path: Path, content: str) -> Path:
    """Write a file that everybody may read, whole or not at all, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.chmod(0o644)
    temporary.replace(path)
    sync_directory(path.parent)
    return path


def run(*command: str) -> None:
    """Have a program read anew what was written; raise BlockferryError if it cannot."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BlockferryError(
            f"{' '.join(command)}: {done.stderr.strip()}", remedy="The files are written: run it yourself."
        )
