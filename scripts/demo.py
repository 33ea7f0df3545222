"""Back up, change, back up again and restore two real volumes with borg and with restic, and check every file.

What is shown beside each backup is the stock tool storing the same volume in a repository of its own, in the way that
its documentation has for disk images.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

MIB = 1 << 20
PROJECT = Path(__file__).parents[1]
BLOCKFERRY = str(Path(sys.executable).with_name("blockferry"))

CONTENT = ("/usr/share/doc", "/usr/lib/python3", "/usr/share/perl", "/usr/share/zoneinfo", str(PROJECT / ".venv/lib"))
"""What the volumes are filled with, as far as there is room; the last is always there."""

FILESYSTEMS = {
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4"], ["e2fsck", "-fn"]),
    "xfs": (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"]),
}
"""By the name of a filesystem: how it is made and how it is checked."""

console = Console(highlight=False)


class DemoError(Exception):
    """Something did not do what it should; the message says what."""


def main() -> None:
    """Run the demo in a directory of its own, which is gone afterwards whatever happens."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="the size of each volume (default: 1024)")
    parser.add_argument("--tool", choices=["borg", "restic"], action="append", help="only this repository tool")
    options = parser.parse_args()
    if options.size < 512:
        parser.error("volumes of less than 512 MiB are too small for what goes in")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with contextlib.ExitStack() as cleanup:
            place = Path(tempfile.mkdtemp(prefix="blockferry-demo-", dir=roomy_directory(4 * options.size * MIB)))
            cleanup.callback(shutil.rmtree, place)
            cleanup.callback(release, place)
            Demo(place, options.size * MIB, options.tool or ["borg", "restic"]).run()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; all that it made is removed")


@dataclasses.dataclass(frozen=True)
class Row:
    """One backup in the table that is printed; sizes in bytes."""

    by: str
    used: int | None
    read: int
    stored: int
    seconds: float


