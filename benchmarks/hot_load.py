"""What hydration takes from somebody who uses what is there already."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import measure
from hot_place import attached, make_random_volume, places_in_use, said_of, store
from measure import GIB, MIB, Run

REGION = 512 * MIB
"""Bytes that fio reads from: they are there before it begins."""
_ON_ITS_WAY = 32 * MIB
"""Of these, at most, what was read and is not on the target yet, and what of them nobody uses."""


def measure_load(report: measure.Report, root: Path, tool: str, options: argparse.Namespace) -> None:
    """Have fio read from what is there, with hydration and without."""
    place = store(root, tool, make_random_volume(root, int(options.load * GIB)))
    title = f"{tool}: fio on what is there"
    region = next(offset for offset, _length in places_in_use(place.image) if offset >= GIB // 2)

    def read(*rate: str) -> Run:
        with attached(place, *rate) as device:
            bring_in(device, region)
            before = said_of("status", "target.img")
            began = time.perf_counter()
            done = measure.run(fio(device, region, options.seconds))
            took = time.perf_counter() - began
            after = said_of("status", "target.img")
        if after["finished"]:
            raise SystemExit("all was there before fio had ended: --load more")
        reads = json.loads(done.output)["jobs"][0]["read"]
        figures = {
            "reads_a_second": reads["iops"],
            "p99_seconds": reads["clat_ns"]["percentile"]["99.000000"] / 1e9,
            "hydrated_a_second": (after["hydrated"] - before["hydrated"]) / took,
        }
        return dataclasses.replace(done, output="", figures=figures)

    measure.say(title)
    contenders = {"all the rest is brought in": read, "nothing is": lambda: read("--rate", "0")}
    report.add(title, measure.take_turns(contenders, options.rounds))
    place.remove()


def bring_in(device: str, start: int) -> None:
    """Read all of the region, and have it on the target's disk: its writing out is not to be measured."""
    measure.run(
        [
            *("dd", f"if={device}", "of=/dev/null", "bs=1M", "iflag=direct,skip_bytes"),
            *(f"skip={start}", f"count={REGION // MIB}"),
        ],
        quiet=True,
    )
    while said_of("status", "target.img")["hydrated"] < REGION - _ON_ITS_WAY:
        time.sleep(0.1)
    os.sync()


def fio(device: str, start: int, seconds: int) -> list[str]:
    """Return the command that reads at random from the region."""
    return [
        *("fio", "--name=reads", f"--filename={device}", f"--offset={start}", f"--size={REGION}", "--readonly"),
        *("--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=4", "--norandommap"),
        *("--time_based", f"--runtime={seconds}", "--ramp_time=1", "--randrepeat=1", "--output-format=json"),
    ]
