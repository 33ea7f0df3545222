"""Hot restores through the command line, and every trace that they leave on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from commands_support import Depot, Done, blockferry, run

MIB = 1 << 20


@dataclasses.dataclass
class Hot:
    """One hot restore of what a depot holds; `runtime` is a directory that only its processes know."""

    depot: Depot
    name: str
    target: Path | str
    runtime: Path
    points: list[Path] = dataclasses.field(default_factory=list)
    path: str = ""
    """The file behind the disk, since it was attached."""

    @property
    def env(self) -> dict[str, str]:
        return {"BLOCKFERRY_RUNTIME_DIR": str(self.runtime)}

    def try_to_attach(self, *options: object, snapshot: str = "latest", target: object = None) -> Done:
        words = [snapshot, target or self.target, "--name", self.name, *options]
        return self.depot.ferry("attach", *words, "--json", **self.env)

    def attach(self, *options: object, snapshot: str = "latest") -> dict[str, Any]:
        said = self.try_to_attach(*options, snapshot=snapshot).json()
        self.path = said["path"]
        self.seen.add((Path(said["device"]).name, sequence(Path(said["device"]).name)))
        return said

    def try_to(self, verb: str, *options: object) -> Done:
        return blockferry(verb, self.name, *options, "--json", env=self.env)

    def status(self) -> dict[str, Any]:
        return self.try_to("status").json()

    def detach(self, *options: object) -> dict[str, Any]:
        return self.try_to("detach", *options).json()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """Return the first status of which the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition(said := self.status()):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return said

    def wait_until_finished(self, seconds: float = 60) -> dict[str, Any]:
        return self.wait_for(lambda said: said["finished"], seconds)

    def mount(self, device: str, *options: str) -> Path:
        point = self.runtime / f"mounted-{len(self.points)}"
        point.mkdir()
        run("mount", "-o", ",".join([*options, *(["nouuid"] if filesystem(device) == "xfs" else [])]) or "rw",
            device, point)  # fmt: skip
        self.points.append(point)
        return point

    def unmount(self) -> None:
        point = self.points.pop()
        unmount(point)

    def processes(self) -> dict[int, str]:
        """Return the command line of each process of it, by number."""
        found = {}
        mark = f"BLOCKFERRY_RUNTIME_DIR={self.runtime}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def traces(self) -> list[str]:
        """Return what is left of it: processes, mounts, loop devices."""
        found = [f"process {number}: {line}" for number, line in self.processes().items()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        found += [line for line in mounts if f"hot-{self.name}" in line or str(self.runtime) in line]
        return found + [f"loop device on {file}" for file in self.loops()]

    def assert_no_traces(self) -> None:
        """Assert that nothing is left, but for the moment that a process takes to end."""
        deadline = time.monotonic() + 5
        while left := self.traces():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def loops(self) -> dict[str, str]:
        """Return the files behind the loop devices that show the disk, by device; even if nobody serves it."""
        found = {}
        for each in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                file = each.read_text().strip()
                if f"hot-{self.name}/" in file or (
                    file == "/disk" and (each.parts[3], sequence(each.parts[3])) in self.seen
                ):
                    found[each.parts[3]] = file
        return found

    seen: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    """The loop devices that it had: when its mount is gone their files do not tell whose they are."""

    def clear_away(self) -> None:
        """Take away whatever is left of it."""
        for point in reversed(self.points):
            run_quietly("umount", "--lazy", point)
        blockferry("detach", self.name, "--force", "--forget", env=self.env)
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, 9)
        for device in self.loops():
            run_quietly("losetup", "--detach", f"/dev/{device}")


def sequence(loop: str) -> str:
    """Return what the kernel numbers that which is attached to a loop device with."""
    return Path(f"/sys/block/{loop}/diskseq").read_text()


def is_mounted(point: Path) -> bool:
    """Tell whether something is mounted there, be it dead or alive."""
    return any(line.split()[4] == str(point) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def run_quietly(*arguments: object) -> None:
    with contextlib.suppress(AssertionError):
        run(*arguments)


def unmount(point: Path) -> None:
    """Unmount; whoever looks at every mount may have it open for a moment."""
    deadline = time.monotonic() + 30
    while is_mounted(point):
        with contextlib.suppress(AssertionError):
            run("umount", point)
        assert time.monotonic() < deadline, point
        time.sleep(0.05)


def filesystem(path: object) -> str:
    return run("blkid", "-p", "-o", "value", "-s", "TYPE", path).strip()


def check_filesystem(path: object) -> None:
    """Assert that an unmounted filesystem is clean."""
    if filesystem(path) == "xfs":
        run("xfs_repair", "-n", path)
    else:
        run("e2fsck", "-fn", path)


def same_tree(one: Path, other: Path) -> None:
    """Assert that two directory trees hold the same files."""
    stack = [filecmp.dircmp(one, other, ignore=["lost+found"])]
    while stack:
        each = stack.pop()
        assert not each.left_only + each.right_only, (each.left, each.left_only, each.right_only)
        _match, differ, errors = filecmp.cmpfiles(each.left, each.right, each.common_files, shallow=False)
        assert not differ + errors, (each.left, differ, errors)
        stack.extend(each.subdirs.values())


@contextlib.contextmanager
def mounted(device: object, place: Path, *options: str) -> Iterator[Path]:
    """Mount for the length of the context."""
    place.mkdir()
    run("mount", "-o", ",".join(options) or "rw", device, place)
    try:
        yield place
    finally:
        unmount(place)
        place.rmdir()
