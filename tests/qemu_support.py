"""A machine whose disk is backed up: qemu-storage-daemon, whose FUSE export is what the guest would write to."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockferry.qemu import fleecing
from blockferry.qemu.qmp import connected
from blockferry.volume import Volume, all_mounts

SIZE = 32 << 20


@dataclasses.dataclass
class Machine:
    """A storage daemon with one disk."""

    directory: Path
    format: str
    running: subprocess.Popen[bytes] | None = None

    @property
    def image(self) -> Path:
        return self.directory / f"disk.{self.format}"

    @property
    def guest(self) -> Path:
        """The disk as the guest sees it."""
        return self.directory / "guest"

    @property
    def name(self) -> str:
        return f"qemu:{self.directory}/qmp:disk0"

    @property
    def volume(self) -> Volume:
        return Volume.discover(self.name)

    def start(self) -> None:
        monitors = []
        for name in ("qmp", "control"):
            (self.directory / name).unlink(missing_ok=True)
            monitors += ["--chardev", f"socket,id={name},path={self.directory / name},server=on,wait=off"]
            monitors += ["--monitor", f"chardev={name}"]
        self.guest.touch()
        self.running = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *monitors,
                "--blockdev",
                f"driver={self.format},node-name=disk0,discard=unmap,file.driver=file,file.filename={self.image}",
                "--export",
                f"fuse,id=guest,node-name=disk0,mountpoint={self.guest},writable=on",
            ]
        )
        wait_for(lambda: str(self.guest) in mounts())

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command in the monitor that blockferry does not use."""
        with connected(str(self.directory / "control")) as monitor:
            return monitor.execute(command, **arguments)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.running:
            self.running.send_signal(number)
            self.running.wait()
            self.running = None
        if str(self.guest) in mounts():
            subprocess.run(["fusermount3", "-u", "-z", str(self.guest)], check=True)

    def write(self, offset: int, data: bytes) -> None:
        with self.guest.open("r+b", buffering=0) as disk:
            assert os.pwrite(disk.fileno(), data, offset) == len(data)

    def leftovers(self) -> list[str]:
        """Return whatever of a backup's is there, in the machine or on this host."""
        found = [each["node-name"] for each in self.ask("query-named-block-nodes", flat=True)]
        found += [each["id"] for query in ("query-jobs", "query-block-exports") for each in self.ask(query)]
        found += self.bitmaps()
        found += [point for point in mounts() if Path(point).is_relative_to(fleecing.scratch_parent())]
        found += [str(path) for path in fleecing.scratch_parent().glob("blockferry-qemu-*")]
        return [each for each in found if "blockferry-" in each]

    def bitmaps(self) -> list[str]:
        nodes = self.ask("query-named-block-nodes", flat=True)
        return [bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", [])]


def mounts() -> list[str]:
    return [mount.point for mount in all_mounts()]


def wait_for(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
