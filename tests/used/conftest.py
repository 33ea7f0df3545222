"""What tests of readers share: a planted tree, and disks that are not left full of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from used_ext4_support import plant_tree


@pytest.fixture(autouse=True)
def nothing_large_is_left(tmp_path: Path) -> Iterator[None]:
    """Remove what a test made, after it has unmounted everything."""
    yield
    for directory, names, files in os.walk(tmp_path):
        names[:] = [name for name in names if not Path(directory, name).is_mount()]
        for name in files:
            Path(directory, name).unlink()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_tree(tmp_path_factory.mktemp("planted") / "tree")
