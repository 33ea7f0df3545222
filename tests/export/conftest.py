"""A host that exports volumes: one on a filesystem that shares blocks, so that changes are known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from changes_support import filesystem
from commands_support import run
from export_support import MIB, Host


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path / "host")
    for name, value in host.env.items():
        monkeypatch.setenv(name, value)
    host.directory.mkdir()
    host.configure("")
    yield host
    host.clear_away()
    assert not host.mounts()
    assert host.is_idle()


@pytest.fixture(scope="session")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A filesystem that shares blocks between files."""
    with filesystem("xfs", tmp_path_factory.mktemp("sharing"), size=1024 * MIB) as place:
        yield place


@pytest.fixture(scope="session")
def pattern(sharing: Path) -> Path:
    """An image of ext4, 96 MiB, of which about 48 are in use, with junk in its free space."""
    files, image = sharing / "files", sharing / "pattern.img"
    files.mkdir()
    for number in range(12):
        (files / f"file {number}").write_bytes(os.urandom(4 * MIB))
    image.write_bytes(os.urandom(MIB) * 96)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard", "-d", files, image)
    return image


@pytest.fixture
def volume(sharing: Path, pattern: Path) -> Iterator[Path]:
    """A volume that a test may write to, called vm.img."""
    directory = sharing / f"volume-{len(list(sharing.iterdir()))}"
    directory.mkdir()
    image = directory / "vm.img"
    run("cp", "--reflink=always", pattern, image)
    yield image
    run("rm", "-rf", directory)
