"""Filesystems that share blocks, images on them, and a third party's plugin that does whatever harm a test asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockferry.changed import reflink
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, Checkpoint
from blockferry.volume import Volume
from blockferry_restic.format import File, RepositoryReader
from commands_support import PASSPHRASE, Depot, command, run
from conftest import _unmount

MIB = 1 << 20
BLOCK = 4096
"""The block of XFS and the sector of btrfs as they are made here."""

MISCHIEF = """
import os, signal, time
from blockferry.changed import reflink
from blockferry.extents import ExtentSet
from blockferry.hookspecs import ChangedBlocks, hookimpl

if "CLOCK" in os.environ:  # of this process alone
    import blockferry.backup, datetime
    shift, clock = float(os.environ["CLOCK"]), time.time
    time.time = lambda: clock() + shift
    blockferry.backup.now = lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC).isoformat()


@hookimpl
def blockferry_freeze(volume):
    if "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if "WAIT" in os.environ:
        open(os.environ["WAIT"] + ".here", "w").close()
        while not os.path.exists(os.environ["WAIT"]):
            time.sleep(0.02)


@hookimpl
def blockferry_changed_extents(volume, still, since, declined):
    if "LIE" not in os.environ:
        return None
    start, length = map(int, os.environ["LIE"].split())
    honest = reflink.blockferry_changed_extents(volume, still, since, declined)
    return ChangedBlocks(honest.extents.difference(ExtentSet.from_pairs([(start, length)])), "a liar")
"""


def install_mischief(directory: Path) -> dict[str, str]:
    """Lay a plugin out as pip does; return the environment in which blockferry finds it."""
    facts = directory / "mischief-1.0.dist-info"
    facts.mkdir(parents=True)
    (directory / "mischief.py").write_text(MISCHIEF)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mischief\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[blockferry]\nmischief = mischief\n")
    return {"PYTHONPATH": str(directory)}


@contextlib.contextmanager
def filesystem(kind: str, directory: Path, *options: str, size: int = 400 * MIB) -> Iterator[Path]:
    """Make a filesystem on a sparse image, and mount it."""
    image, place = directory / f"{kind}.store", directory / f"{kind}-mounted"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", "-q", *(["-m", "reflink=1"] if kind == "xfs" else []), image)
    run("mount", *(["-o", ",".join(options)] if options else []), image, place)
    try:
        yield place
    finally:
        _unmount(place)
        image.unlink()


def write(image: Path, offset: int, data: bytes) -> None:
    """Write into an image, as a program does: nothing is synchronized."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def differing(before: bytes, after: bytes) -> ExtentSet:
    """Return the blocks in which two images of one size differ."""
    one, other = (np.frombuffer(each, np.uint64).reshape(-1, BLOCK // 8) for each in (before, after))
    return ExtentSet.from_bits((one != other).any(axis=1), BLOCK)


@dataclasses.dataclass(frozen=True)
class Tracked:
    """An image, and the reflink tracker asked about it through its hooks."""

    path: Path

    @property
    def volume(self) -> Volume:
        return Volume.discover(self.path)

    def checkpoint(self, snapshot: str = "0123456789ab") -> Checkpoint:
        reasons: list[str] = []
        made = reflink.blockferry_checkpoint(self.volume, snapshot, "", reasons.append)
        assert made is not None, reasons
        assert reasons == []
        return made

    def changed(self, since: Checkpoint, still: Volume | None = None) -> ExtentSet:
        answer, reasons = self.ask(since, still)
        assert answer is not None, reasons
        assert reasons == []
        assert answer.extents.end <= self.volume.size
        return answer.extents

    def declined(self, since: Checkpoint) -> str:
        """Assert that the tracker does not know what changed; return the reason."""
        answer, reasons = self.ask(since, None)
        assert answer is None
        (reason,) = reasons
        return reason

    def ask(self, since: Checkpoint, still: Volume | None) -> tuple[ChangedBlocks | None, list[str]]:
        reasons: list[str] = []
        volume = self.volume
        return reflink.blockferry_changed_extents(volume, still or volume, since, reasons.append), reasons


@dataclasses.dataclass
class Job:
    """An ext4 image with one large file, on a filesystem that shares blocks, and the repository it is backed up to."""

    depot: Depot
    image: Path
    state: Path
    mischief: dict[str, str]
    file_size: int = 8 * MIB
    counter: int = 0

    def __post_init__(self) -> None:
        self.make(self.image)
        self.place = self.image.read_bytes().index(self.content[:BLOCK])

    def make(self, image: Path, *options: str, seed: int = 1) -> None:
        """Make an ext4 image of 24 MiB, most of it one file."""
        tree = self.state.parent / f"tree-{seed}"
        tree.mkdir(exist_ok=True)
        self.content = random.Random(seed).randbytes(self.file_size)
        (tree / "file").write_bytes(self.content)
        run("truncate", "-s", "24M", image)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", tree, *options, image)
        shutil.rmtree(tree)

    def write(self, *, at: int = 3 * MIB, length: int = 10_000) -> None:
        """Overwrite some of the file."""
        self.counter += 1
        write(self.image, self.place + at, random.Random(self.counter + 100).randbytes(length))

    def ferry(self, *words: object, depot: Depot | None = None, **env: str) -> Any:
        return (depot or self.depot).ferry(*words, BLOCKFERRY_STATE_DIR=str(self.state), **(self.mischief | env))

    def backup(self, *options: object, depot: Depot | None = None, **env: str) -> dict[str, Any]:
        """Back the image up, and return what `--json` prints."""
        done: dict[str, Any] = self.ferry("backup", self.image, "--json", *options, depot=depot, **env).json()
        assert done["tier"] == "changed" or done["tier_reason"]
        return done

    def start(self, *options: object, **env: str) -> subprocess.Popen[str]:
        """Begin a backup."""
        return subprocess.Popen(
            command("backup", self.image, "--repo", self.depot.reference, "--json", *options),
            env=os.environ | self.depot.env | self.mischief | {"BLOCKFERRY_STATE_DIR": str(self.state)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def assert_right(self, snapshot: str = "latest", depot: Depot | None = None) -> None:
        """Assert that a snapshot is what the image is now."""
        done = self.ferry("verify", snapshot, "--against", self.image, depot=depot)
        assert done.code == 0, done.err

    def copies(self) -> set[str]:
        """Return the snapshots of which a reflink copy lies beside the image."""
        return {path.name.rpartition("-")[2] for path in self.image.parent.glob(f".{self.image.name}.blockferry-*")}

    def copy_of(self, snapshot: str) -> Path:
        return self.image.with_name(f".{self.image.name}.blockferry-{snapshot}")

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    def checkpoint_of(self, snapshot: str) -> Path:
        return self.checkpoints / f"{snapshot}.reflink.json"


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pack_of_a_segment(depot: Depot, archive: str) -> Path:
    """Return a pack of a restic repository that holds data of the image and none of the small files beside it."""
    reader = RepositoryReader(depot.path, PASSPHRASE)
    index = reader.index()
    root = reader.root(index, archive)
    segments = reader.tree(index, reader.tree(index, root.directories["volume"]).directories["000000"])

    def packs(files: Iterable[File]) -> set[str]:
        return {index.place(row)[0] for file in files for row in reader.locate(index, file.content).tolist()}

    name = min(packs(segments.files.values()) - packs(root.files.values()))
    return depot.path / "data" / name[:2] / name