class Demo:
    """The volumes, the repositories, and the steps."""

    def __init__(self, place: Path, size: int, tools: list[str]) -> None:
        self.place, self.size = place, size
        self.tools = {name: TOOLS[name](place) for name in tools}

    def run(self) -> None:
        """Do everything; raise DemoError at the first thing that is wrong."""
        os.environ.update(environment_of_its_own(self.place))
        console.print(f"Making two volumes of {decimal(self.size)} in {self.place}, and repositories.", soft_wrap=True)
        for tool in self.tools.values():
            tool.make_repositories()
        volumes = {name: self.make_volume(name) for name in FILESYSTEMS}
        self.back_up(volumes, "First backup, through blockferry and by the tool alone")
        for image in volumes.values():
            with mounted(image, self.place, "rw") as directory:
                change(directory)
        console.print("\nNow some files are changed, some are gone, some are new.")
        self.back_up(volumes, "Second backup")
        console.print()
        for name, image in volumes.items():
            self.restore_and_compare(name, image)

    def make_volume(self, name: str) -> Path:
        """Make an image with a filesystem and files, and with old data where files were that are gone."""
        image = self.place / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(self.size)
        run(*FILESYSTEMS[name][0], str(image))
        with mounted(image, self.place, "rw") as directory:
            (directory / "removed").write_bytes(os.urandom(self.size // 4))
            os.sync()
            (directory / "removed").unlink()
            fill(directory, self.size // 4)
        return image

    def back_up(self, volumes: dict[str, Path], title: str) -> None:
        """Back each volume up with each tool, through blockferry and by the tool alone, and print what it took."""
        table = Table("volume", "by", title=title, title_justify="left")
        for heading in ("in use", "read", "stored", "seconds"):
            table.add_column(heading, justify="right")
        for name, image in volumes.items():
            for tool in self.tools.values():
                for row in (tool.back_up_through_blockferry(name, image), tool.back_up_alone(name, image)):
                    used = "" if row.used is None else decimal(row.used)
                    sizes = (used, decimal(row.read), decimal(row.stored))
                    table.add_row(name, row.by, *sizes, f"{row.seconds:.1f}")
        console.print()
        console.print(table)

    def restore_and_compare(self, name: str, image: Path) -> None:
        """Restore the newest snapshot from each tool; check the filesystem; compare every file."""
        with mounted(image, self.place, "ro") as directory:
            expected = describe_tree(directory)
        for tool in self.tools.values():
            target = self.place / f"{name}-from-{tool.name}.img"
            began = time.monotonic()
            blockferry("restore", tool.newest(name), str(target), "--repo", tool.reference)
            seconds = time.monotonic() - began
            run(*FILESYSTEMS[name][1], str(target))
            with mounted(target, self.place, "ro") as directory:
                compare_trees(expected, describe_tree(directory))
            target.unlink()
            console.print(
                f"{name} restored from {tool.name} in {seconds:.1f} s: {FILESYSTEMS[name][1][0]} finds it clean, "
                f"{len(expected)} files are equal in content and metadata",
                soft_wrap=True,
            )


# -- the tools --------------------------------------------------------------------------------------------------------


class Tool:
    """A repository tool with two repositories: one for blockferry, one for the tool alone."""

    name: str

    def __init__(self, place: Path) -> None:
        self.ours, self.stock = place / f"{self.name}-blockferry", place / f"{self.name}-stock"
        self.reference = f"{self.name}:{self.ours}"

    def make_repositories(self) -> None:
        """Make both, empty and encrypted."""
        raise NotImplementedError

    def store(self, name: str, image: Path) -> int:
        """Store an image by the tool alone; return the bytes that the tool says it read."""
        raise NotImplementedError

    def back_up_alone(self, name: str, image: Path) -> Row:
        """Store an image by the tool alone, and measure."""
        before, began = size_of_tree(self.stock), time.monotonic()
        read = self.store(name, image)
        seconds = time.monotonic() - began
        return Row(f"{self.name} alone", None, read, size_of_tree(self.stock) - before, seconds)

    def back_up_through_blockferry(self, name: str, image: Path) -> Row:
        """Back an image up with blockferry, and measure."""
        before, began = size_of_tree(self.ours), time.monotonic()
        result = blockferry("backup", str(image), "--name", name, "--repo", self.reference)
        seconds = time.monotonic() - began
        stored = size_of_tree(self.ours) - before
        return Row(f"blockferry, {self.name}", result["bytes_used"], result["bytes_read"], stored, seconds)

    def newest(self, name: str) -> str:
        """Return the id of the newest snapshot of a volume."""
        listed = blockferry("snapshots", "--repo", self.reference, "--volume", name)
        return str(listed["snapshots"][-1]["id"])


class Borg(Tool):
    """borg, with the chunks of fixed size that its documentation advises for disk images."""

    name = "borg"

    def make_repositories(self) -> None:
        """Make both, empty and encrypted."""
        for path in (self.ours, self.stock):
            run("borg", "init", "--encryption=repokey-blake2", str(path))

    def store(self, name: str, image: Path) -> int:
        """Run `borg create --read-special` on a loop device of the image."""
        options = ["--read-special", "--chunker-params=fixed,4194304", "--json"]
        with attached(image) as device:
            said = run("borg", "create", *options, f"{self.stock}::{name}-{secrets.token_hex(4)}", device)
        return int(json.loads(said)["archive"]["stats"]["original_size"])


class Restic(Tool):
    """restic, with its defaults."""

    name = "restic"

    def make_repositories(self) -> None:
        """Make both, empty and encrypted, as restic's always are."""
        for path in (self.ours, self.stock):
            run("restic", "init", "--quiet", "--repo", str(path))

    def store(self, name: str, image: Path) -> int:
        """Run `restic backup` on the image file."""
        said = run("restic", "backup", "--json", "--quiet", "--tag", name, "--repo", str(self.stock), str(image))
        return int(json.loads(said.splitlines()[-1])["total_bytes_processed"])


TOOLS: dict[str, Callable[[Path], Tool]] = {"borg": Borg, "restic": Restic}


def environment_of_its_own(place: Path) -> dict[str, str]:
    """Return what keeps the tools away from the user's repositories, keys, caches and state."""
    for name in list(os.environ):
        if name.startswith(("BORG_", "RESTIC_", "BLOCKFERRY_")):
            del os.environ[name]
    return {
        "BORG_BASE_DIR": str(place / "borg-home"),
        "BORG_PASSPHRASE": secrets.token_hex(16),
        "RESTIC_CACHE_DIR": str(place / "restic-cache"),
        "RESTIC_PASSWORD": secrets.token_hex(16),
        "BLOCKFERRY_STATE_DIR": str(place / "state"),
    }


def blockferry(*arguments: str) -> dict[str, Any]:
    """Run a command of blockferry's and return the JSON that it prints."""
    result: dict[str, Any] = json.loads(run(BLOCKFERRY, "--quiet", *arguments, "--json"))
    return result


def run(*command: str) -> str:
    """Run a command; return what it printed; raise DemoError, with what it said, if it failed."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said, complaint = process.communicate()
        except BaseException:
            process.terminate()  # and leaving the context waits: a tool unmounts and unlocks what it has in hand
            raise
    if process.returncode:
        raise DemoError(f"{' '.join(command)} failed with {process.returncode}:\n{(complaint or said).strip()}")
    return said


# -- volumes and files ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attached(image: Path) -> Iterator[str]:
    """Show an image as a read-only loop device."""
    device = run("losetup", "--find", "--show", "--read-only", str(image)).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(image: Path, place: Path, mode: str) -> Iterator[Path]:
    """Mount an image, `ro` or `rw`."""
    directory = place / "mounted"
    directory.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,{mode}", str(image), str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


def release(place: Path) -> None:
    """Unmount and detach what an interrupted step left in place."""
    if (place / "mounted").is_mount():
        run("umount", str(place / "mounted"))
    for loop in json.loads(run("losetup", "--list", "--json") or '{"loopdevices": []}')["loopdevices"]:
        if (loop["back-file"] or "").startswith(f"{place}/"):
            run("losetup", "--detach", loop["name"])


def fill(directory: Path, room: int) -> None:
    """Copy real files in, as far as there is room, and make one of each kind that is easily lost."""
    for source in filter(os.path.isdir, CONTENT):
        size = size_of_tree(Path(source))
        if size <= room:
            target = directory / "files" / Path(source).relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-a", source, str(target))
            room -= size
    odd = directory / "odd"
    odd.mkdir()
    (odd / "data").write_bytes(os.urandom(3 * MIB + 17))
    os.setxattr(odd / "data", "user.demo", b"an extended attribute")
    (odd / "hard-link").hardlink_to(odd / "data")
    (odd / "symbolic-link").symlink_to("data")
    (odd / "empty").touch(mode=0o4751)
    os.chown(odd / "empty", 12345, 54321)
    os.mkfifo(odd / "pipe")
    os.mknod(odd / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with (odd / "sparse").open("wb") as file:
        file.seek(64 * MIB)
        file.write(b"end")


def change(directory: Path) -> None:
    """Change a little of everything: new files, longer ones, removed ones, other attributes."""
    (directory / "new").write_bytes(os.urandom(8 * MIB))
    with (directory / "odd/data").open("ab") as file:
        file.write(b"more")
    (directory / "odd/hard-link").chmod(0o600)
    files = sorted(path for path in (directory / "files").rglob("*") if path.is_file() and not path.is_symlink())
    for path in files[::50]:
        path.unlink()
    for path in files[1::50]:
        with path.open("ab") as file:
            file.write(b"changed\n")


def describe_tree(directory: Path) -> dict[str, tuple[object, ...]]:
    """Return, for every path in a tree, all that a restore has to bring back of it."""
    described: dict[str, tuple[object, ...]] = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        facts = path.lstat()
        names = sorted(os.listxattr(path, follow_symlinks=False))
        described[str(path.relative_to(directory))] = (
            stat.filemode(facts.st_mode),
            facts.st_uid,
            facts.st_gid,
            facts.st_nlink,
            facts.st_ino,
            facts.st_size,
            facts.st_blocks,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
            facts.st_rdev if stat.S_ISCHR(facts.st_mode) else 0,
            [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names],
            content(path, facts.st_mode),
        )
    return described


def content(path: Path, mode: int) -> str:
    """Return what a file or symbolic link holds, a file's as its checksum."""
    if stat.S_ISLNK(mode):
        return str(path.readlink())
    if not stat.S_ISREG(mode):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_trees(expected: dict[str, tuple[object, ...]], found: dict[str, tuple[object, ...]]) -> None:
    """Raise DemoError, naming some, if any path differs."""
    differing = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    if differing:
        raise DemoError(f"{len(differing)} files are not as they were, among them {', '.join(differing[:5])}")


def size_of_tree(directory: Path) -> int:
    """Return the bytes of all regular files of a tree."""
    total = 0
    for parent, _directories, names in os.walk(directory):
        for name in names:
            facts = os.lstat(os.path.join(parent, name))
            total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return total


def roomy_directory(needed: int) -> str:
    """Return a directory for temporary files with that much room."""
    for place in (tempfile.gettempdir(), "/var/tmp"):  # noqa: S108 - mkdtemp makes a name of its own there
        if shutil.disk_usage(place).free >= needed:
            return place
    raise DemoError(f"no room: it takes {decimal(needed)} in {tempfile.gettempdir()}; set TMPDIR to another place")


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
