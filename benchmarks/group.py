"""A group of many small files: blockferry, the stock tool on the same directories, and the floor, with a cold cache.

The files are in 1,000 directories of an ext4 filesystem, and aged: some of them were deleted and written again, three
times, so that neighbours in a directory lie apart on the disk. The disk is a loop device without a cache: an image's
pages that this host keeps, and reads ahead, are what no disk has. "Floor" is the stock tool storing one plain file of
the same bytes. "first" stores all; before "second" one file in a hundred is written anew; "restore" brings all back.

`reads` and `seek` are of the block device, by the kernel's tracepoint block_rq_issue: how many requests there were, and
how far the head of a disk would have moved between them. The filesystem reads its own metadata by them too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
from measure import BLOCKFERRY, GIB, KIB, Run

CASES = {"100,000 of 1-8 KiB": (100_000, KIB, 8 * KIB), "40,000 of 1-64 KiB": (40_000, KIB, 64 * KIB)}
DIRECTORIES, AGED, GENERATIONS = 1000, 0.2, 3
INIT = {
    "borg": ["borg", "init", "--encryption=repokey-blake2"],
    "restic": ["restic", "init", "--quiet", "--repo"],
}
TRACING = Path("/sys/kernel/tracing/instances/blockferry-benchmark")
_ISSUED = re.compile(r"block_rq_issue: \d+,\d+ (R\w*) \d+ \(.*?\) (\d+) \+ (\d+)")


@dataclasses.dataclass
class Place:
    """Where everything lies. `files` are named by number; `tree` is where they are."""

    root: Path
    tool: str
    tree: Path
    files: int
    smallest: int
    largest: int
    rng: random.Random = dataclasses.field(default_factory=lambda: random.Random(1))

    def repository(self, name: str) -> Path:
        """Return a contender's repository, made if it is not there."""
        path = self.root / f"{self.tool}-{name}"
        if not path.exists():
            measure.run([*INIT[self.tool], str(path)], quiet=True)
        return path

    def path(self, number: int) -> Path:
        """Return where a file is."""
        return self.tree / f"{number % DIRECTORIES:04}" / f"file-{number:06}"

    def write(self, number: int) -> None:
        """Give a file new content, of a new size."""
        self.path(number).write_bytes(self.rng.randbytes(self.rng.randint(self.smallest, self.largest)))


def main() -> None:
    """Measure what the options name."""
    parser = measure.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", choices=list(INIT), action="append", help="only this repository tool")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case")
    options = parser.parse_args()
    report = measure.Report("group")
    with tempfile.TemporaryDirectory(prefix="blockferry-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        root = Path(directory)
        measure.keep_at_home(root)
        for case in options.case or CASES:
            image = root / "volume.img"
            with image.open("wb") as file:
                file.truncate(6 * GIB)
            subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)
            with measure.mounted(image, root / "volume") as mounted:
                subprocess.run(["losetup", "--direct-io=on", device_of(mounted)], check=True)
                for tool in options.tool or list(INIT):
                    compare(report, case, Place(root, tool, mounted / "tree", *CASES[case]), options)
    measure.finish(report, as_json=options.json)


