"""What `blockferry track` costs the writers of a device: fio with and without it, in turns.

Random writes of 4 KiB, past the page cache, to a loop device on a file in memory, so that no disk hides the cost.
"Not tracked" runs twice: how much two runs of the same differ is what the comparison is worth. The writer's own CPU
time, in which its writes are noted, tells more than the clock where others use the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure
from measure import BLOCKFERRY, MIB, Run

SIZE = 512 * MIB


def main() -> None:
    """Measure."""
    parser = measure.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5, help="how long each run writes")
    parser.add_argument("--depth", type=int, default=8, help="how many writes are under way at a time")
    options = parser.parse_args()
    report = measure.Report("tracking")
    with loop_device() as device:
        writing = functools.partial(write, device, options.seconds, options.depth)
        contenders = {
            "tracked": functools.partial(tracked, device, writing),
            "not tracked": writing,
            "not tracked, again": writing,
        }
        runs = measure.take_turns(contenders, options.rounds)
    report.add(f"4 KiB random writes, {options.depth} at a time", runs)
    measure.finish(report, as_json=options.json)


@contextlib.contextmanager
def loop_device() -> Iterator[str]:
    """Show a full file in memory as a device."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="blockferry-bench-") as directory:
        image = Path(directory) / "disk.img"
        image.write_bytes(bytes(SIZE))
        command = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        try:
            yield device
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)


def tracked(device: str, writing: measure.Contender) -> Run:
    """Write while the device is tracked."""
    measure.run([BLOCKFERRY, "track", "start", device])
    try:
        return writing()
    finally:
        measure.run([BLOCKFERRY, "track", "stop", device])


def write(device: str, seconds: int, depth: int) -> Run:
    """Write for some seconds; what counts is what a million writes take, of time and of the writer's CPU."""
    done = measure.run(
        [
            *("fio", "--name=writes", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--direct=1"),
            *("--ioengine=libaio", f"--iodepth={depth}", "--time_based", f"--runtime={seconds}"),
            "--output-format=json",
        ]
    )
    job = json.loads(done.output)["jobs"][0]
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["write"]["runtime"] / 1000
    figures = {
        "million_writes_seconds": 1e6 / job["write"]["iops"],
        "million_writes_cpu_seconds": 1e6 * busy / job["write"]["total_ios"],
    }
    return dataclasses.replace(done, output="", figures=figures)


if __name__ == "__main__":
    main()
