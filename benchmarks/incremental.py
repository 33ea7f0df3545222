"""A further backup, after a little has changed: blockferry, the stock tool on the whole volume, and the floor.

The volume is an image file, half of it in use, on an XFS filesystem, where the reflink tracker finds what changed.
"Job" is the stock tool's own job, for which `export` shows the volume as segments. "Floor" is the stock tool storing a
file of just the changed bytes: no backup of them by that tool can take less. All of one round back up the same change,
each into its own repository, which holds the state before it. The stock tools take long and much the same each time:
they run once a case.

`size` makes the same change on volumes of 4, 16 and 64 GiB, whose other files are allocated and never written, and
`nothing` makes none on one of 1 TiB with 50,000 files: there only blockferry runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure
from measure import BLOCKFERRY, GIB, KIB, MIB, TIB, Run

import used

CHANGES = {  # bytes that change, in pieces of
    "1 % in one place": (0.01, 0),
    "1 % in pieces of 1 MiB": (0.01, MIB),
    "0.01 % in one place": (0.0001, 0),
    "0.01 % in single blocks": (0.0001, 4 * KIB),
}
PARTS = ("change", "size", "nothing")
INIT = {
    "borg": ["borg", "init", "--encryption=repokey-blake2"],
    "restic": ["restic", "init", "--quiet", "--repo"],
}


@dataclasses.dataclass
class Place:
    """Where everything lies, and the volume that is backed up."""

    root: Path
    tool: str
    image: Path
    """On a filesystem that shares blocks."""
    mount: Path
    size: int

    @property
    def reference(self) -> str:
        """The repository that blockferry stores into."""
        return f"{self.tool}:{self.repository('blockferry')}"

    def repository(self, name: str) -> Path:
        """Return a contender's repository, made if it is not there."""
        path = self.root / f"{self.tool}-{name}"
        if not path.exists():
            measure.run([*INIT[self.tool], str(path)], quiet=True)
        return path


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", choices=list(INIT), action="append", help="only this repository tool")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--size", type=int, default=16, metavar="GIB", help="the size of the volume of `change`")
    options = parser.parse_args()
    report = measure.Report("incremental")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        root = Path(directory)
        measure.keep_at_home(root)
        host = root / "host.img"
        with host.open("wb") as file:
            file.truncate(2 * TIB)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(host)], check=True)
        with measure.mounted(host, root / "host") as shared:
            for tool in options.tool or list(INIT):
                parts = options.part or PARTS
                if "change" in parts:
                    changes(report, root, shared, tool, options)
                if "size" in parts:
                    sizes(report, root, shared, tool, options)
                if "nothing" in parts:
                    nothing(report, root, shared, tool, options)
    measure.finish(report, as_json=options.json)


def changes(report: measure.Report, root: Path, shared: Path, tool: str, options: argparse.Namespace) -> None:
    """Compare the contenders after changes of several kinds."""
    with volume(root, shared, tool, options.size * GIB, written=1.0) as place:
        back_up(place)
        job(place)
        stock(place)
        for kind, (share, piece) in CHANGES.items():
            runs: dict[str, list[Run]] = {}
            for number in range(options.rounds):
                measure.say(f"{tool}, {kind}: round {number + 1} of {options.rounds}")
                changed = change(place, int(share * place.size / 2), piece)
                runs.setdefault("blockferry", []).append(back_up(place))
                runs.setdefault("job", []).append(job(place))
                if number == 0:
                    runs["stock"] = [stock(place)]
                runs.setdefault("floor", []).append(floor(place, changed))
            report.add(f"{tool}, {options.size} GiB half in use: {kind}", runs)


def sizes(report: measure.Report, root: Path, shared: Path, tool: str, options: argparse.Namespace) -> None:
    """Make the same change on volumes of several sizes."""
    runs = {}
    for size in (4, 16, 64):
        with volume(root, shared, tool, size * GIB, written=0.2 * 4 / size) as place:
            back_up(place)
            name = f"{size} GiB"
            runs[name] = []
            for number in range(options.rounds):
                measure.say(f"{tool}, {name}: round {number + 1} of {options.rounds}")
                change(place, 80 * MIB, MIB)
                runs[name].append(back_up(place))
    report.add(f"{tool}: 80 MiB changed, by the volume's size", runs)


def nothing(report: measure.Report, root: Path, shared: Path, tool: str, options: argparse.Namespace) -> None:
    """Change nothing on a large volume."""
    image = used.make_image(argparse.Namespace(images=shared), "ext4", "1TiB")
    place = Place(root, tool, image, root / "volume", TIB)
    back_up(place)
    runs = []
    for number in range(options.rounds):
        measure.say(f"{tool}, nothing changed: round {number + 1} of {options.rounds}")
        runs.append(back_up(place))
    report.add(f"{tool}: 1 TiB, 50,000 files, nothing changed", {"blockferry": runs})
    remove(place)


