"""A machine of libvirt's, set up as docs/qemu.md says: a real libvirtd, of a user without rights."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands_support import Depot, new_depot, run
from pages_support import Page, run_shell, with_places
from qemu_support import wait_for

PAGE = Page("qemu.md")
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
DEFINED = """\
<domain type='kvm'>
  <name>mail</name>
  <uuid>0f6c1d52-6a3c-4e4b-9a53-2f1f7a1f3c11</uuid>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/srv/vm.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""

pytestmark = [pytest.mark.root, pytest.mark.thorough]


@pytest.fixture
def libvirt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Libvirt's daemon of a user, who owns the directory; `virsh` reaches it."""
    missing = [each for each in ("libvirtd", "virsh", "virt-qemu-run", "qemu-system-x86_64") if not shutil.which(each)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: scripts/bootstrap --test installs them")
    monkeypatch.setenv("HOME", str(directory))
    for name in ("RUNTIME_DIR", "CONFIG_HOME", "CACHE_HOME", "DATA_HOME"):
        (directory / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"XDG_{name}", str(directory / name))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    run("chown", "-R", f"{NOBODY}:{NOBODY}", directory)
    with (directory / "log").open("wb") as log, subprocess.Popen([*AS_NOBODY, "libvirtd"], stderr=log) as daemon:
        try:
            wait_for((directory / "RUNTIME_DIR/libvirt/libvirt-sock").exists)
            yield directory
        finally:
            subprocess.run([*AS_NOBODY, "virsh", "destroy", "mail"], capture_output=True, check=False)
            daemon.send_signal(signal.SIGTERM)


def start(directory: Path) -> None:
    """Define a domain, and then edit it as the page says."""
    (directory / "disk").write_bytes(os.urandom(8 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", directory / "disk", directory / "vm.qcow2")
    os.chown(directory / "vm.qcow2", NOBODY, NOBODY)
    places = {"kvm": "qemu", "/srv/vm.qcow2": directory / "vm.qcow2"}
    (directory / "domain.xml").write_text(with_places(DEFINED, places))
    run(*AS_NOBODY, "virsh", "define", directory / "domain.xml")
    of_the_domain = re.sub(r"</?domain.*>", "", DEFINED)
    edited = with_places(PAGE.block("xml").replace("...", of_the_domain), places | {"/run/vm": directory})
    (directory / "edited.xml").write_text(edited)
    run(*AS_NOBODY, "env", f"EDITOR=cp {directory}/edited.xml", "virsh", "edit", "mail")
    run(*AS_NOBODY, "virsh", "start", "mail")


def node() -> str:
    """Return the disk's node as the page has it listed."""
    (listed,) = PAGE.blocks(below="libvirt")
    said = json.loads(run_shell(listed, {"DOMAIN": "mail"}, prefix=AS_NOBODY))
    (disk,) = (each["inserted"]["node-name"] for each in said["return"] if "inserted" in each)
    return disk


def test_its_disk_is_backed_up_and_another_node_after_a_snapshot(libvirt: Path) -> None:
    depot = new_depot("restic", libvirt / "repository")
    start(libvirt)
    disk = node()
    assert disk == "libvirt-1-format"
    assert f"such as `{disk}`" in PAGE.text
    assert [back_up(depot, libvirt, disk)["tier"] for _ in range(2)] == ["whole", "changed"]
    run(*AS_NOBODY, "virsh", "snapshot-create-as", "mail", "before-the-upgrade", "--disk-only")
    refused = depot.ferry("backup", f"qemu:{libvirt}/qmp.sock:{disk}", "--name", "vm")
    assert "read-only" in refused.err
    assert back_up(depot, libvirt, node())["tier"] == "whole"
    assert depot.ferry("restore", "latest", libvirt / "back.img").code == 0
    assert filecmp.cmp(libvirt / "disk", libvirt / "back.img", shallow=False)


def back_up(depot: Depot, directory: Path, disk: str) -> dict[str, str]:
    assert depot.ferry("backup", f"qemu:{directory}/qmp.sock:{disk}", "--name", "vm").code == 0
    return depot.ferry("show", "latest", "--json").json()
