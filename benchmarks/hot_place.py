"""A volume in a repository, and its hot restore: what the parts of the benchmark `hot` have in common."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import measure
from full import fill_with_files, fill_with_random_data, in_use
from measure import BLOCKFERRY, GIB, KIB, MIB, TIB, Run

import used

IMAGE = "volume.img"
INIT = {
    "borg": ["borg", "init", "--encryption=repokey-blake2"],
    "restic": ["restic", "init", "--quiet", "--repo"],
}


@dataclasses.dataclass
class Place:
    """A volume, and the repository that it is in."""

    root: Path
    tool: str
    image: Path
    archive: str
    snapshot: str

    @property
    def repository(self) -> Path:
        return self.root / f"{self.tool}-repository"

    @property
    def reference(self) -> str:
        return f"{self.tool}:{self.repository}"

    @property
    def target(self) -> Path:
        return self.root / "target.img"

    def remove(self) -> None:
        """Remove both."""
        shutil.rmtree(self.repository)
        self.image.unlink()


@contextlib.contextmanager
def attached(place: Place, *options: str) -> Iterator[str]:
    """Attach the snapshot to a new file; give the device, and remove it all."""
    command = [BLOCKFERRY, "attach", place.snapshot, str(place.target), *to(place), "--json", *options]
    said = json.loads(measure.run(command).output)
    try:
        yield said["device"]
    finally:
        measure.run([BLOCKFERRY, "detach", "target.img", "--force", "--forget"], quiet=True)
        place.target.unlink(missing_ok=True)


def to(place: Place) -> list[str]:
    return ["--repo", place.reference]


def said_of(*command: str) -> dict[str, object]:
    return dict(json.loads(measure.run([BLOCKFERRY, *command, "--json"]).output))


def time_reads(places: list[tuple[Path, int]], length: int) -> Run:
    """Read so many bytes at each place, one after the other, past our own page cache; return latencies and the rate."""
    os.sync()  # what others left dirty is theirs
    buffer = mmap.mmap(-1, length)
    took, total = [], 0
    began = time.perf_counter()
    for path, several in itertools.groupby(places, lambda place: place[0]):
        flags = os.O_RDONLY | (os.O_DIRECT if str(path).startswith("/dev/") else 0)
        before = time.perf_counter()
        descriptor = os.open(path, flags)
        for _path, offset in several:
            total += os.preadv(descriptor, [buffer], offset)
            took.append(time.perf_counter() - before)
            before = time.perf_counter()
        os.close(descriptor)
    wall = time.perf_counter() - began
    took.sort()
    figures = {
        "p50_seconds": statistics.median(took),
        "p99_seconds": took[int(len(took) * 0.99)],
        "bytes_a_second": total / wall,
    }
    return Run(wall, 0, 0, "", figures)


# -- volumes ----------------------------------------------------------------------------------------------------------


def make_volume(root: Path, size: int) -> Path:
    """Make an ext4 image, half of it in use by files of /usr and random data."""
    measure.say(f"making a volume of {size / GIB:g} GiB")
    with _new_image(root, size) as directory:
        fill_with_files(directory, size // 2 - in_use(directory, size))
    return root / IMAGE


def make_random_volume(root: Path, count: int) -> Path:
    """Make an ext4 image with so many random bytes in it."""
    measure.say(f"making a volume with {count / GIB:g} GiB of random data")
    with _new_image(root, count + count // 8) as directory:
        fill_with_random_data(directory / "random", count)
    return root / IMAGE


def sparse_image(root: Path, name: str) -> Path:
    """Make a sparse image: 50,000 files on 1 TiB, nothing on 16 TiB and on 1 GiB."""
    if name == "1TiB":
        return used.make_image(argparse.Namespace(images=root), "ext4", name)
    image = root / "empty.img"
    with image.open("wb") as file:
        file.truncate({"1GiB": GIB, "16TiB": 16 * TIB - 4 * KIB}[name])
    subprocess.run(["mkfs.xfs", "-q", "-f", str(image)], check=True)
    return image


@contextlib.contextmanager
def _new_image(root: Path, size: int) -> Iterator[Path]:
    """Make an empty ext4 image, and mount it to be filled."""
    image = root / IMAGE
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)
    with measure.mounted(image, root / "mounted") as directory:
        yield directory


def store(root: Path, tool: str, image: Path) -> Place:
    """Store the image in a new repository."""
    place = Place(root, tool, image, "", "")
    measure.run([*INIT[tool], str(place.repository)], quiet=True)
    said = json.loads(measure.run([BLOCKFERRY, "--quiet", "backup", str(image), *to(place), "--json"]).output)
    return dataclasses.replace(place, archive=said["archive"], snapshot=said["snapshot"])


def places_in_use(image: Path) -> list[tuple[int, int]]:
    """Return the extents in use, cut to pieces of at most 1 MiB."""
    said = json.loads(measure.run([BLOCKFERRY, "used", str(image), "--json"]).output)
    return [
        (offset, min(MIB, start + length - offset))
        for start, length in said["extents"]
        for offset in range(start, start + length, MIB)
    ]
