"""A disk, or the image of one, with a GPT or MBR partition table.

In use are the partition tables, every gap between partitions (boot loaders and extended boot records live there) and
in each partition what the hooks say when they are asked for it as a volume of its own. A partition of which nobody
knows what it holds counts whole. Of what counts whole in an image file, only its holes are left out.

The table is read by `sfdisk --json` (util-linux), which needs no rights beyond reading, and checked here: partitions
must lie on the disk and must not overlap. An extended partition (MBR types 5, f and 85) is no partition but the room
for the logical ones: what of it is not theirs is a gap.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from typing import Any

import pluggy

from blockferry.extents import ExtentSet
from blockferry.hookspecs import Declined, UsedBlocks, hookimpl
from blockferry.ladder import used_blocks
from blockferry.programs import find
from blockferry.snapshot import Tier
from blockferry.used.sparse import data_extents
from blockferry.volume import Volume, descriptors_behind, probe

_TABLES = ("gpt", "dos")
_EXTENDED = ("5", "f", "85")
_MOST_PARTITIONS = 1024


class TableError(Exception):
    """The partition table cannot be relied on; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """One partition: its number in the table, and where it is on the disk, in bytes."""

    number: int
    start: int
    size: int


class Partitions:
    """The plugin: it asks the hooks of `manager` again for each partition."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self.manager = manager

    @hookimpl
    def blockferry_used_extents(self, volume: Volume, declined: Declined) -> UsedBlocks | None:
        """Answer for a volume with a partition table, of which somebody knows at least one partition."""
        if volume.filesystem or probe(volume.path, offset=volume.offset, size=volume.size).get("PTTYPE") not in _TABLES:
            return None
        try:
            partitions = read_table(volume)
        except TableError as error:
            declined(f"partition table: {error}")
            return None
        occupied = ExtentSet.from_pairs((each.start, each.size) for each in partitions)
        extents = [occupied.complement(volume.size).intersection(data_extents(volume))]
        methods = []
        for partition in partitions:
            window = volume.window(partition.start, partition.size)
            used, tier, reason = used_blocks(self.manager, window)
            extents.append(used.extents.shift(partition.start))
            if tier is Tier.USED:
                methods.append(used.method)
            if reason:
                declined(f"partition {partition.number}: {reason}")
        if not methods:
            return None
        named = ", ".join(dict.fromkeys(methods))
        return UsedBlocks(ExtentSet.empty().union(*extents), f"partitions ({named})")


def plugin(manager: pluggy.PluginManager) -> Partitions:
    """Return the plugin, which needs the manager that it is registered with."""
    return Partitions(manager)


def read_table(volume: Volume) -> list[Partition]:
    """Return a volume's partitions in the order in which they lie; raise TableError if the table is not sound."""
    if volume.offset:
        raise TableError("it lies inside a partition, where it is not read")
    table = _ask_sfdisk(volume.path)
    if table.get("label") not in _TABLES or table.get("unit") != "sectors":
        raise TableError(f"it is of an unknown kind ({table.get('label')!r})")
    try:
        sector = int(table.get("sectorsize", volume.block_size))
        listed = [each for each in table.get("partitions", []) if each["type"].lower() not in _EXTENDED]
        partitions = sorted((_partition(each, sector) for each in listed), key=lambda each: each.start)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TableError(f"what sfdisk says of it cannot be read: {error!r}") from None
    _check_places(partitions, sector, volume.size)
    return partitions


def _partition(entry: dict[str, Any], sector: int) -> Partition:
    """Return one entry of sfdisk's table; "node" is the path with the partition's number behind it."""
    number = re.search(r"\d+$", entry["node"])
    if number is None:
        raise ValueError(entry["node"])
    return Partition(int(number[0]), int(entry["start"]) * sector, int(entry["size"]) * sector)


def _check_places(partitions: list[Partition], sector: int, size: int) -> None:
    """Raise TableError unless the partitions, in order, lie on the disk, behind its first sector, and apart."""
    if len(partitions) > _MOST_PARTITIONS:
        raise TableError(f"it has {len(partitions)} partitions")
    end = sector
    for partition in partitions:
        if partition.start < end or partition.size <= 0:
            raise TableError(f"partition {partition.number} overlaps another one or the table itself")
        end = partition.start + partition.size
        if end > size:
            raise TableError(f"partition {partition.number} ends behind the end of the disk")


def _ask_sfdisk(path: str) -> dict[str, Any]:
    """Return what sfdisk says of the partition table; raise TableError if it finds none that it can read."""
    done = subprocess.run(
        [find("sfdisk"), "--json", "--", path],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors_behind(path),
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise TableError(f"sfdisk cannot read it: {lines[-1] if lines else done.returncode}")
    try:
        table: dict[str, Any] = json.loads(done.stdout)["partitiontable"]
    except (ValueError, KeyError) as error:
        raise TableError(f"what sfdisk says of it cannot be read: {error}") from None
    return table
