"""A running machine with an empty disk, and the tools for it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_support import SIZE, Machine

_PACKAGES = {
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-img": "qemu-utils",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "fusermount3": "fuse3",
}


@pytest.fixture(autouse=True)
def tools() -> None:
    missing = [package for program, package in _PACKAGES.items() if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: scripts/bootstrap --test installs them")


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a path short enough for sockets, and below it one for temporary files."""
    with tempfile.TemporaryDirectory(prefix="bf-") as made:
        (Path(made) / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(Path(made) / "tmp"))
        yield Path(made)


@pytest.fixture(params=["qcow2", "raw"])
def machine(request: pytest.FixtureRequest, directory: Path) -> Iterator[Machine]:
    """A machine that runs, with an empty disk of either format."""
    made = Machine(directory, request.param)
    subprocess.run(["qemu-img", "create", "-q", "-f", made.format, str(made.image), str(SIZE)], check=True)
    try:
        made.start()
        yield made
    finally:
        made.stop()
