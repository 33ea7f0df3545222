"""A hot restore against what the stock tools offer: extracting and then mounting, and their own mounts.

All read the same archive in the same repository. Reads of both kinds are past the page cache of whoever reads: 4 KiB at
random places that are in use, one at a time, and 1 MiB in sequence. The stock mounts do so from the image (borg), or
from the segments that it lies in (restic), which are files of 4 MiB.

`load` is what hydration takes from somebody who uses what is there already: fio reads at random, past the page cache,
from a region that was read before, in turns while all the rest is brought in and while nothing is. `memory` is the
resident memory of the processes behind the disk. `size` is how long it takes until the disk is there. The last two are
for sparse volumes of several sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measure
from hot_load import measure_load
from hot_memory import measure_memory
from hot_place import (
    IMAGE,
    INIT,
    Place,
    attached,
    make_volume,
    places_in_use,
    said_of,
    sparse_image,
    store,
    time_reads,
    to,
)
from measure import BLOCKFERRY, GIB, KIB, MIB, Run

PARTS = ("mounted", "random", "sequential", "hydrated", "load", "memory", "size")


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", choices=list(INIT), action="append", help="only this repository tool")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--size", type=float, default=4, metavar="GIB", help="the size of the volume, half in use")
    parser.add_argument("--reads", type=int, default=300, help="how many random reads")
    parser.add_argument("--seconds", type=int, default=10, help="how long fio reads")
    parser.add_argument("--load", type=float, default=6, metavar="GIB", help="what is in use of fio's volume")
    options = parser.parse_args()
    report = measure.Report("hot")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        root = Path(directory)
        measure.keep_at_home(root)
        for tool in options.tool or list(INIT):
            measure_tool(report, root, tool, options)
    measure.finish(report, as_json=options.json)


def measure_tool(report: measure.Report, root: Path, tool: str, options: argparse.Namespace) -> None:
    """Measure the parts with one tool."""
    parts = options.part or PARTS
    if set(parts) - {"load", "memory", "size"}:
        place = store(root, tool, make_volume(root, int(options.size * GIB)))
        extents = places_in_use(place.image)
        cases = {
            "mounted": (f"{tool}: until mounted, and then `ls -R`", mounting(place)),
            "random": (f"{tool}: 4 KiB at random", reading_at_random(place, extents, options.reads)),
            "sequential": (f"{tool}: in sequence", reading_in_sequence(place, extents)),
            "hydrated": (f"{tool}: until all is on the target", bringing_back(place)),
        }
        for name, (title, contenders) in cases.items():
            if name in parts:
                measure.say(title)
                report.add(title, measure.take_turns(contenders, options.rounds))
        place.remove()
    if "load" in parts:
        measure_load(report, root, tool, options)
    if "memory" in parts:
        measure_memory(report, root, tool, options)
    if "size" in parts:
        sizes(report, root, tool, options.rounds)


# -- contenders -------------------------------------------------------------------------------------------------------


def mounting(place: Place) -> dict[str, measure.Contender]:
    """Return what there is to do until files can be read."""

    def hot() -> Run:
        began = time.perf_counter()
        with attached(place) as device:
            return look_at(device, began, read_only=False)

    def extracted() -> Run:
        began = time.perf_counter()
        bring_back(place)
        done = look_at(str(place.target), began, read_only=False)
        place.target.unlink()
        return done

    def stock_mount() -> Run:
        began = time.perf_counter()
        with stock_mounted(place) as files:
            return look_at(str(files[0]), began, read_only=True)

    contenders = {"blockferry attach": hot, f"{place.tool} restore, then mount": extracted}
    return contenders | ({"borg mount, then mount": stock_mount} if place.tool == "borg" else {})


def look_at(device: str, began: float, *, read_only: bool) -> Run:
    """Mount a device, list all its files, and say what both took."""
    with tempfile.TemporaryDirectory() as point:
        options = ["-o", "ro,loop" if read_only else "loop" if not device.startswith("/dev/") else "rw"]
        subprocess.run(["mount", *options, device, point], check=True)
        ready = time.perf_counter() - began
        listed = measure.run(["ls", "-R", point], quiet=True)
        subprocess.run(["umount", point], check=True)
    return Run(ready, 0, 0, "", {"list_seconds": listed.wall_seconds})


def reading_at_random(place: Place, extents: list[tuple[int, int]], count: int) -> dict[str, measure.Contender]:
    """Return who reads single blocks."""
    chance = random.Random(1)
    offsets = [chance.choice(extents)[0] for _ in range(count)]

    def hot() -> Run:
        with attached(place) as device:
            return time_reads([(Path(device), offset) for offset in offsets], 4 * KIB)

    def stock_mount() -> Run:
        with stock_mounted(place) as files:
            return time_reads([located(files, offset) for offset in offsets], 4 * KIB)

    return {"blockferry attach": hot, f"{place.tool} mount": stock_mount}


def reading_in_sequence(place: Place, extents: list[tuple[int, int]]) -> dict[str, measure.Contender]:
    """Return who reads what is in use from its beginning."""
    offsets = sorted({offset // MIB * MIB for offset, _length in extents})[:1024]

    def hot() -> Run:
        with attached(place) as device:
            return time_reads([(Path(device), offset) for offset in offsets], MIB)

    def stock_mount() -> Run:
        with stock_mounted(place) as files:
            return time_reads([located(files, offset) for offset in offsets], MIB)

    return {"blockferry attach": hot, f"{place.tool} mount": stock_mount}


def bringing_back(place: Place) -> dict[str, measure.Contender]:
    """Return who writes all of a volume to a file."""

    def hot() -> Run:
        began = time.perf_counter()
        with attached(place):
            while not said_of("status", "target.img")["finished"]:
                time.sleep(0.1)
            return Run(time.perf_counter() - began, 0, 0, "")

    def restored() -> Run:
        return measure.run([BLOCKFERRY, "--quiet", "restore", place.snapshot, str(place.target), *to(place)])

    def stock() -> Run:
        began = time.perf_counter()
        bring_back(place)
        return Run(time.perf_counter() - began, 0, 0, "")

    return {
        "blockferry attach": forgetting(place, hot),
        f"{place.tool}'s own restore": forgetting(place, stock),
        "blockferry restore": forgetting(place, restored),
    }


def sizes(report: measure.Report, root: Path, tool: str, rounds: int) -> None:
    """Attach sparse volumes of several sizes."""
    for name in ("1GiB", "1TiB", "16TiB"):
        place = store(root, tool, sparse_image(root, name))

        def attach(place: Place = place) -> Run:
            began = time.perf_counter()
            with attached(place):
                return Run(time.perf_counter() - began, 0, 0, "")

        title = f"{tool}: until the disk is there, {name}"
        report.add(title, measure.take_turns({"blockferry attach": attach}, rounds))
        place.remove()


# -- what they have in common -----------------------------------------------------------------------------------------


def forgetting(place: Place, contender: measure.Contender) -> measure.Contender:
    """Remove the target after each run; write out before it what is dirty: everybody's costs are his own."""

    def run() -> Run:
        os.sync()
        try:
            return contender()
        finally:
            place.target.unlink(missing_ok=True)

    return run


