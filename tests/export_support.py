"""Exports of volumes, with a state and a runtime directory that only they know."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

from blockferry.config.configuration import Configuration, load_configuration
from blockferry.export.client import Request, release, start, usual_directory
from blockferry.export.job import processes
from blockferry.export.note import load_all
from blockferry.manager import plugin_manager
from blockferry.volume import default_name
from commands_support import Depot, Done, blockferry

MANAGER = plugin_manager()

MIB = 1 << 20
SEGMENT = 4 * MIB


@dataclasses.dataclass
class Host:
    """A host as `blockferry export` sees it."""

    directory: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "BLOCKFERRY_STATE_DIR": str(self.directory / "state"),
            "BLOCKFERRY_RUNTIME_DIR": str(self.directory / "run"),
            "BLOCKFERRY_CONFIG": str(self.directory / "config.yaml"),
        }

    @property
    def at(self) -> Path:
        """Where exports are shown."""
        return self.directory / "state" / "export"

    def configure(self, text: str) -> None:
        (self.directory / "config.yaml").write_text(text)

    def ferry(self, *arguments: object) -> Done:
        return blockferry(*arguments, env=self.env)

    def export(self, *names: object, image: bool = False, at: Path | None = None, since: str = "latest") -> Any:
        """Do as `blockferry export` does, of which only the process that stays is one of its own here."""
        configuration = load_configuration(MANAGER)
        groups = [configuration.groups[str(name)] for name in names if name in configuration.groups]
        volumes = [_volume(configuration, str(name)) for name in names if name not in configuration.groups]
        request = Request(
            at=str(at) if at else usual_directory(),
            volumes=tuple(volumes),
            groups=tuple(group.as_json() for group in groups),
            as_segments=not image,
            since=since,
            job=tuple(processes()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of the process that stays, which is our child here
            return start(MANAGER, request)

    def release(self) -> dict[str, Any]:
        """Release the only export, and return what is said of it."""
        (note,) = load_all()
        return release(MANAGER, note, force=False)

    def processes(self) -> list[int]:
        """Return the processes that keep exports of this host."""
        mark = f"BLOCKFERRY_RUNTIME_DIR={self.directory / 'run'}\0".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    mark in (entry / "environ").read_bytes()
                    and b"blockferry.export" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def is_idle(self) -> bool:
        """Tell whether no process keeps an export, as soon as one that was told to end had the time to."""
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.processes()

    def kill(self) -> None:
        (process,) = self.processes()
        os.kill(process, signal.SIGKILL)
        while Path(f"/proc/{process}/exe").exists():
            pass

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if f" {self.directory}/state/" in line]

    def clear_away(self) -> None:
        self.ferry("release", "--force", "--failed")
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        while self.mounts():
            subprocess.run(["umount", "--lazy", str(self.at)], check=True)


def _volume(configuration: Configuration, name: str) -> tuple[str, str]:
    known = configuration.volumes.get(name)
    return (known.name, known.path) if known else (default_name(name), name)


def job(depot: Depot, source: Path, name: str, *options: str) -> Done:
    """Run the tool itself on a directory, as a user's job does; return how it ended."""
    where = {"borg": {"BORG_REPO": str(depot.path)}, "restic": {"RESTIC_REPOSITORY": str(depot.path)}}[depot.tool]
    words = {
        "borg": ["borg", "create", "--stats", "--json", *options, f"::{name}", str(source)],
        "restic": ["restic", "backup", "--json", *options, "--tag", name, str(source)],
    }[depot.tool]
    done = subprocess.run(
        words, env=os.environ | depot.env | where, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)
