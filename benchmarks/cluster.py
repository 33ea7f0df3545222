"""A volume that several hosts share: copying it by 1, 2 and 4 of them, and what a guard takes from who writes.

copy        Hosts are processes of this machine. Each reads the volume through a disk of its own that gives so many
            bytes a second (`nbdkit --filter=rate`): sharing the work out is for the hosts' disks and networks.
foreground  fio writes 64 KiB at random: through a guard; while the volume is copied at so many bytes a second, and so
            each chunk's image is logged before it is overwritten for the first time; and to the volume itself. Once to
            each place at most, so that every write is a first one, and once to any place again and again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from measure import BLOCKFERRY, GIB, MIB, Run

NAME = "shared"
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Host:
    """One host that shares the volume."""

    name: str
    home: Path
    index: str

    def environment(self) -> dict[str, str]:
        """Return what its commands run in."""
        state = {"BLOCKFERRY_RUNTIME_DIR": str(self.home / "run"), "BLOCKFERRY_STATE_DIR": str(self.home / "state")}
        return os.environ | state | {"BLOCKFERRY_INDEX": self.index}

    def ferry(self, *words: object) -> str:
        """Run a command on it; return what it prints."""
        done = subprocess.run(
            [BLOCKFERRY, "--quiet", *map(str, words)],
            env=self.environment(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    @contextlib.contextmanager
    def guarding(self, volume: Path | str) -> Iterator[str]:
        """Stand in front of a volume; give the guard's device."""
        (self.home / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
        said = self.ferry("guard", "start", volume, "--name", NAME, "--host", self.name, "--json")
        try:
            yield json.loads(said)["device"]
        finally:
            self.ferry("guard", "stop", NAME, "--force")


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["copy", "foreground"], action="append", help="only this part")
    parser.add_argument("--size", type=float, default=1.5, metavar="GIB", help="the size of the volume")
    parser.add_argument("--rate", type=int, default=16, metavar="MIB", help="what a host reads in a second")
    parser.add_argument("--seconds", type=int, default=40, help="how long fio writes to any place")
    parser.add_argument("--depth", type=int, default=32, help="how many writes fio has under way")
    options = parser.parse_args()
    report = measure.Report("cluster")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        root = Path(directory)
        measure.keep_at_home(root)
        with running_index(root) as index, attached(root, int(options.size * GIB)) as volume:
            hosts = [Host(f"h{number}", root / f"h{number}", index) for number in range(4)]
            for part in options.part or ["copy", "foreground"]:
                {"copy": measure_copy, "foreground": measure_foreground}[part](report, root, volume, hosts, options)
    measure.finish(report, as_json=options.json)


@contextlib.contextmanager
def running_index(root: Path) -> Iterator[str]:
    """Run a Redis; give its reference."""
    socket = root / "redis"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(root)]
    with ended(subprocess.Popen(command, stdout=subprocess.DEVNULL)):
        wait_until(socket.exists)
        yield f"redis+unix://{socket}"


@contextlib.contextmanager
def attached(root: Path, size: int) -> Iterator[str]:
    """Give a block device of that size, full of what does not compress."""
    image = root / "volume.img"
    measure.say(f"making {image}")
    with image.open("wb") as file, open("/dev/urandom", "rb") as noise:
        for _ in range(size // MIB):
            file.write(noise.read(MIB))
    command = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    device = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


# -- copying -----------------------------------------------------------------------------------------------------------


def measure_copy(
    report: measure.Report, root: Path, volume: str, hosts: list[Host], options: argparse.Namespace
) -> None:
    """Have the volume copied by 1, 2 and 4 hosts, each with a disk of the same speed."""
    with contextlib.ExitStack() as running:
        slow = [running.enter_context(slow_disk(host, volume, options.rate)) for host in hosts]
        running.enter_context(hosts[0].guarding(volume))

        def copy(count: int) -> Run:
            os.environ["RESTIC_REPOSITORY"] = str(root / f"repository-{time.monotonic_ns()}")
            subprocess.run(["restic", "init", "--quiet"], check=True)
            with workers(hosts[:count], slow) as scheduler:
                words = [
                    "cluster",
                    "backup",
                    slow[0],
                    "--name",
                    NAME,
                    "--repo",
                    "restic:",
                    "--engine",
                    scheduler,
                    "--json",
                ]
                began = time.perf_counter()
                said = json.loads(hosts[0].ferry(*words))
            if said["shares"] != count:
                raise SystemExit(f"{said['shares']} hosts copied instead of {count}")
            return Run(time.perf_counter() - began, 0, 0, "", {"held_seconds": said["seconds_held"]})

        contenders = {f"{count} hosts": lambda count=count: copy(count) for count in (1, 2, 4)}
        report.add(
            f"copying {options.size} GiB at {options.rate} MiB/s a host", measure.take_turns(contenders, options.rounds)
        )


@contextlib.contextmanager
def slow_disk(host: Host, volume: str, rate: int) -> Iterator[Path]:
    """Show the volume as a file that gives so many MiB a second."""
    point = host.home / "disk"
    point.mkdir(parents=True)
    disk = point / "volume"
    disk_of = ["nbdkit", "--filter=rate", "file", volume, f"rate={rate * 8}M", "burstiness=0.1"]
    with ended(subprocess.Popen(["nbdfuse", str(disk), "[", *disk_of, "]"])):
        disk.touch()
        try:
            wait_until(lambda: disk.stat().st_size > 0)
            yield disk
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(disk)], check=False)


