"""A share of a volume: what one host copies, and the function that does it, wherever it runs.

A share is cut where the repository's chunks are, so that no chunk is in two of them. Jobs and what they come to are
plain data: they travel to other hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from blockferry.cluster.stored import store_share
from blockferry.errors import UsageError
from blockferry.extents import ExtentSet
from blockferry.layers import CheckedLayer
from blockferry.manager import plugin_manager, repository_named
from blockferry.repository import Advance, Repository
from blockferry.snapshot import Record, Snapshot, Stored
from blockferry.volume import Volume

PATHS: dict[str, str] = {}
"""Where this process finds the shared volumes, by name: how a worker is told."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One share to be copied: plain data."""

    volume: str
    reference: str
    record: str
    """Of the set that the share is of, as JSON."""
    extents: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        """How much there is to copy."""
        return sum(length for _start, length in self.extents)


def cut(used: ExtentSet, count: int, unit: int, size: int) -> list[ExtentSet]:
    """Return what is in use in so many shares of about the same number of bytes, in the order of the volume.

    Each begins and ends where chunks of `unit` bytes do. There are fewer where there is little in use.
    """
    chunks = used.align(unit, size)
    if not chunks:
        return []
    edges = np.linspace(0, chunks.total, count + 1)[1:-1]
    before = np.concatenate([[0], np.cumsum(chunks.ends - chunks.starts)])
    row = np.searchsorted(before, edges, side="right") - 1
    places = (chunks.starts[row] + edges - before[row]) // unit * unit
    cuts = [0, *places.astype(int).tolist(), size]
    shares = [used.clip(start, end) for start, end in itertools.pairwise(cuts) if end > start]
    return [share for share in shares if share]


def copy_share(job: Job) -> dict[str, Any]:
    """Copy a share on this host, with this host's credentials; return what it came to, as plain data."""
    manager = plugin_manager()
    with contextlib.closing(repository_named(manager, job.reference)) as repository:
        stored = copy_into(repository, job, lambda _count: None)
    return {"snapshot": dataclasses.asdict(stored.snapshot), "bytes_stored": stored.bytes_stored}


def stored_of(said: dict[str, Any]) -> Stored:
    """Return what a share that was copied elsewhere came to."""
    return Stored(Snapshot(**said["snapshot"]), int(said["bytes_stored"]))


def copy_into(repository: Repository, job: Job, advance: Advance, check: Callable[[], object] = lambda: None) -> Stored:
    """Copy a share into a repository that is open; raise what `check` raises, which is asked at every read."""
    if job.volume not in PATHS:
        raise UsageError(f"{job.volume}: this host was not told where it is", remedy="Name it: --volume NAME=PATH")
    record = Record.from_json(job.record.encode(), "a share")
    extents = ExtentSet.from_pairs(job.extents)
    with Volume.discover(PATHS[job.volume], job.volume).open_data() as disk:
        return store_share(repository, CheckedLayer(disk, check), extents, record, advance)


def job_for(share: ExtentSet, record: Record, reference: str) -> Job:
    """Return the job of copying a share."""
    return Job(
        record.volume, reference, record.to_json().decode(), [(int(start), int(length)) for start, length in share]
    )
