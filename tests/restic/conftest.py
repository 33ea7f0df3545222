"""A restic repository of each format, and an image with holes whose size is no multiple of anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.extents import ExtentSet
from restic_support import MIB, PASSWORD, Image, make_image, restic


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", PASSWORD)


@pytest.fixture(scope="session", autouse=True)
def _restic_and_fuse() -> None:
    for program, remedy in (("restic", "install restic 0.18 or later"), ("fusermount3", "install fuse3")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: {remedy}")
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing: modprobe fuse")


@pytest.fixture(scope="session")
def fresh_repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make an empty repository of each format once: deriving a key is what takes most of a small test's time."""
    root = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESTIC_PASSWORD", PASSWORD)
        for version in ("1", "2"):
            restic(root / version, "init", "--repository-version", version)
    return {version: root / version for version in ("1", "2")}


@pytest.fixture(params=["2"])
def repository_path(
    tmp_path: Path, fresh_repositories: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[Path]:
    path = shutil.copytree(fresh_repositories[request.param], tmp_path / "repository")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """24 MiB and a bit: six segments and a short one; the second is not in use, the third only in small pieces."""
    size = 24 * MIB + 12345
    used = ExtentSet.from_pairs(
        [(0, 3 * MIB + 512), (8 * MIB + 4096, 4096), (9 * MIB, 65536), (11 * MIB, 9 * MIB), (23 * MIB, MIB + 12345)]
    )
    made = make_image(tmp_path / "disk.img", size, used)
    yield made
    made.path.unlink()