@contextlib.contextmanager
def workers(hosts: list[Host], slow: list[Path]) -> Iterator[str]:
    """Run a Dask scheduler and a worker a host; give the engine's name when all are there."""
    file = hosts[0].home / "scheduler.json"
    file.unlink(missing_ok=True)
    dask = [str(Path(sys.executable).with_name("dask")), "scheduler", "--host", "127.0.0.1", "--port", "0"]
    with contextlib.ExitStack() as running:
        words = [*dask, "--no-dashboard", "--scheduler-file", str(file)]
        running.enter_context(ended(subprocess.Popen(words, stderr=subprocess.DEVNULL)))
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"]
        for host, disk in zip(hosts, slow, strict=False):
            words = [BLOCKFERRY, "cluster", "worker", address, "--volume", f"{NAME}={disk}", "--host", host.name]
            running.enter_context(ended(subprocess.Popen(words, env=host.environment(), stderr=subprocess.DEVNULL)))
        import distributed  # noqa: PLC0415  # takes a second, and only this part needs it

        with distributed.Client(address, set_as_default=False) as client:
            wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == len(hosts))
        yield f"dask://{address}"


# -- who writes meanwhile ----------------------------------------------------------------------------------------------


def measure_foreground(
    report: measure.Report, root: Path, volume: str, hosts: list[Host], options: argparse.Namespace
) -> None:
    """Have fio write with a guard, without one, and while a backup runs."""
    subprocess.run(["restic", "init", "--quiet", "--repo", str(root / "foreground")], check=True)
    with contextlib.ExitStack() as running:
        slow = running.enter_context(slow_disk(hosts[1], volume, options.rate))
        device = running.enter_context(hosts[0].guarding(volume))

        def during(*, again: bool) -> Run:
            words = [BLOCKFERRY, "--quiet", "cluster", "backup", slow, "--name", NAME]
            words += ["--repo", f"restic:{root / 'foreground'}"]
            backup = subprocess.Popen(list(map(str, words)), env=hosts[0].environment())
            wait_until(lambda: "logging" in hosts[0].ferry("guard", "status", NAME, "--json"))
            done = fio(device, options, again=again)
            if backup.poll() is not None:
                raise SystemExit("the backup had ended before fio did: a larger --size, or less --seconds")
            backup.terminate()
            backup.wait()
            wait_until(lambda: "logging" not in hosts[0].ferry("guard", "status", NAME, "--json"))
            return done

        for again in (False, True):
            contenders = {
                "through a guard": lambda again=again: fio(device, options, again=again),
                "during a backup": lambda again=again: during(again=again),
                "without a guard": lambda again=again: fio(volume, options, again=again),
            }
            title = f"fio, 64 KiB at random, {'any place' if again else 'each place once'}"
            report.add(title, measure.take_turns(contenders, options.rounds))


def fio(device: str, options: argparse.Namespace, *, again: bool = False) -> Run:
    """Write to each place of a device once, or for a while to any `again` and again."""
    how = ["--norandommap", "--time_based", f"--runtime={options.seconds}"] if again else []
    done = measure.run(
        [
            *("fio", "--name=writes", f"--filename={device}", "--rw=randwrite", "--bs=64k", "--direct=1"),
            *("--ioengine=libaio", f"--iodepth={options.depth}", "--randrepeat=1", "--output-format=json", *how),
        ]
    )
    writes = json.loads(done.output)["jobs"][0]["write"]
    figures = {
        "bytes_a_second": writes["bw_bytes"],
        "p50_seconds": writes["clat_ns"]["percentile"]["50.000000"] / 1e9,
        "p99_seconds": writes["clat_ns"]["percentile"]["99.000000"] / 1e9,
    }
    return dataclasses.replace(done, output="", figures=figures)


# -- processes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process with the context."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a function says so."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("that never happened")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
