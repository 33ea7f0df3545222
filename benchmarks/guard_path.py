"""What a guard takes from who writes, in a guest: outside of a backup, in the path, and while every chunk is logged.

fio writes 64 KiB to every place of a disk in memory, once, at random: by device-mapper as outside of a backup, to the
disk itself, through a guard that logs nothing, through one that logs each chunk before it is overwritten, and to the
origin of a snapshot of the kernel's, in chunks of the same size. The guest is emulated: compare, and take no figure for
that of a real host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from measure import MIB, Run

from blockferry.cluster import daemon
from blockferry.cluster import epoch as words
from blockferry.cluster.coordinator import Coordinator
from blockferry.cluster.epoch import Epoch, Stage
from blockferry.cluster.index import LogIndex
from blockferry.manager import log_index_named, plugin_manager
from cluster import NAME, Host, fio, wait_until

_SECTORS = 128
"""Of a chunk of 64 KiB."""


def main() -> None:
    """Boot a guest that measures, or be what it runs."""
    parser = measure.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="the size of the disk")
    parser.add_argument("--depth", type=int, default=32, help="how many writes fio has under way")
    options = parser.parse_args()
    if "BLOCKFERRY_VM" not in os.environ:
        vm = Path(__file__).parents[1] / "scripts" / "vm"
        path = os.environ.get("PYTHONPATH", "")
        inside = ["env", f"PYTHONPATH={path}", sys.executable, os.fspath(Path(__file__).resolve()), *sys.argv[1:]]
        sys.exit(subprocess.run([vm, "--", *inside], check=False).returncode)
    report = measure.Report("guard_path")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir="/dev/shm") as directory:
        root = Path(directory)
        measure.keep_at_home(root)
        host = Host("a", root / "a", f"sqlite://{root / 'index'}")
        with contextlib.closing(log_index_named(plugin_manager(), host.index)) as index:
            _measure(report, root, host, index, options)
    report.print_table()
    print(report.as_json())


def _measure(report: measure.Report, root: Path, host: Host, index: LogIndex, options: argparse.Namespace) -> None:
    disk = memory_disk(options.size)
    with host.guarding(disk) as device, kernels_snapshot(root, memory_disk(options.size)) as origin:
        os.environ |= host.environment()

        def leads(way: str) -> bool:
            return bool(daemon.ask(NAME, {"do": "status"})["path"] == way)

        def direct() -> Run:
            wait_until(lambda: leads("direct"))
            return fio(device, options)

        def guarded() -> Run:
            index.put(words.epoch_key(NAME), Epoch("idle", Stage.PREPARE, (host.name,)).as_json())
            wait_until(lambda: leads("guarded"))
            try:
                return fio(device, options)
            finally:
                index.remove(words.epoch_key(NAME))
                wait_until(lambda: leads("direct"))

        def logging() -> Run:
            coordinator = Coordinator(index, NAME, options.size * MIB, [host.name])
            try:
                coordinator.begin()
                coordinator.hold()
                coordinator.open()
                done = fio(device, options)
                coordinator.seal()
                return done
            finally:
                coordinator.end()

        contenders = {
            "outside of a backup": direct,
            "the disk itself": lambda: fio(disk, options),
            "in the path": guarded,
            "during a backup": logging,
            "the kernel's snapshot": lambda: fio(origin(), options),
        }
        report.add("fio, 64 KiB at random", measure.take_turns(contenders, options.rounds))
        words_of_guard = (host.home / "run" / "guard" / f"{NAME}.log").read_text()
        for way, loaded, waited in re.findall(
            r"leads to (\S+); loaded in (\S+) s, users waited for (\S+) s", words_of_guard
        ):
            measure.say(f"led to {way}: loaded in {loaded} s, exchanged in {waited} s")


def memory_disk(size: int) -> str:
    """Return a SCSI disk in the guest's memory, of so many MiB."""
    before = set(Path("/sys/block").iterdir())
    if not Path("/sys/module/scsi_debug").exists():
        setting = [f"dev_size_mb={size}", "delay=0", "per_host_store=1"]
        subprocess.run(["modprobe", "scsi_debug", *setting], check=True)
    else:
        Path("/sys/bus/pseudo/drivers/scsi_debug/add_host").write_text("1")
    found: list[str] = []
    wait_until(lambda: found.extend(each.name for each in set(Path("/sys/block").iterdir()) - before) or found)
    return f"/dev/{found[0]}"


@contextlib.contextmanager
def kernels_snapshot(root: Path, disk: str) -> Iterator[Callable[[], str]]:
    """Give a function that returns an origin of which no chunk is copied yet."""
    store = root / "store"
    size = int(Path("/sys/block", Path(disk).name, "size").read_text())
    loops: list[str] = []

    def remove() -> None:
        for name in ("bench-origin", "bench-snapshot"):
            subprocess.run(["dmsetup", "remove", "--retry", name], check=False, capture_output=True)
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop], check=True)
        loops.clear()

    def origin() -> str:
        remove()
        store.unlink(missing_ok=True)
        store.touch()
        os.truncate(store, size * 512 * 5 // 4)
        command = ["losetup", "--find", "--show", str(store)]
        loops.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        for name, table in (
            ("bench-snapshot", f"snapshot {disk} {loops[0]} P {_SECTORS}"),
            ("bench-origin", f"snapshot-origin {disk}"),
        ):
            subprocess.run(["dmsetup", "create", name, "--table", f"0 {size} {table}"], check=True)
        return "/dev/mapper/bench-origin"

    try:
        yield origin
    finally:
        remove()


if __name__ == "__main__":
    main()