def compare(report: measure.Report, case: str, place: Place, options: argparse.Namespace) -> None:
    """Compare the contenders on one set of files."""
    measure.say(f"{place.tool}: writing {case}")
    make_files(place)
    configuration = place.root / "config.yaml"
    configuration.write_text(f"groups:\n  files: {{volume: {place.tree.parent}, paths: [{place.tree}]}}\n")
    os.environ["BLOCKFERRY_CONFIG"] = str(configuration)
    device = device_of(place.tree.parent)
    runs: dict[str, dict[str, list[Run]]] = {"first": {}, "second": {}, "restore": {}}
    for number in range(options.rounds):
        for step, contenders in steps(place).items():
            if step == "second":
                for each in place.rng.sample(range(place.files), place.files // 100):
                    place.write(each)
            for name, contender in contenders.items():
                measure.say(f"{place.tool}, {case}, {step}: round {number + 1} of {options.rounds}: {name}")
                runs[step].setdefault(name, []).append(traced(device, contender))
        for path in (*place.root.glob(f"{place.tool}-*"), place.root / "state", place.root / "restored"):
            shutil.rmtree(path, ignore_errors=True)
    for step, each in runs.items():
        report.add(f"{place.tool}, {case}: {step}", each)
    shutil.rmtree(place.tree)


def steps(place: Place) -> dict[str, dict[str, Callable[[], Run]]]:
    """Return what is run one after the other, and by whom; ours first."""
    reference = f"{place.tool}:{place.repository('blockferry')}"

    def ours() -> Run:
        return measure.run([BLOCKFERRY, "--quiet", "backup", "files", "--repo", reference, "--json"])

    def ours_back() -> Run:
        return into_nothing(place, ["files", "latest", "--repo", reference, "--to", str(place.root / "restored")])

    plain = place.root / "plain"

    def floor() -> Run:
        with plain.open("wb") as file:
            for number in range(place.files):
                file.write(place.path(number).read_bytes())
        cold()
        return store(place, "floor", plain)

    def stock() -> Run:
        return store(place, "stock", place.tree)

    def stock_back() -> Run:
        return restore(place)

    return {
        "first": {"blockferry": ours, "stock": stock, "floor": floor},
        "second": {"blockferry": ours, "stock": stock},
        "restore": {"blockferry": ours_back, "stock": stock_back},
    }


def store(place: Place, name: str, what: Path) -> Run:
    """Store a file or tree with the stock tool."""
    repository = place.repository(name)
    if place.tool == "borg":
        return measure.run(["borg", "create", f"{repository}::{random.randrange(1 << 40)}", str(what)])
    return measure.run(["restic", "backup", "--quiet", "--repo", str(repository), str(what)])


def restore(place: Place) -> Run:
    """Bring back the newest of what `stock` stored, with the stock tool."""
    repository, restored = place.repository("stock"), place.root / "restored"
    shutil.rmtree(restored, ignore_errors=True)
    restored.mkdir()
    if place.tool == "restic":
        return measure.run(
            ["restic", "restore", "latest", "--quiet", "--repo", str(repository), "--target", str(restored)]
        )
    listed = subprocess.run(["borg", "list", "--short", str(repository)], check=True, capture_output=True, text=True)
    with contextlib.chdir(restored):
        return measure.run(["borg", "extract", f"{repository}::{listed.stdout.split()[-1]}"])


def into_nothing(place: Place, words: list[str]) -> Run:
    """Run a command of ours that brings files back to where nothing is."""
    shutil.rmtree(place.root / "restored", ignore_errors=True)
    return measure.run([BLOCKFERRY, "--quiet", *words])


def device_of(mounted: Path) -> str:
    """Return the device that is mounted there."""
    found = subprocess.run(["findmnt", "-no", "SOURCE", str(mounted)], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def make_files(place: Place) -> None:
    """Write all files, and some of them again and again."""
    for number in range(DIRECTORIES):
        (place.tree / f"{number:04}").mkdir(parents=True)
    for number in range(place.files):
        place.write(number)
    for _ in range(GENERATIONS):
        again = place.rng.sample(range(place.files), int(place.files * AGED))
        for number in again:
            place.path(number).unlink()
        for number in again:
            place.write(number)


def cold() -> None:
    """Have the kernel forget what it read."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def traced(device: str, contender: Callable[[], Run]) -> Run:
    """Run a contender with a cold cache, and count what it had the device do."""
    cold()
    with tracing(device) as trace:
        done = contender()
        requests = [(int(start), int(count)) for kind, start, count in _ISSUED.findall(trace.read_text())]
    seek = sum(abs(start - (before + count)) for (before, count), (start, _length) in itertools.pairwise(requests))
    return dataclasses.replace(done, figures=done.figures | {"reads": len(requests), "seek_bytes": 512 * seek})


@contextlib.contextmanager
def tracing(device: str) -> Iterator[Path]:
    """Note the reads that are issued to a device; give the file that has them. See Documentation/trace/events.rst."""
    if not TRACING.parent.is_dir():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=True)
    TRACING.mkdir(exist_ok=True)
    try:
        facts = os.stat(device).st_rdev
        event = TRACING / "events" / "block" / "block_rq_issue"
        (TRACING / "buffer_size_kb").write_text("65536")
        (event / "filter").write_text(f"dev == {os.major(facts) << 20 | os.minor(facts)} && bytes > 0")
        (TRACING / "trace").write_text("")
        (event / "enable").write_text("1")
        yield TRACING / "trace"
    finally:
        TRACING.rmdir()


if __name__ == "__main__":
    main()
