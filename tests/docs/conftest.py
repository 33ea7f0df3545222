"""A host on which the commands of a page are run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import blockferry


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in place of the root: with a state directory, and services that only say what they did."""
    for name in ("root", "mnt", "srv/backup", "bin", "state"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    stub = tmp_path / "bin" / "systemctl"
    stub.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/systemctl.log\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("BLOCKFERRY_CONFIG", str(tmp_path / "config.yaml"))
    yield tmp_path
    for point in (tmp_path / "mnt", tmp_path / "srv"):
        subprocess.run(["umount", "--lazy", "--quiet", str(point)], check=False, capture_output=True)
    for each in blockferry("status", "--json").json()["restores"]:
        blockferry("detach", each["name"], "--force", "--forget")
