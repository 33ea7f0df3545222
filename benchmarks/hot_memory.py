"""The resident memory of the processes behind a hot restore's disk, for volumes of several sizes."""

from __future__ import annotations

import argparse
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from hot_place import Place, attached, make_volume, places_in_use, said_of, sparse_image, store, time_reads
from measure import GIB, KIB, Run

_OFTEN = 0.02
"""Seconds between two looks."""


def measure_memory(report: measure.Report, root: Path, tool: str, options: argparse.Namespace) -> None:
    """Look at the memory after `attach`, while blocks are read at random, and while all is brought in."""
    for name in ("2GiB", "1TiB", "16TiB"):
        image = make_volume(root, 2 * GIB) if name == "2GiB" else sparse_image(root, name)
        place = store(root, tool, image)
        title = f"{tool}: memory, {name}"
        measure.say(title)
        report.add(title, measure.take_turns(contenders(place, options), options.rounds))
        place.remove()


def contenders(place: Place, options: argparse.Namespace) -> dict[str, measure.Contender]:
    """Return what is done with the disk while its processes are looked at."""
    chance = random.Random(1)
    extents = places_in_use(place.image)
    offsets = [chance.choice(extents)[0] for _ in range(options.reads)]

    def read(device: str) -> None:
        time_reads([(Path(device), offset) for offset in offsets], 4 * KIB)

    def hydrate(_device: str) -> None:
        deadline = time.monotonic() + options.seconds
        while not said_of("status", "target.img")["finished"] and time.monotonic() < deadline:
            time.sleep(0.1)

    return {
        "it is brought in": lambda: looked_at(place, hydrate),
        "4 KiB at random": lambda: looked_at(place, read, "--rate", "0"),
        "attached": lambda: looked_at(place, lambda _device: None, "--rate", "0"),
    }


def looked_at(place: Place, use: Callable[[str], None], *options: str) -> Run:
    """Attach, use the disk, and return what its processes needed in memory meanwhile."""
    began = time.perf_counter()
    with attached(place, *options) as device:
        process = int(str(said_of("status", "target.img")["process"]))
        with looking(process) as peaks:
            use(device)
        single = {number: peak_of(number) for number in family(process)}
        figures = {
            "processes": float(len(single)),
            "all_peak": float(peaks[-1]),
            "first_peak": float(single.pop(process)),
            "others_largest_peak": float(max(single.values(), default=0)),
        }
    return Run(time.perf_counter() - began, 0, 0, "", figures)


@contextlib.contextmanager
def looking(process: int) -> Iterator[list[int]]:
    """Sum the resident memory of a process and its descendants, again and again; give the peaks, the highest last."""
    peaks = [0]
    enough = threading.Event()

    def look() -> None:
        while True:
            peaks.append(max(peaks[-1], sum(memory_of(number, "VmRSS") for number in family(process))))
            if enough.wait(_OFTEN):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        enough.set()
        thread.join()


def family(process: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # proc_pid_stat(5): the name, in parentheses, may hold anything; then the state and the parent.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for number in found:
        found += children.get(number, [])
    return found


def peak_of(process: int) -> int:
    """Return the most that a process ever had resident, in bytes."""
    return memory_of(process, "VmHWM")


def memory_of(process: int, name: str) -> int:
    """Return a size that proc_pid_status(5) names, in bytes; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * KIB
    return 0
