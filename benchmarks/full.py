"""A first, full backup of a volume that has lived: blockferry, the stock tool on the volume, and the floor.

The volume is 30 % full, and its free space holds the random data of files that are gone. "Floor" is the stock tool
storing a plain file of just the bytes in use: no backup of them by that tool can take less. Every run stores into a new
repository. The stock tools are used as their documentation advises for disk images: `borg create --read-special` with
chunks of fixed size on a loop device, `restic backup` on the image file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
from measure import BLOCKFERRY, GIB, MIB, Contender, Run

SHARE_USED = 0.3
ENVIRONMENT = {"BORG_PASSPHRASE": "benchmark", "RESTIC_PASSWORD": "benchmark"}
FIXED_CHUNKS = "--chunker-params=fixed,4194304"


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments(__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=8, metavar="GIB", help="the size of the volume")
    parser.add_argument("--filesystem", choices=["ext4", "xfs"], default="ext4", help="what the volume holds")
    parser.add_argument("--tool", choices=["borg", "restic"], action="append", help="only this repository tool")
    options = parser.parse_args()
    report = measure.Report("full")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        place = Path(directory)
        os.environ |= ENVIRONMENT | {
            "BORG_BASE_DIR": str(place / "borg"),
            "RESTIC_CACHE_DIR": str(place / "restic"),
            "BLOCKFERRY_STATE_DIR": str(place / "state"),
        }
        # In a process of its own: listing files takes memory, and this one has to stay small.
        with concurrent.futures.ProcessPoolExecutor(1) as other_process:
            image = other_process.submit(make_volume, place, options).result()
        only_used = copy_used_bytes(image, place / "used.bytes")
        with measure.attached(image) as device:
            for tool in options.tool or ["borg", "restic"]:
                in_use = only_used.stat().st_size / GIB
                case = f"{tool}: {options.size:g} GiB {options.filesystem}, {in_use:.2f} GiB in use"
                repository = place / "repository"
                contenders = {"borg": of_borg, "restic": of_restic}[tool](repository, image, device, only_used)
                report.add(case, measure.take_turns(contenders, options.rounds))
    measure.finish(report, as_json=options.json)


# -- contenders -------------------------------------------------------------------------------------------------------


def of_borg(repository: Path, image: Path, device: str, only_used: Path) -> dict[str, Contender]:
    """Return what is compared with borg; ours first."""
    del image
    init = ["borg", "init", "--encryption=repokey-blake2", str(repository)]
    create = ["borg", "create", f"{repository}::archive"]
    return {
        "blockferry": lambda: measure.bytes_read_from(device, lambda: blockferry(init, f"borg:{repository}", device)),
        "borg create --read-special": lambda: measure.bytes_read_from(
            device, lambda: store(init, [*create, device, "--read-special", FIXED_CHUNKS], repository)
        ),
        "floor": lambda: store_file(init, [*create, str(only_used), FIXED_CHUNKS], repository, only_used),
    }


def of_restic(repository: Path, image: Path, device: str, only_used: Path) -> dict[str, Contender]:
    """Return what is compared with restic; ours first. restic stores no device's content: it gets the image file."""
    init = ["restic", "init", "--quiet", "--repo", str(repository)]
    backup = ["restic", "backup", "--quiet", "--repo", str(repository)]
    return {
        "blockferry": lambda: measure.bytes_read_from(device, lambda: blockferry(init, f"restic:{repository}", device)),
        "restic backup": lambda: store_file(init, [*backup, str(image)], repository, image),
        "floor": lambda: store_file(init, [*backup, str(only_used)], repository, only_used),
    }


def blockferry(init: Sequence[str], reference: str, device: str) -> Run:
    """Back the device up with blockferry."""
    repository = Path(reference.partition(":")[2])
    return store(init, [BLOCKFERRY, "--quiet", "backup", device, "--repo", reference, "--json"], repository)


def store_file(init: Sequence[str], command: Sequence[str], repository: Path, file: Path) -> Run:
    """Store a plain file, all of which is read, once."""
    done = store(init, command, repository)
    return dataclasses.replace(done, figures=done.figures | {"bytes_read": file.stat().st_size})


def store(init: Sequence[str], command: Sequence[str], repository: Path) -> Run:
    """Run a command that stores into a new repository, and add by how much that grew."""
    measure.run(init, quiet=True)
    try:
        before = measure.size_of_tree(repository)
        done = measure.run(command)
        stored = measure.size_of_tree(repository) - before
    finally:
        shutil.rmtree(repository)
    return dataclasses.replace(done, figures=done.figures | {"bytes_stored": stored})


# -- the volume -------------------------------------------------------------------------------------------------------


def make_volume(place: Path, options: argparse.Namespace) -> Path:
    """Make an image whose free space holds old random data, and its share of files of /usr and random ones."""
    size = int(options.size * GIB)
    image = place / "volume.img"
    measure.say(f"making a volume of {options.size:g} GiB")
    with image.open("wb") as file:
        file.truncate(size)
    make = {"ext4": ["mke2fs", "-q", "-F", "-t", "ext4"], "xfs": ["mkfs.xfs", "-q", "-f"]}[options.filesystem]
    subprocess.run([*make, str(image)], check=True)
    with measure.mounted(image, place / "mounted") as directory:
        fill_with_random_data(directory / "old", size)
        os.sync()
        (directory / "old").unlink()
        # What the filesystem needs for itself is in use, too.
        fill_with_files(directory, int(size * SHARE_USED) - in_use(directory, size))
    return image


def in_use(directory: Path, size: int) -> int:
    """Return the bytes in use on a mounted volume of that size."""
    facts = os.statvfs(directory)
    return size - facts.f_bfree * facts.f_frsize


def fill_with_random_data(path: Path, at_most: int) -> None:
    """Write random bytes until that many, or until the filesystem is full."""
    with path.open("wb", buffering=0) as file:
        try:
            for _ in range(at_most // MIB):
                file.write(os.urandom(MIB))
        except OSError:
            return  # full, as it should be


def fill_with_files(directory: Path, share: int) -> None:
    """Copy files of /usr, the same ones every time, up to two thirds of the share; the rest is random data."""
    paths = sorted(path for path in Path("/usr").rglob("*") if path.is_file() and not path.is_symlink())
    random.Random(1).shuffle(paths)
    copied = 0
    for path in paths:
        if copied >= share * 2 // 3:
            break
        target = directory / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied += path.stat().st_size
    fill_with_random_data(directory / "random", share - copied)


def copy_used_bytes(image: Path, target: Path) -> Path:
    """Write the bytes in use, one after the other, to a file."""
    said = json.loads(measure.run([BLOCKFERRY, "used", str(image), "--json"]).output)
    with image.open("rb") as source, target.open("wb") as copy:
        for start, length in said["extents"]:
            source.seek(start)
            left = length
            while left:
                left -= copy.write(source.read(min(left, 4 * MIB)))
    return target


if __name__ == "__main__":
    main()
