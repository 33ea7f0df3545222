"""Hosts that share a volume: network namespaces on one machine, each with a guard, a state and a name of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_load
from commands_support import Depot, Done, blockferry, run
from hot_hosts_support import Host

MIB = 1 << 20
VOLUME = "shared"


@dataclasses.dataclass
class SharingHost:
    """A host in front of whose volume there is a guard."""

    name: str
    home: Path
    volume: str
    index: str
    namespace: Host | None = None
    loads: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)
    device: str = ""
    attached: str = ""
    """What is on the device, so that nobody else's is taken away who has its name by now."""
    state: Path | None = None
    """Where its state lies; else in its home."""

    @property
    def env(self) -> dict[str, str]:
        return {
            "BLOCKFERRY_RUNTIME_DIR": str(self.home / "run"),
            "BLOCKFERRY_STATE_DIR": str(self.state or self.home / "state"),
            "BLOCKFERRY_INDEX": self.index,
        }

    def ferry(self, *words: object, **env: str) -> Done:
        """Run `blockferry` on this host."""
        return blockferry(*words, env=self.env | env, prefix=self.prefix)

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace.name}"] if self.namespace else []

    def start(self, *options: object) -> dict[str, Any]:
        """Start the guard."""
        words = [self.volume, "--name", VOLUME, "--host", self.name, "--log-room", "1M", *options]
        said = self.ferry("guard", "start", *words, "--json").json()
        self.device = said["device"]
        self.attached = number_of_what_is_attached(self.device)
        return said

    def status(self) -> dict[str, Any]:
        (said,) = self.ferry("guard", "status", VOLUME, "--json").json()["guards"]
        return said

    def stop(self, *options: object) -> Done:
        return self.ferry("guard", "stop", VOLUME, *options, "--json")

    def start_load(self, locks: Path, seed: int) -> None:
        """Have a process overwrite what all hosts share."""
        words = [sys.executable, cluster_load.__file__, self.device, locks, self.journal(seed), seed]
        self.loads.append(subprocess.Popen(list(map(str, words))))

    def journal(self, seed: int) -> Path:
        return self.home / f"journal-{seed}"

    def journals(self) -> list[Path]:
        return sorted(self.home.glob("journal-*"))

    def stop_loads(self) -> list[int]:
        """End the load; return the exit codes."""
        for load in self.loads:
            load.terminate()
        ended = [load.wait(30) for load in self.loads]
        self.loads = []
        return ended

    def processes(self) -> dict[int, str]:
        """Return the command line of each process of it, by number."""
        found = {}
        mark = f"BLOCKFERRY_RUNTIME_DIR={self.home / 'run'}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def guard_process(self) -> int:
        return next(number for number, line in self.processes().items() if "blockferry.cluster.daemon" in line)

    def clear_away(self) -> None:
        for load in self.loads:
            load.kill()
            load.wait()
        self.stop("--force")
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, 9)
        if self.attached and number_of_what_is_attached(self.device) == self.attached:
            with contextlib.suppress(AssertionError):
                run("losetup", "--detach", self.device)


def number_of_what_is_attached(loop: str) -> str:
    """Return the number that the kernel gave to what is on a loop device, "" if there is nothing."""
    found = Path("/sys/block", Path(loop).name)
    return (found / "diskseq").read_text() if (found / "loop" / "backing_file").exists() else ""


@contextlib.contextmanager
def sharing(
    count: int, home: Path, volume: str, index: str, namespaces: list[Host] | None = None
) -> Iterator[list[SharingHost]]:
    """Make hosts that share a volume; their guards are not started."""
    made = []
    for number in range(count):
        each = SharingHost(f"h{number}", home / f"h{number}", volume, index)
        each.namespace = namespaces[number] if namespaces else None
        (each.home / "run").mkdir(parents=True, mode=0o700)
        made.append(each)
    try:
        yield made
    finally:
        for each in made:
            each.clear_away()


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def back_up(depot: Depot, host: SharingHost, *options: object, **env: str) -> dict[str, Any]:
    """Back the volume up from a host; return what the command says."""
    words = ["cluster", "backup", host.volume, "--name", VOLUME, *options, "--repo", depot.reference, "--json"]
    return host.ferry(*words, **depot.env, **env).json()


def instant_of(depot: Depot, snapshot: str) -> int:
    """Return when a snapshot was taken, in ns."""
    shown = depot.ferry("show", snapshot, "--json").json()
    created = datetime.datetime.fromisoformat(shown["created"])
    return round(created.timestamp() * 1e6) * 1000


def writes_of(hosts: list[SharingHost]) -> list[cluster_load.Write]:
    """Return what the loads of all hosts wrote."""
    return list(cluster_load.journal_of([journal for host in hosts for journal in host.journals()]))
