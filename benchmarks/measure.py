"""Running commands as processes and saying what they took: time, CPU, memory, bytes.

A figure is worth something only beside another of the same minute: contenders run in turns, A B A B, and what counts is
the ratio of medians. This process stays small on purpose: Linux counts a parent's memory at the fork towards the
child's peak, so the peak of a very small program reads as ours.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
RESULTS = Path(__file__).parent / "results"
BLOCKFERRY = str(Path(sys.executable).with_name("blockferry"))


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of a command took. `figures` is what the benchmark adds, such as bytes read and stored."""

    wall_seconds: float
    cpu_seconds: float
    """User and system, of the process and its children."""
    peak_memory: int
    """Resident bytes of the largest process of the tree."""
    output: str = dataclasses.field(repr=False)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return everything that can be compared."""
        return {
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_memory": self.peak_memory,
            **self.figures,
        }


Contender = Callable[[], Run]


def run(command: Sequence[str], *, quiet: bool = False) -> Run:
    """Run a command to its end; raise CalledProcessError if it fails.

    `quiet` is for output that is large and of no interest: it goes to /dev/null.
    """
    stdout, stderr = (subprocess.DEVNULL, subprocess.DEVNULL) if quiet else (subprocess.PIPE, None)
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True) as process:
        output = process.stdout.read() if process.stdout else ""
        # wait4 counts what the process itself waited for, and so the whole tree.
        _pid, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * KIB, output)


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Run]]:
    """Run every contender once a round, in the order given; return the runs by name."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            say(f"round {number + 1} of {rounds}: {name}")
            runs[name].append(contender())
    return runs


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return min, median and max of every number of some runs of one command."""
    numbers = [each.numbers() for each in runs]
    return {
        name: {
            "min": min(each[name] for each in numbers),
            "median": statistics.median(each[name] for each in numbers),
            "max": max(each[name] for each in numbers),
        }
        for name in numbers[0]
    }


@dataclasses.dataclass
class Report:
    """All cases of one benchmark. In each case the first contender is ours; the others are compared with it."""

    benchmark: str
    cases: dict[str, dict[str, dict[str, dict[str, float]]]] = dataclasses.field(default_factory=dict)

    def add(self, case: str, runs: Mapping[str, Sequence[Run]]) -> None:
        """Add the runs of a case, by the contenders' names."""
        self.cases[case] = {name: summarize(each) for name, each in runs.items()}

    def as_json(self) -> str:
        """Return everything, with the machine and the ratios of medians (another's to ours: above 1 ours is less)."""
        return json.dumps(
            {"benchmark": self.benchmark, "machine": machine(), "cases": self.cases, "ratios": self.ratios()}, indent=1
        )

    def ratios(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return, by case and other contender, its median to ours, of each number that both have."""
        return {
            case: {
                name: {
                    number: round(summary[number]["median"] / ours[number]["median"], 2)
                    for number in summary
                    if number in ours and ours[number]["median"]
                }
                for name, summary in list(contenders.items())[1:]
            }
            for case, contenders in self.cases.items()
            for ours in [next(iter(contenders.values()))]
        }

    def print_table(self) -> None:
        """Print medians, with the range of the wall time, for people."""
        from rich.console import Console  # noqa: PLC0415 - only now: see above on memory
        from rich.table import Table  # noqa: PLC0415

        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        for case, contenders in self.cases.items():
            numbers = list(dict.fromkeys(number for summary in contenders.values() for number in summary))
            table = Table("", *(number.replace("_", " ") for number in numbers), title=case, title_justify="left")
            for name, summary in contenders.items():
                table.add_row(name, *(_shown(number, summary.get(number)) for number in numbers))
            console.print(table)
        console.print("medians; (range); " + ", ".join(f"{name} {value}" for name, value in machine().items()))


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GIB:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def keep_at_home(root: Path) -> None:
    """Have the tools, and blockferry, keep their keys, caches and state below a directory."""
    os.environ |= {
        "BORG_PASSPHRASE": "benchmark",
        "RESTIC_PASSWORD": "benchmark",
        "BORG_BASE_DIR": str(root / "borg-home"),
        "RESTIC_CACHE_DIR": str(root / "restic-home"),
        "BLOCKFERRY_STATE_DIR": str(root / "state"),
    }


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount an image for writing."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


@contextlib.contextmanager
def attached(image: Path) -> Iterator[str]:
    """Show an image as a read-only loop device."""
    command = ["losetup", "--find", "--show", "--read-only", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def bytes_read_from(device: str, contender: Contender) -> Run:
    """Run a contender and add what was read from the device meanwhile, past its own cache, as the kernel counts it."""
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    before = _sectors_read(device)
    done = contender()
    read = (_sectors_read(device) - before) * 512  # Documentation/block/stat.rst: always sectors of 512 bytes
    return dataclasses.replace(done, figures=done.figures | {"bytes_read": read})


def size_of_tree(directory: Path) -> int:
    """Return the bytes of all files of a tree."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rounds", type=int, default=3, help="how often every command runs")
    return parser


def finish(report: Report, *, as_json: bool) -> None:
    """Print a report, and keep it under results/ as JSON."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{report.benchmark}.json").write_text(report.as_json() + "\n")
    if as_json:
        print(report.as_json())
    else:
        report.print_table()


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def _sectors_read(device: str) -> int:
    return int((Path("/sys/class/block") / Path(device).name / "stat").read_text().split()[2])


def _shown(number: str, summary: dict[str, float] | None) -> str:
    if summary is None:
        return ""
    median = summary["median"]
    if number.endswith("seconds"):
        digits = 3 if median < 1 else 1
        return f"{median:.{digits}f} ({summary['min']:.{digits}f}-{summary['max']:.{digits}f})"
    if number == "extents":
        return f"{median:.0f}"
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if median >= pair[1]), ("B", 1))
    return f"{median / size:.1f} {unit}"