def bring_back(place: Place) -> None:
    """Write the volume to the target with the stock tool alone."""
    if place.tool == "borg":
        with place.target.open("wb") as file:
            command = ["borg", "extract", "--stdout", f"{place.repository}::{place.archive}", IMAGE]
            subprocess.run(command, check=True, stdout=file)
        return
    with tempfile.TemporaryDirectory(dir=place.root) as directory:
        command = [
            "restic",
            "restore",
            "--quiet",
            "--repo",
            str(place.repository),
            place.archive,
            "--target",
            directory,
        ]
        subprocess.run(command, check=True)
        with place.target.open("wb") as file:
            file.truncate(place.image.stat().st_size)
            for segment in sorted(Path(directory, "volume").glob("*/*")):
                file.seek(int(segment.name, 16))
                with segment.open("rb") as content:
                    shutil.copyfileobj(content, file, 4 * MIB)


@contextlib.contextmanager
def stock_mounted(place: Place) -> Iterator[list[Path]]:
    """Mount the archive with the stock tool; give the files that hold the volume, the first alone if it is one."""
    with tempfile.TemporaryDirectory(dir=place.root) as directory:
        if place.tool == "borg":
            command = ["borg", "mount", "--foreground", f"{place.repository}::{place.archive}", directory]
            pattern = IMAGE
        else:
            command = ["restic", "mount", "--quiet", "--repo", str(place.repository), directory]
            pattern = f"ids/{place.archive[:8]}/volume/*/*"
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as mount:
            try:
                while not (files := sorted(Path(directory).glob(pattern))):
                    if mount.poll() is not None:
                        raise RuntimeError(f"{command[0]} mount ended with {mount.returncode}")
                    time.sleep(0.02)
                yield files
            finally:
                subprocess.run(["umount", "--lazy", directory], check=True)
                mount.wait()


def located(files: list[Path], offset: int) -> tuple[Path, int]:
    """Return the file that holds a byte of the volume, and where in it."""
    if len(files) == 1:
        return files[0], offset
    unit = 4 * MIB
    start = offset // unit * unit
    return files[0].parent.parent / f"{start // unit // 256:06x}" / f"{start:016x}", offset - start


if __name__ == "__main__":
    sys.exit(main())
