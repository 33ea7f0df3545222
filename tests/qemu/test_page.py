"""What docs/qemu.md has typed works on a real QEMU: on a machine before it runs, and on one that is only its disks."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.qemu.qmp import connected
from commands_support import Depot, new_depot, run
from pages_support import Page, run_shell, with_places
from qemu_support import wait_for

PAGE = Page("qemu.md")
BACKUP, MACHINE, _LIBVIRTS, ONLY_DISKS = PAGE.blocks()


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return new_depot("restic", tmp_path / "repository")


@pytest.fixture
def places(directory: Path) -> dict[str, object]:
    """The page's socket and disk, here; `...` stands for a machine that has next to nothing."""
    run("qemu-img", "create", "-q", "-f", "qcow2", directory / "vm.qcow2", "16M")
    return {
        "/run/vm": directory,
        "/srv/vm.qcow2": directory / "vm.qcow2",
        "...": "-nodefaults -display none -S -m 64M",
    }


@contextlib.contextmanager
def running(script: str, places: dict[str, object], socket: Path) -> Iterator[None]:
    words = ["sh", "-euc", f"exec {with_places(script, {each: places[each] for each in places if each in script})}"]
    with subprocess.Popen(words) as process:
        try:
            wait_for(socket.exists)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
    socket.unlink(missing_ok=True)


def back_up(depot: Depot, directory: Path) -> str:
    """Run the page's backup; return the snapshot, whose changes QEMU keeps track of."""
    run_shell(BACKUP, {"/run/vm": directory, "restic:/srv/restic": depot.reference}, env=depot.env)
    return depot.ferry("snapshots", "--json").json()["snapshots"][-1]["id"]


@pytest.mark.root
@pytest.mark.thorough
def test_a_disk_is_backed_up_and_its_bitmap_removed(directory: Path, places: dict[str, object], depot: Depot) -> None:
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("needs qemu-system-x86: scripts/bootstrap --test installs it")
    socket, image = directory / "qmp.sock", directory / "vm.qcow2"
    with running(MACHINE, places, socket):
        of_the_machine = back_up(depot, directory)
    with running(ONLY_DISKS, places, socket):
        assert bitmaps(image_of(socket)) == [f"blockferry-{of_the_machine}"]
        snapshot = back_up(depot, directory)
        assert depot.ferry("show", "latest", "--json").json()["tier"] == "changed"
        assert bitmaps(image_of(socket)) == [f"blockferry-{snapshot}"]
        said = json.loads(with_places(PAGE.block("json"), {"SNAPSHOT": snapshot}))
        with connected(str(socket)) as monitor:
            monitor.execute(said["execute"], **said["arguments"])
        assert bitmaps(image_of(socket)) == []
        snapshot = back_up(depot, directory)
    assert "`qemu-img bitmap --remove IMAGE blockferry-SNAPSHOT`" in PAGE.text
    run("qemu-img", "bitmap", "--remove", image, f"blockferry-{snapshot}")


def image_of(socket: Path) -> list[dict[str, object]]:
    with connected(str(socket)) as monitor:
        return monitor.execute("query-named-block-nodes")


def bitmaps(nodes: list[dict[str, object]]) -> list[str]:
    return [
        bitmap["name"] for node in nodes if node["node-name"] == "disk0" for bitmap in node.get("dirty-bitmaps", [])
    ]


def test_libvirts_domain_has_the_same_monitor() -> None:
    domain = ElementTree.fromstring(PAGE.block("xml"))
    words = [each.get("value") for each in domain.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert " ".join(map(str, words)) in MACHINE
