"""A Dask scheduler, and the workers of hosts that share a volume."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster_hosts_support import VOLUME, SharingHost, wait_until
from cluster_support import make_authority, make_certificate
from commands_support import Depot, command

PAGE = Path(__file__).parents[1] / "docs" / "shared-volumes.md"
COUNT = "import sys, distributed as d; print(len(d.Client(sys.argv[1]).scheduler_info(n_workers=-1)['workers']))"


class Scheduler:
    """A scheduler, at the address `host`, as argument of the command `prefix` if there is one."""

    def __init__(self, home: Path, host: str = "127.0.0.1", prefix: Sequence[str] = (), *, tls: bool = False) -> None:
        """With `tls` it lets in only who has what `env` says: what the page on shared volumes shows."""
        home.mkdir()
        self.env = _tls(home) if tls else {}
        file = home / "scheduler.json"
        words = ["scheduler", "--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        dask = str(Path(sys.executable).with_name("dask"))
        protocol = ["--protocol", "tls" if tls else "tcp"]
        env = os.environ | self.env
        self.process = subprocess.Popen([*prefix, dask, *words, *protocol], env=env, stderr=subprocess.DEVNULL)
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        self.address = json.loads(file.read_text())["address"]

    @property
    def engine(self) -> str:
        return f"dask://{self.address}"

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


class Workers:
    """Workers of hosts, each in its host's namespace, and what they hold of a repository."""

    def __init__(self, depot: Depot, hosts: list[SharingHost], scheduler: Scheduler) -> None:
        """Start them; return when the scheduler knows them all."""
        self.processes = [
            subprocess.Popen(
                [
                    *host.prefix,
                    *command("cluster", "worker", scheduler.address, "--volume", f"{VOLUME}={host.volume}"),
                    *("--host", host.name),
                ],
                env=os.environ | host.env | depot.env | scheduler.env,
                stderr=subprocess.PIPE,
                text=True,
            )
            for host in hosts
        ]
        _wait_for(scheduler, hosts)

    def end(self) -> None:
        for each in self.processes:
            each.send_signal(signal.SIGTERM)
        for each in self.processes:
            _out, err = each.communicate(timeout=30)
            assert "Traceback" not in err or each.returncode < 0, err


@contextlib.contextmanager
def copied_by_dask(
    depot: Depot, hosts: list[SharingHost], home: Path, address: str, prefix: Sequence[str]
) -> Iterator[Scheduler]:
    """Run a scheduler with TLS, and a worker on each host."""
    scheduler = Scheduler(home / "scheduler", address, prefix, tls=True)
    try:
        workers = Workers(depot, hosts, scheduler)
        try:
            yield scheduler
        finally:
            workers.end()
    finally:
        scheduler.end()


def _tls(home: Path) -> dict[str, str]:
    """Make an authority and certificates; return the environment that the page shows, with their paths."""
    make_authority(home, "ca")
    for name in ("server", "client"):
        make_certificate(home, name)
    lines = re.findall(r"^(DASK_\w+)=(.+)$", PAGE.read_text(), re.MULTILINE)
    return {name: value.replace("/etc/blockferry", str(home)) for name, value in lines}


def _wait_for(scheduler: Scheduler, hosts: list[SharingHost]) -> None:
    """Wait, where the hosts are, until the scheduler has all their workers."""
    words = [*hosts[0].prefix, sys.executable, "-c", COUNT, scheduler.address]
    env = os.environ | scheduler.env
    wait_until(lambda: int(subprocess.run(words, capture_output=True, check=True, env=env).stdout) == len(hosts))
    time.sleep(0.2)
