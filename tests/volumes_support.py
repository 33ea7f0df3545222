"""Filesystems that have been lived in, and copies of a volume's used blocks over noise."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path

from blockferry.extents import ExtentSet
from blockferry.hookspecs import UsedBlocks
from blockferry.volume import Volume

NOISE = random.Random(20).randbytes(1 << 20)


def run(*command: object, **options: object) -> str:
    """Run a tool and return what it prints; mkfs.xfs makes small filesystems only for its own tests."""
    small = {"TEST_DIR": "/", "TEST_DEV": "/", "QA_CHECK_FS": "/"}
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, env={**os.environ, **small}
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def make_image(path: Path, size: int) -> Path:
    """Make an empty sparse image."""
    with path.open("wb") as image:
        image.truncate(size)
    return path


def live_in(place: Path, seed: int, *, files: int = 400, largest: int = 40_000) -> None:
    """Write, delete, overwrite and extend files, so that free space is scattered."""
    chance = random.Random(seed)
    for number in range(files):
        directory = place / f"d{seed}-{number % 7}"
        directory.mkdir(exist_ok=True)
        (directory / f"f{number}").write_bytes(chance.randbytes(chance.randrange(1, largest)))
    present = sorted(path for path in place.rglob("f*") if path.is_file())
    for path in chance.sample(present, len(present) // 2):
        path.unlink()
    for path in chance.sample(sorted(place.rglob("f*")), len(present) // 8):
        with path.open("r+b") as file:
            file.seek(chance.randrange(largest))
            file.write(chance.randbytes(5000))


def fingerprint(place: Path) -> dict[str, str]:
    """Return what a filesystem holds: a digest of each file, the kind of everything else."""
    found = {}
    for path in sorted(place.rglob("*")):
        whole = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(place))] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else "directory"
    return found


def copy_used(volume: Volume, extents: ExtentSet, target: Path) -> Path:
    """Copy the extents of a volume into a file of noise: what a restore to a used disk leaves."""
    with target.open("wb") as noise:
        for _ in range(volume.size >> 20):
            noise.write(NOISE)
        noise.write(NOISE[: volume.size % (1 << 20)])
    with volume.open() as layer, target.open("r+b") as copy:
        for offset, piece in layer.stream(extents, 1 << 20):
            copy.seek(offset)
            copy.write(piece)
    return target


def ask(plugin: object, volume: Volume) -> tuple[UsedBlocks | None, list[str]]:
    """Return a reader's answer, and the reasons why it declined."""
    reasons: list[str] = []
    return plugin.blockferry_used_extents(volume, reasons.append), reasons  # type: ignore[attr-defined]
