"""Real ext2, ext3 and ext4 images, what e2fsprogs says of them, and restores of their used blocks alone."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

from blockferry.extents import ExtentSet
from blockferry.used.ext4 import reader as ext4
from blockferry.volume import Volume

MIB = 1 << 20
PLAIN = "-t ext4 -b 1024 -g 1024 -O ^metadata_csum,^uninit_bg"
CHECKED = "-t ext4 -b 1024 -g 1024 -O metadata_csum"
_EXT4_IOC_SHUTDOWN = 0x8004587D
_SHUTDOWN_WITHOUT_FLUSH = 2


def run(*command: object, codes: Container[int] = (0,), env: dict[str, str] | None = None) -> str:
    """Run a tool of e2fsprogs or util-linux; an AssertionError with all that it said for any other exit code."""
    words = list(map(str, command))
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", check=False, env=os.environ | (env or {})
    )
    assert done.returncode in codes, f"{words}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def plant_tree(root: Path) -> Path:
    """Make files of every kind: empty, tiny, large, sparse, with holes, links, many in a directory, with attributes."""
    noise = random.Random(4)
    root.mkdir()
    for number in range(12):
        directory = root / f"directory {number}" / "below" / "further below"
        directory.mkdir(parents=True)
        for size in (0, 1, 59, 60, 150, 1000, 5000, 70_000):
            (directory / f"{size}").write_bytes(noise.randbytes(size))
    crowd = root / "crowd"
    crowd.mkdir()
    for number in range(400):
        (crowd / f"a rather long name so that the directory takes many blocks {number:04}").write_bytes(b"%d" % number)
    (root / "large").write_bytes(noise.randbytes(5 * MIB + 123))
    with open(root / "sparse", "wb") as sparse:
        for offset in range(0, 40 * MIB, 3 * MIB):
            sparse.seek(offset)
            sparse.write(noise.randbytes(5000))
        sparse.truncate(50 * MIB)
    (root / "short link").symlink_to("large")
    (root / "long link").symlink_to("x" * 900)
    os.link(root / "large", root / "second name")
    os.mkfifo(root / "fifo")
    for number, size in enumerate((10, 300, 700)):
        file = root / f"attributed {number}"
        file.write_bytes(b"content")
        os.setxattr(file, "user.note", noise.randbytes(size // 2).hex().encode())
    return root


def make_image(path: Path, options: str, size: int, tree: Path | None, *, blocks: str = "") -> Path:
    """Make an image of `size` bytes with mke2fs; `tree` is what it holds, `blocks` how many it may use."""
    with open(path, "wb") as image:
        image.truncate(size)
    content = ["-d", tree] if tree else []
    run("mke2fs", "-q", "-F", *options.split(), *content, path, *blocks.split())
    return path


def used(image: Path | str) -> ExtentSet:
    """Return what the hook answers."""
    reasons: list[str] = []
    answer = ext4.blockferry_used_extents(Volume.discover(image), reasons.append)
    assert answer is not None, reasons
    assert not reasons
    assert answer.method == "ext4 bitmaps"
    return answer.extents


def reason_declined(image: Path | str) -> str:
    """Return the one reason with which the hook declines."""
    reasons: list[str] = []
    assert ext4.blockferry_used_extents(Volume.discover(image), reasons.append) is None
    assert len(reasons) == 1, reasons
    return reasons[0]


def used_says_dumpe2fs(image: Path | str) -> ExtentSet:
    """Return what dumpe2fs does not list as free, from the first byte to the end of the filesystem."""
    # Before a replay, checksums of bitmaps may be wrong. dumpe2fs lists everything, and ends with an error's number.
    text = run("dumpe2fs", image, codes=range(256))
    assert "Free blocks: " in text

    def number(name: str) -> int:
        found = re.search(rf"^{name}: +(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    block_size, size = number("Block size"), number("Block count") * number("Block size")
    per_cluster = max(number("Cluster size") // block_size, 1)
    pairs = []
    for line in re.findall(r"^ +Free blocks: (.*)$", text, re.MULTILINE):
        for piece in filter(None, line.strip().split(", ")):
            first, _, last = piece.partition("-")
            # Of the last free cluster, dumpe2fs 1.47.0 names the first block, later ones the last.
            after = int(last or first) // per_cluster * per_cluster + per_cluster
            pairs.append((int(first) * block_size, (after - int(first)) * block_size))
    return ExtentSet.from_pairs(pairs).complement(size)


def assert_as_dumpe2fs(extents: ExtentSet, image: Path) -> None:
    """Assert that nothing that dumpe2fs calls used is missing, and at most 1 % more is there."""
    oracle = used_says_dumpe2fs(image)
    assert not oracle.difference(extents)
    # Behind the filesystem's end, all of the volume counts as used.
    more = extents.clip(0, filesystem_size(image)).difference(oracle)
    assert more.total <= oracle.total * 0.01 + 16 * 4096, (more, oracle)


def filesystem_size(image: Path) -> int:
    """Return the bytes of a filesystem, which may be fewer than its volume has."""
    count, size = (
        re.search(rf"^Block {name}: +(\d+)", run("dumpe2fs", "-h", image), re.MULTILINE) for name in ("count", "size")
    )
    assert count
    assert size
    return int(count[1]) * int(size[1])


def restore_used(image: Path, extents: ExtentSet, target: Path) -> Path:
    """Make a copy that has the used blocks, and noise everywhere else."""
    noise = random.Random(9).randbytes(MIB)
    size = image.stat().st_size
    with open(image, "rb") as source, open(target, "wb") as copy:
        for start, length in extents.complement(size):
            for offset in range(start, start + length, MIB):
                copy.seek(offset)
                copy.write(noise[: min(MIB, start + length - offset)])
        for start, length in extents:
            for offset in range(start, start + length, MIB):
                source.seek(offset)
                copy.seek(offset)
                copy.write(source.read(min(MIB, start + length - offset)))
        copy.truncate(size)
    return target


def tree_state(root: Path) -> dict[str, object]:
    """Return all that can be asked of every file below: kind, owner, times, attributes, content."""
    return dict(_entries(root))


def _entries(root: Path) -> Iterator[tuple[str, object]]:
    for directory, names, files in os.walk(root):
        for name in sorted([*names, *files, "."]):
            path = Path(directory) / name
            status = os.lstat(path)
            content = ""
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha1(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            numbers = status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_nlink, status.st_mtime_ns
            yield os.path.relpath(path, root), (*numbers, attributes, content)


def files_by_debugfs(image: Path, target: Path) -> dict[str, object]:
    """Return every file of an image that this kernel cannot mount, as debugfs brings it out."""
    target.mkdir()
    # debugfs copies no device, fifo or socket, and says so.
    run("debugfs", "-R", f"rdump / {target}", image)
    state = {
        str(path.relative_to(target)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
        for directory, names, files in os.walk(target)
        for path in (Path(directory, name) for name in [*names, *files])
    }
    shutil.rmtree(target)
    return state


def churn(root: Path, seed: int, rounds: int = 60) -> None:
    """Write, grow, punch and delete files at random, so that free space is in pieces."""
    noise = random.Random(seed)
    (root / "churn").mkdir(exist_ok=True)
    for _ in range(rounds):
        path = root / "churn" / str(noise.randrange(40))
        if path.exists() and noise.random() < 0.4:
            path.unlink()
        else:
            with open(path, "ab") as file:
                file.write(noise.randbytes(noise.choice((300, 4096, 20_000, 150_000))))
                if noise.random() < 0.3:
                    os.fsync(file.fileno())


def lose_power(root: Path, image: Path) -> Path:
    """Stop a mounted filesystem at once; return a copy of its image, with all that will ever have been written."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _SHUTDOWN_WITHOUT_FLUSH))
    finally:
        os.close(descriptor)
    # Unmounting would write the blocks that the journal has already, so that nothing were left to replay.
    return Path(shutil.copy(image, image.with_name("after the crash")))


def with_a_flipped_bit(file: BinaryIO, volume: Volume, offset: int, bit: int) -> tuple[ExtentSet | None, list[str]]:
    """Return the answer, and the reasons for none, while one bit of an image is wrong."""
    byte = os.pread(file.fileno(), 1, offset)
    os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit]), offset)
    reasons: list[str] = []
    answer = ext4.blockferry_used_extents(volume, reasons.append)
    os.pwrite(file.fileno(), byte, offset)
    assert answer is None or not reasons
    return answer and answer.extents, reasons
