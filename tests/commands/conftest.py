"""A volume with real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands_support import run


@pytest.fixture
def image(tmp_path: Path, files: Path) -> Path:
    """An ext4 image of 256 MiB that holds the files."""
    path = tmp_path / "disk.img"
    run("truncate", "-s", "256M", path)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, path)
    return path
