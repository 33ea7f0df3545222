"""A real machine, halted before its first instruction: its disk is written through the device's own backend."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from blockferry.qemu import tracker
from freeze_support import hold, read
from qemu_support import SIZE, Machine, wait_for

pytestmark = pytest.mark.root

GRAIN = 64 << 10


class RealMachine(Machine):
    """qemu-system-x86_64 with a virtio disk, as a user without any rights: as libvirt runs it."""

    def start(self) -> None:
        monitors = [f"-qmp=unix:{self.directory}/{name},server=on,wait=off" for name in ("qmp", "control")]
        self.running = subprocess.Popen(
            [
                *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"),
                "qemu-system-x86_64",
                *(word for each in monitors for word in each.split("=", 1)),
                *("-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "64"),
                "-blockdev",
                f"driver={self.format},node-name=disk0,file.driver=file,file.filename={self.image}",
                *("-device", "virtio-blk-pci,drive=disk0,id=vda"),
            ]
        )
        wait_for((self.directory / "control").exists)

    def write(self, offset: int, data: bytes) -> None:
        """Write one byte again and again."""
        words = f'qemu-io -d /machine/peripheral/vda/virtio-backend "write -P {data[0]} {offset} {len(data)}"'
        assert not self.ask("human-monitor-command", command_line=words)


@pytest.fixture
def machine(request, directory) -> Iterator[RealMachine]:
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("needs qemu-system-x86: scripts/bootstrap --test installs it")
    made = RealMachine(directory, "qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(made.image), str(SIZE)], check=True)
    for path in (directory, made.image):
        shutil.chown(path, "nobody", "nogroup")
    request.addfinalizer(made.stop)
    made.start()
    return made


def test_the_disk_of_a_machine_is_held_still_and_tracked(machine):
    chance, disk = random.Random(1), bytearray(SIZE)

    def scribble() -> None:
        for _ in range(10):
            offset, length = chance.randrange(0, SIZE - GRAIN, 512), chance.choice([512, 4096, 70_144])
            data = bytes([chance.randrange(1, 256)]) * min(length, SIZE - offset)
            machine.write(offset, data)
            disk[offset : offset + len(data)] = data

    scribble()
    base = tracker.blockferry_checkpoint(machine.volume, "one", "", pytest.fail)
    with hold(machine.name) as frozen:
        before = bytes(disk)
        scribble()
        assert read(frozen) == before
    scribble()
    with hold(machine.name) as frozen:
        after = bytes(disk)
        found = tracker.blockferry_changed_extents(machine.volume, frozen.volume, base, pytest.fail)
        scribble()
        assert read(frozen) == after
    wanted = [at for at in range(0, SIZE, GRAIN) if before[at : at + GRAIN] != after[at : at + GRAIN]]
    assert len(wanted) >= 10
    assert all(found.extents.covers(at, at + GRAIN) for at in wanted)
    assert found.extents.total <= 60 * GRAIN
    tracker.blockferry_release_checkpoint(base)
    assert machine.leftovers() == []
