"""The power is cut while a volume is restored and written: what was synced is there when the restore goes on.

The guest attaches and writes; its whole machine is killed. Then this one takes the guest's disk, and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands_support import Depot, blockferry, new_depot, run
from conftest import Attach, Mount

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("BLOCKFERRY_TEST_GUEST") == "full"
CUTS = 3 if FULL else 1
SIZE = 192 << 20

WRITER = """
import hashlib, json, os, sys
place, acknowledged = sys.argv[1:]
log = open(acknowledged, "a")
for number in range(10**6):
    name, data = f"new-{number % 40}", os.urandom(50_000 + number * 997 % 200_000)
    with open(os.path.join(place, f"{name}.{number}"), "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    os.rename(file.name, os.path.join(place, name))
    directory = os.open(place, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    log.write(json.dumps([name, number, hashlib.sha256(data).hexdigest()]) + "\\n")
    log.flush()
    os.fsync(log.fileno())
"""

INSIDE = """
set -eu
blockferry attach latest /dev/vda --name cut --rate 100K --threads 1 --repo "$REPOSITORY"
device=$(blockferry status cut --json | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["device"])')
mkdir -p /run/volume
mount "$device" /run/volume
exec "$PYTHON" "$PLACE/writer.py" /run/volume "$PLACE/acknowledged"
"""


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    """A repository that holds an ext4 volume."""
    files = tmp_path / "files"
    files.mkdir()
    for number in range(100):
        (files / str(number)).write_bytes(os.urandom(1 << 20))
    image = tmp_path / "volume.img"
    run("truncate", "-s", SIZE, image)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, image)
    made = new_depot("borg", tmp_path / "repository")
    assert made.ferry("backup", image).code == 0
    return made


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cut", range(CUTS))
@pytest.mark.thorough
def test_what_was_synced_before_a_power_cut_is_there_when_the_restore_goes_on(
    depot: Depot, tmp_path: Path, attach: Attach, mount: Mount, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    run("truncate", "-s", SIZE, tmp_path / "target.img")
    (tmp_path / "writer.py").write_text(WRITER)
    acknowledged = tmp_path / "acknowledged"
    acknowledged.touch()
    words = {
        "PLACE": str(tmp_path),
        "PYTHON": sys.executable,
        "REPOSITORY": depot.reference,
        "BLOCKFERRY_STATE_DIR": str(tmp_path / "state"),
        "BORG_BASE_DIR": str(tmp_path / "borg"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    (tmp_path / "state").mkdir()
    target = str(tmp_path / "target.img")
    drive = f"-drive file={target},format=raw,if=virtio"
    inside = ["env", *(f"{name}={value}" for name, value in (words | depot.env).items()), "sh", "-c", INSIDE]
    guest = subprocess.Popen(
        [str(ROOT / "scripts/vm"), f"--qemu-opts={drive}", "--rwdir", str(tmp_path), "--", *inside],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_lines(acknowledged, 5 + 10 * cut, guest)
        time.sleep(random.Random(cut).uniform(0, 3))
    finally:
        cut_power(target)
        said, _none = guest.communicate(timeout=60)
    notes = [json.loads(line) for line in acknowledged.read_text().splitlines() if line.endswith("]")]
    assert notes, said

    device = attach(tmp_path / "target.img")
    assert run("wipefs", "--noheadings", device) == ""  # nobody mounts it by mistake
    attached = depot.ferry("attach", "latest", device, "--name", "cut", "--json").json()
    place = mount(attached["device"])
    check(place, tmp_path / "files", notes)
    deadline = time.monotonic() + 120
    while not blockferry("status", "cut", "--json").json()["finished"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    check(place, tmp_path / "files", notes)
    run("umount", place)
    assert blockferry("detach", "cut", "--json").json()["finished"]
    run("e2fsck", "-fn", device)


def cut_power(disk: str) -> None:
    """Kill the machine that has a disk."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace")
            if "qemu-system" in words.split("\0")[0] and disk in words:
                os.kill(int(process.name), signal.SIGKILL)


def wait_for_lines(file: Path, count: int, guest: subprocess.Popen[str]) -> None:
    """Wait until a file has so many lines, or more."""
    deadline = time.monotonic() + 600
    while len(file.read_text().splitlines()) < count:
        assert guest.poll() is None, guest.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check(place: Path, files: Path, notes: list[tuple[str, int, str]]) -> None:
    """Compare what was there before, and whatever was acknowledged last under each name."""
    for each in files.iterdir():
        assert (place / each.name).read_bytes() == each.read_bytes(), each.name
    latest = {name: (number, digest) for name, number, digest in notes}
    newest = max(number for number, _digest in latest.values())
    for name, (number, digest) in latest.items():
        found = hashlib.sha256((place / name).read_bytes()).hexdigest()
        # The one that was being written next may be there already; it was not acknowledged.
        assert found == digest or number + 40 == newest + 1, name
