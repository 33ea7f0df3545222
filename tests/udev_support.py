"""A real udevd with rules of a test's own, and devices with serial numbers that can be plugged in."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.hot.udev import udevd_runs
from commands_support import run

DAEMONS = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
RULES = Path("/run/udev/rules.d")
PLACE = Path("/run/blockferry-tests")


@contextlib.contextmanager
def udevd() -> Iterator[None]:
    """Have udevd run: start it if nobody did, and end it when the last test that needs it is done."""
    program = next((each for each in DAEMONS if os.access(each, os.X_OK)), None)
    if program is None:
        pytest.skip("systemd-udevd is not installed: apt install udev")
    PLACE.mkdir(exist_ok=True)
    started = PLACE / "udevd.pid"
    with (PLACE / "starting").open("w") as starting, (PLACE / "using").open("w") as using:
        fcntl.flock(starting, fcntl.LOCK_EX)
        if not udevd_runs():
            run(program, "--daemon")
            (process,) = run("pgrep", "--full", "--newest", f"^{program} --daemon").split()
            started.write_text(process)
        fcntl.flock(using, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(starting, fcntl.LOCK_EX)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(using, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if started.exists():
                    with contextlib.suppress(ProcessLookupError):  # somebody ended it, and the tests with it
                        os.kill(int(started.read_text()), signal.SIGTERM)
                    started.unlink()
                    wait_for(lambda: not udevd_runs(), "udevd to end")


@contextlib.contextmanager
def rule(number: int, text: str) -> Iterator[None]:
    """Have udevd know a rule."""
    path = RULES / f"{number}-blockferry-test-{secrets.token_hex(4)}.rules"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    reload = ["udevadm", "control", "--reload"]
    # udevd takes a few requests at a time: where tests run side by side it is busy now and then.
    wait_for(lambda: not subprocess.run(reload, check=False, capture_output=True).returncode, "udevd to read its rules")
    try:
        yield
    finally:
        path.unlink()
        subprocess.run(["udevadm", "control", "--reload"], check=False)


@dataclasses.dataclass
class Disk:
    """An image that is a disk with a serial number as soon as it is plugged in."""

    path: Path
    serial: str
    device: str = ""

    @property
    def match(self) -> str:
        return f"serial:{self.serial}"

    def plug_in(self, *options: str) -> str:
        """Attach it, and wait until udev is done with it; return the device."""
        self.device = run("losetup", "--find", "--show", *options, self.path).strip()
        # An event may be on its way to udevd when it says that it has none left.
        wait_for(lambda: properties(self.device).get("ID_SERIAL_SHORT") == self.serial, "udev to know the disk")
        run("udevadm", "settle", "--timeout=30")
        return self.device

    def unplug(self) -> None:
        """Detach it, and wait until it is gone."""
        if self.device:
            subprocess.run(["losetup", "--detach", self.device], check=False)
            shown = Path("/sys/block", Path(self.device).name, "loop", "backing_file")
            wait_for(lambda: not shown.exists() or shown.read_text().strip() != str(self.path), "the disk to be gone")
            self.device = ""


@contextlib.contextmanager
def disks(directory: Path) -> Iterator[Callable[..., Disk]]:
    """Give a function that makes a disk: `disk(size)`, `disk(size, serial)`; all are unplugged at the end."""
    with contextlib.ExitStack() as held:

        def make(size: str, serial: str = "") -> Disk:
            disk = Disk(directory / f"disk-{secrets.token_hex(4)}.img", serial or f"T-{secrets.token_hex(4)}")
            run("truncate", "-s", size, disk.path)
            named = f'ATTR{{loop/backing_file}}=="{disk.path}", ENV{{ID_SERIAL_SHORT}}="{disk.serial}"\n'
            held.enter_context(rule(59, named))
            held.callback(disk.unplug)
            return disk

        yield make


def properties(device: str) -> dict[str, str]:
    """Return what udev knows of a device."""
    lines = run("udevadm", "info", "--query=property", device).splitlines()
    return dict(line.split("=", 1) for line in lines)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Wait until something holds; `watch` looks by itself every half minute, whatever udev has told it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
