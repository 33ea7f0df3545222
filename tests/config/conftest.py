"""A real borgmatic, and a file of it with a real repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from borg_support import BORGS, missing
from commands_support import run
from config_support import BORGMATIC, SECRET, Job


@pytest.fixture
def borgmatic(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed borgmatic, which blockferry finds."""
    if not BORGMATIC.exists():
        pytest.skip(f"no borgmatic at {BORGMATIC}: scripts/bootstrap --test installs it")
    monkeypatch.setenv("BLOCKFERRY_BORGMATIC", str(BORGMATIC))
    monkeypatch.setenv("BORG_SELFTEST", "disabled")  # of borg's own code, 0.2 s at every start
    return BORGMATIC


@pytest.fixture
def job(borgmatic: Path, tmp_path: Path) -> Job:
    if reason := missing("1.4"):
        pytest.skip(reason)
    made = Job(tmp_path / "borgmatic.yaml", tmp_path / "repository", BORGS["1.4"])
    (tmp_path / "source").mkdir()
    made.write()
    environment = {**os.environ, "BORG_PASSPHRASE": SECRET}
    run(made.borg, "init", "--encryption", "repokey-blake2", made.repository, env=environment)
    return made


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An image of a small filesystem."""
    image = tmp_path / "vm.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    return image
