"""Volumes to restore hot, and hot restores that leave nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands_support import Depot, run
from hot_support import Hot, mounted

_numbers = itertools.count()

NewHot = Callable[..., Hot]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, files: Path) -> dict[str, Path]:
    """An image of each filesystem that holds the files."""
    home = tmp_path_factory.mktemp("images")
    made = {}
    for kind, size, maker in (("ext4", "96M", ["mkfs.ext4", "-q"]), ("xfs", "320M", ["mkfs.xfs", "-q"])):
        path = made[kind] = home / f"{kind}.img"
        run("truncate", "-s", size, path)
        run(*maker, path)
        with mounted(path, home / "place", "loop") as place:
            run("cp", "-a", f"{files}/.", place)
    return made


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[NewHot]:
    """Return a function that gives a hot restore: `hot(depot, target)`; whatever is left of it goes with the test."""
    with contextlib.ExitStack() as made:

        def new_hot(depot: Depot, target: Path | str, name: str = "") -> Hot:
            number = next(_numbers)
            runtime = tmp_path / f"run-{number}"
            runtime.mkdir()
            restore = Hot(depot, name or f"test-{os.getpid()}-{number}", target, runtime)
            made.callback(restore.clear_away)
            return restore

        yield new_hot
