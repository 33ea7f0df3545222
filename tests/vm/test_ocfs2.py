"""Two guests share a disk with OCFS2 on it, and write: what was backed up meanwhile is the disk at one instant.

Each guest runs `ocfs2_host.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ocfs2_host
from commands_support import Depot, new_depot, run
from ocfs2_host import ADDRESSES, BLOCK, CELLS, KEPT, content, records_of
from pages_support import Page

ROOT = Path(__file__).parents[2]
SIZE = 64 << 20


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_a_disk_that_two_guests_write_to_through_ocfs2_comes_back_as_of_one_instant(tmp_path: Path) -> None:
    depot = new_depot("restic", tmp_path / "repository")
    disk = tmp_path / "shared.img"
    run("truncate", "-s", SIZE, disk)
    (tmp_path / "setup.sh").write_text(Page("shared-volumes.md").block())
    ports = free_ports()
    guests = [
        boot("a", disk, tmp_path, depot, ports),
        boot("b", disk, tmp_path, depot, ports[::-1]),
    ]
    try:
        ended = [guest.wait() for guest in guests]
    finally:
        for guest in guests:
            guest.terminate()
    assert ended == [0, 0], "".join((tmp_path / f"{name}.log").read_text() for name in ADDRESSES)

    said = json.loads((tmp_path / "backup.json").read_text())
    assert said["hosts"] == list(ADDRESSES)
    assert said["bytes_logged"]
    assert depot.ferry("show", said["snapshot"], "--json").json()["stability"] == "crash-consistent"
    checked = run("fsck.ocfs2", "-n", "-f", disk)
    assert "All passes succeeded" in checked
    assert "? n" not in checked
    check(tmp_path / "restored", {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ADDRESSES})


def free_ports() -> tuple[int, int]:
    """Return two ports of UDP that nobody uses."""
    with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def boot(name: str, disk: Path, home: Path, depot: Depot, ports: tuple[int, int]) -> subprocess.Popen[bytes]:
    """Start a guest that has the disk, and a cable to the other one between two ports; what it says is in a log."""
    options = [
        f"-drive file={disk},format=raw,if=none,id=shared,cache=none,file.locking=off",
        "-device virtio-blk-pci,drive=shared,share-rw=on",
        f"-netdev socket,id=cable,localaddr=127.0.0.1:{ports[0]},udp=127.0.0.1:{ports[1]}",
        f"-device virtio-net-pci,netdev=cable,mac=52:54:00:00:00:{ord(name):02x}",
    ]
    words = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "BLOCKFERRY_STATE_DIR": "/dev/shm/state",
        "RESTIC_CACHE_DIR": "/dev/shm/restic",
        "RESTIC_REPOSITORY": str(depot.path),
        **depot.env,
    }
    command = [ROOT / "scripts/vm", "--disable-microvm", f"--qemu-opts={' '.join(options)}", "--rwdir", home, "--"]
    command += ["env", *(f"{key}={value}" for key, value in words.items())]
    command += [sys.executable, ocfs2_host.__file__, name, home]
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def check(files: Path, bounds: dict[str, dict[str, Any]]) -> None:
    """Assert that files are those of one instant, which each host knows to lie between two of its steps."""
    logs = {name: records_of((files / f"log-{name}").read_bytes()) for name in bounds}
    for name, bound in bounds.items():
        numbers = [number for number, _seen in logs[name]]
        last = len(numbers)
        assert numbers == list(range(1, last + 1))
        assert bound["before"] <= last <= bound["after"] < bound["done"]
        for other in bounds.keys() - {name}:
            # What a host had read is there, too.
            assert max(seen for _number, seen in logs[name]) <= len(logs[other])
        check_files(files / "files", name, last)
        check_cells((files / f"cells-{name}").read_bytes(), last)


def check_files(files: Path, name: str, last: int) -> None:
    """Assert that the files of the last steps are there, and none of a step that had not begun."""
    there = {int(path.name.partition("-")[2]) for path in files.glob(f"{name}-*")}
    expected = set(range(max(1, last - KEPT + 2), last + 1))
    assert expected <= there <= expected | {last - KEPT + 1, last + 1}
    for number in expected:
        assert (files / f"{name}-{number}").read_bytes() == content(name, number)


def check_cells(cells: bytes, last: int) -> None:
    """Assert that each cell holds the last step that overwrote it."""
    newest = {number % CELLS: number for number in range(1, last + 1)}
    for cell, number in newest.items():
        expected = [b"%08d" % each * (BLOCK // 8) for each in (number, last + 1) if each % CELLS == cell]
        assert cells[cell * BLOCK : (cell + 1) * BLOCK] in expected, (cell, number)
