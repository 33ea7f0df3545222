"""Listing the blocks in use of large volumes: `blockferry used` beside the tools that know the same.

Each image is sparse, holds a fresh filesystem and 50,000 small files, and is kept for the next time, away from the
project's own tree: not everything that copies a tree knows holes.
A whole process is measured, Python's start included; `reader_seconds` is what the reader itself says it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import subprocess
from pathlib import Path

import measure
from measure import BLOCKFERRY, GIB, KIB, TIB, Contender, Run

SIZES = {"1TiB": TIB, "16TiB": 16 * TIB - GIB}
"""A file on ext4 ends a block short of 16 TiB (ext4(5)): the larger image stays below that."""

FILESYSTEMS = {"ext4": ["mke2fs", "-q", "-F", "-t", "ext4"], "xfs": ["mkfs.xfs", "-q", "-f"]}
FILES = 50_000
IMAGES = Path("/var/tmp/blockferry-benchmark-images")


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments(__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="only volumes of this size")
    parser.add_argument("--filesystem", choices=FILESYSTEMS, action="append", help="only this filesystem")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the images are kept")
    options = parser.parse_args()
    report = measure.Report("used")
    for size in options.size or SIZES:
        for filesystem in options.filesystem or FILESYSTEMS:
            image = make_image(options, filesystem, size)
            with measure.attached(image) as device:
                runs = measure.take_turns(contenders(filesystem, image, device), options.rounds)
            report.add(f"{filesystem}, {size}", runs)
    measure.finish(report, as_json=options.json)


def contenders(filesystem: str, image: Path, device: str) -> dict[str, Contender]:
    """Return what is compared for a filesystem; ours first."""
    domain, log = str(image.with_suffix(".domain")), str(image.with_suffix(".log"))
    partclone = [f"partclone.{filesystem}", "--domain", "--source", device, "--overwrite", domain, "--logfile", log]
    native = {"ext4": ["dumpe2fs", device], "xfs": ["xfs_db", "-r", "-c", "freesp", device]}[filesystem]
    commands = {
        "blockferry used --json": lambda: ours(device),
        f"{partclone[0]} --domain": lambda: measure.run(partclone, quiet=True),
        " ".join(native[:-1]): lambda: measure.run(native, quiet=True),
    }
    return {name: functools.partial(measure.bytes_read_from, device, command) for name, command in commands.items()}


def ours(device: str) -> Run:
    """List the extents of a volume."""
    done = measure.run([BLOCKFERRY, "used", device, "--json"])
    said = json.loads(done.output)
    if said["tier"] != "used":
        raise SystemExit(f"{device}: {said['tier_reason']}")
    return dataclasses.replace(
        done, figures={"reader_seconds": said["seconds"], "extents": len(said["extents"]), "in_use": said["used_bytes"]}
    )


def make_image(options: argparse.Namespace, filesystem: str, size: str) -> Path:
    """Return the image, made if it is not there."""
    image: Path = options.images / f"{filesystem}-{size}.img"
    if image.exists():
        return image
    measure.say(f"making {image}")
    image.parent.mkdir(parents=True, exist_ok=True)
    unfinished = image.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.truncate(SIZES[size])
    subprocess.run([*FILESYSTEMS[filesystem], str(unfinished)], check=True)
    with measure.mounted(unfinished, image.with_suffix(".mounted")) as directory:
        make_files(directory)
    unfinished.rename(image)
    return image


def make_files(directory: Path) -> None:
    """Make files of 1 to 16 KiB, and remove one in ten, so that free space is not in one piece."""
    chosen = random.Random(1)
    for number in range(FILES * 10 // 9):
        parent = directory / f"{number // 500:03}"
        parent.mkdir(exist_ok=True)
        (parent / str(number)).write_bytes(bytes([number % 256]) * chosen.randrange(KIB, 16 * KIB))
    for number in range(0, FILES * 10 // 9, 10):
        (directory / f"{number // 500:03}" / str(number)).unlink()


if __name__ == "__main__":
    main()
