"""Another host has a restored volume as a block device, by NBD with TLS, as docs/hot-restore-hosts.md has it typed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import blockferry, new_depot, run
from pages_support import Page, run_shell

pytestmark = [pytest.mark.root, pytest.mark.thorough, pytest.mark.timeout(1200)]  # a guest is emulated

PORT = "10809"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """Serve a volume with a letter on it that is not brought back yet; return a directory with the certificates."""
    authority, server, client, *_commands = Page("hot-restore-hosts.md").blocks()
    files, tls = tmp_path / "files", tmp_path / "tls"
    for each in (files, tmp_path / "mnt"):
        each.mkdir()
    (files / "letter").write_bytes(os.urandom(40 << 20))
    run("truncate", "-s", "64M", tmp_path / "volume.img")
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", files, tmp_path / "volume.img")
    depot = new_depot("borg", tmp_path / "repository")
    assert depot.ferry("backup", tmp_path / "volume.img").code == 0
    run_shell(authority + server + client, {"/etc/blockferry/tls": tls, "10.0.0.5": "127.0.0.1"})
    # Were all brought in, the disk would be its target's by now, and its process gone.
    assert depot.ferry("attach", "latest", tmp_path / "new.img", "--name", "mail", "--rate", "0").code == 0
    try:
        listening = blockferry("serve", "mail", "--listen", f"127.0.0.1:{PORT}", "--tls", tls)
        assert listening.code == 0, listening.err
        yield tmp_path
    finally:
        subprocess.run(["qemu-nbd", "--disconnect", "/dev/nbd0"], check=False, capture_output=True)
        blockferry("detach", "mail", "--force", "--forget")


def test_both_ways_show_the_disk_as_a_device(served: Path) -> None:
    *_certificates, by_nbd_client, by_qemu, _copy = Page("hot-restore-hosts.md").blocks()
    places = {"10.0.0.5": "127.0.0.1", "/mnt": served / "mnt"}
    for way in (by_nbd_client, by_qemu):
        assert "letter\n" in run_shell(f"cd {served}\n{way}", places)