# -- contenders -------------------------------------------------------------------------------------------------------


def back_up(place: Place) -> Run:
    """Back the volume up with blockferry."""
    done = measure.run([BLOCKFERRY, "--quiet", "backup", str(place.image), "--repo", place.reference, "--json"])
    said = json.loads(done.output)
    figures = {name: said[name] for name in ("bytes_changed", "bytes_read", "bytes_compared", "bytes_stored")}
    return dataclasses.replace(done, figures=figures)


def job(place: Place) -> Run:
    """Have the stock tool store what an export shows, as a job of its users does."""
    repository = place.repository("job")
    before = measure.size_of_tree(repository)
    shown = place.root / "export"
    stock = {
        "borg": ["borg", "create", f"{repository}::{random.randrange(1 << 40)}", str(shown)],
        "restic": ["restic", "backup", "--quiet", "--repo", str(repository), str(shown)],
    }[place.tool]
    export, store, release = map(
        shlex.join,
        (
            [BLOCKFERRY, "--quiet", "export", str(place.image), "--at", str(shown)],
            stock,
            [BLOCKFERRY, "release", "--at", str(shown), "--json"],
        ),
    )
    done = measure.run(["sh", "-ec", f"{export} >/dev/null; {store}; {release}"])
    (released,) = json.loads(done.output)["released"]
    stored = measure.size_of_tree(repository) - before
    return dataclasses.replace(done, figures={"bytes_read": released["bytes_read"], "bytes_stored": stored})


def stock(place: Place) -> Run:
    """Back the volume up with the stock tool: borg reads a loop device, restic the image file."""
    repository = place.repository("stock")
    before = measure.size_of_tree(repository)
    if place.tool == "borg":
        with measure.attached(place.image) as device:
            name = f"{repository}::{random.randrange(1 << 40)}"
            command = ["borg", "create", "--read-special", "--chunker-params=fixed,4194304", name, device]
            done = measure.run(command)
    else:
        done = measure.run(["restic", "backup", "--quiet", "--repo", str(repository), str(place.image)])
    stored = measure.size_of_tree(repository) - before
    return dataclasses.replace(done, figures={"bytes_read": place.size, "bytes_stored": stored})


def floor(place: Place, changed: Path) -> Run:
    """Store a file of the changed bytes with the stock tool."""
    repository = place.repository("floor")
    before = measure.size_of_tree(repository)
    if place.tool == "borg":
        name = f"{repository}::{random.randrange(1 << 40)}"
        done = measure.run(["borg", "create", "--chunker-params=fixed,4194304", name, str(changed)])
    else:
        done = measure.run(["restic", "backup", "--quiet", "--repo", str(repository), str(changed)])
    stored = measure.size_of_tree(repository) - before
    return dataclasses.replace(done, figures={"bytes_read": changed.stat().st_size, "bytes_stored": stored})


# -- the volume -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def volume(root: Path, shared: Path, tool: str, size: int, *, written: float) -> Iterator[Place]:
    """Give a volume half of which is in use by one file, of which a share is written, and the rest only allocated."""
    place = Place(root, tool, shared / "volume.img", root / "volume", size)
    measure.say(f"making a volume of {size // GIB} GiB")
    with place.image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(place.image)], check=True)
    with measure.mounted(place.image, place.mount) as directory, (directory / "file").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size // 2 - 256 * MIB)
        for _ in range(int((size // 2 - 256 * MIB) * written) // (4 * MIB)):
            file.write(os.urandom(4 * MIB))
    try:
        yield place
    finally:
        remove(place)


def remove(place: Place) -> None:
    """Remove a volume and the repositories, with all that was kept for them."""
    for path in (*place.image.parent.glob(f".{place.image.name}.blockferry-*"), place.image):
        path.unlink()
    for path in place.root.glob(f"{place.tool}-*"):
        shutil.rmtree(path)
    shutil.rmtree(place.root / "state")


def change(place: Place, total: int, piece: int) -> Path:
    """Write new random bytes into the volume's file, in one place or in pieces; return a file of just those."""
    copy = place.root / "changed.bytes"
    with (
        measure.mounted(place.image, place.mount) as directory,
        (directory / "file").open("r+b", buffering=0) as file,
        copy.open("wb") as changed,
    ):
        length = os.fstat(file.fileno()).st_size
        step = piece or total // (4 * KIB) * (4 * KIB)
        places = random.sample(range(length // step), total // step)
        for number in sorted(places):
            data = os.urandom(step)
            os.pwrite(file.fileno(), data, number * step)
            changed.write(data)
    return copy


if __name__ == "__main__":
    main()
