"""A volume with real files, and a real repository of each tool."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from commands_support import Depot, new_depot, run


@pytest.fixture(params=["borg", "restic"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Depot:
    return new_depot(request.param, tmp_path / "repository")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory tree with files of many sizes and kinds."""
    top = tmp_path_factory.mktemp("files")
    chance = random.Random(7)
    for number in range(150):
        path = top / f"d{number % 12}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([0, 13, 4096, 70_000, 300_000])))
        os.utime(path, ns=(0, chance.randrange(10**18)))
    (top / "text").write_text("all work and no play makes a dull boy\n" * 50_000)
    (top / "link").symlink_to("text")
    os.link(top / "text", top / "hard")
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(20 << 20)
        sparse.write(b"the end")
    return top


@pytest.fixture
def image(tmp_path: Path, files: Path) -> Path:
    """An ext4 image of 256 MiB that holds the files."""
    path = tmp_path / "disk.img"
    run("truncate", "-s", "256M", path)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, path)
    return path
