"""Files of a group, back from its image to a directory.

Content is read once, in the order of the image, and each piece of it is written to the files that it belongs to, so
the repository is read as one large sequential file whatever the files are. The table of files is not trusted, and nor
is the directory: every name is opened relative to its open directory and never through a symbolic link (openat(2),
O_NOFOLLOW), and every file is made new (O_EXCL). What is being written is for its owner's eyes alone until it is whole.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockferry.errors import TargetError
from blockferry.extents import ExtentSet
from blockferry.groups.names import shown
from blockferry.groups.placing import Placing, Problem
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import GONE, UNREADABLE, FileTable, Rows
from blockferry.groups.writing import Writing
from blockferry.progress import Progress
from blockferry.target import explained

_BATCH = 8 << 20
"""Bytes of the image handled at a time."""
_GAP = 64 << 10
"""Bytes between wanted ones that are rather read than skipped."""
_NOTHING = memoryview(b"")
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back: entries of each kind, and bytes of content; what did not, or not as it was, is a problem."""

    files: int
    directories: int
    links: int
    """Hard links beyond the first."""
    others: int
    """Symbolic links, devices, fifos, sockets."""
    bytes_written: int
    problems: list[Problem]


def restore_files(
    group: StoredGroup, rows: Rows, destination: Path, progress: Progress, *, force: bool = False
) -> Restored:
    """Bring back the entries of these rows, and the directories that they are in, below a directory.

    The directory is made if it is not there. A file that is there already is refused, or replaced with `force`; what is
    in the way of it all the same, and what cannot be set, becomes a problem and the rest goes on. Raise TargetError if
    nothing can be written there (any more), DamagedSnapshotError if the image lacks a byte.
    """
    chosen, leaders = _chosen(group.table, rows)
    with Placing.opened(group.table, destination, force=force) as placing:
        if not force:
            _refuse_existing(placing, chosen, destination)
        with explained(os.fspath(destination), "writing"):
            return _Restoring(group, chosen, leaders, placing, progress).run()


class _Restoring:
    """One restore, in the order in which its steps have to be."""

    def __init__(
        self,
        group: StoredGroup,
        chosen: npt.NDArray[np.bool_],
        leaders: Rows,
        placing: Placing,
        progress: Progress,
    ) -> None:
        self.group, self.table, self.progress, self.placing = group, group.table, progress, placing
        table = group.table
        kinds = table.entries["mode"] & 0o170000
        counts = np.diff(table.extent_ends, prepend=0)
        # A hard link has the extents of the table's first one, which may not have been chosen.
        self.source = placing.source
        self.leaders = leaders
        is_leader = np.zeros(len(table), np.bool_)
        is_leader[leaders] = True
        # The content of hard links went with the first one's, if that was removed during the backup.
        missed = table.entries["flags"][self.source] & (UNREADABLE | GONE) != 0
        unreadable = missed & (kinds != stat.S_IFDIR)
        self.directories = np.flatnonzero(chosen & (kinds == stat.S_IFDIR))
        self.unreadable = np.flatnonzero(chosen & unreadable)
        made = chosen & is_leader & ~unreadable
        self.others = np.flatnonzero(made & (kinds != stat.S_IFREG) & (kinds != stat.S_IFDIR))
        with_content = counts[self.source] > 0
        self.empty = np.flatnonzero(made & (kinds == stat.S_IFREG) & ~with_content)
        self.filled = np.flatnonzero(made & (kinds == stat.S_IFREG) & with_content)
        self.linked = np.flatnonzero(chosen & ~is_leader & ~unreadable)

    def run(self) -> Restored:
        """Make everything; directories get their times and modes last, when nothing in them changes any more."""
        placing = self.placing
        for row, facts in placing.facts(self.directories[self.directories > 0]):
            placing.make_directory(row, facts)
        for row, facts in placing.facts(self.others):
            placing.make_other(row, facts)
        for row, facts in placing.facts(self.empty):
            placing.make_file(row, facts, 0, _NOTHING)
        written = self._write_content()
        first = np.full(len(self.table), -1, np.int64)
        first[self.source[self.leaders]] = self.leaders
        for row, facts in placing.facts(self.linked):
            placing.make_link(row, facts, int(first[self.source[row]]))
        for row, facts in placing.facts(self.directories[::-1]):
            placing.finish_directory(row, facts)
        for row in self.unreadable.tolist():
            placing.problem(row, "could not be read when it was backed up: it is not restored")
        placing.tell_flags(self.directories)
        placing.tell_flags(np.concatenate([self.empty, self.filled]))
        made = placing.made
        return Restored(made["files"], made["directories"], made["links"], made["others"], written, placing.problems)

    def _write_content(self) -> int:
        """Write all files that have content, in the order of the image; return how many bytes that were."""
        table, filled = self.table, self.filled
        sources = self.source[filled]
        ends = table.extent_ends[sources]
        begins = np.where(sources > 0, table.extent_ends[sources - 1], 0)
        counts = ends - begins
        numbers = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        owners = np.repeat(filled, counts)
        order = np.argsort(table.extents["place"][numbers], kind="stable")
        numbers, owners = numbers[order], owners[order]
        places, lengths = table.extents["place"][numbers], table.extents["length"][numbers]
        with self.progress.task("files", int(lengths.sum())) as advance:
            logicals = table.extents["logical"][numbers]
            with Writing(self.placing, owners, places, lengths, logicals) as writing:
                wanted = ExtentSet.from_ranges(places, places + lengths).coalesce(_GAP)
                for offset, piece in self.group.image.stream(wanted, _BATCH):
                    advance(writing.take(offset, piece))
                writing.check_complete()
        return int(lengths.sum())


def _chosen(table: FileTable, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
    """Return which rows are to be made, parents included, and of hard links the ones that are made as files."""
    chosen = np.zeros(len(table), np.bool_)
    chosen[rows] = True
    chosen[table.gone] = False
    chosen[0] = True
    parents = table.entries["parent"].astype(np.int64)
    above = np.unique(parents[np.flatnonzero(chosen)])
    above = above[above >= 0]
    while above.size and not bool(chosen[above].all()):
        above = above[~chosen[above]]
        chosen[above] = True
        above = np.unique(parents[above])
    link = table.entries["link"]
    every = np.flatnonzero(chosen)
    source = np.where(link[every] >= 0, link[every], every)
    _sources, first = np.unique(source, return_index=True)
    return chosen, every[first]


def _refuse_existing(placing: Placing, chosen: npt.NDArray[np.bool_], destination: Path) -> None:
    """Raise TargetError, naming some, if anything but directories is where an entry is to be made."""
    found = []
    for row in placing.existing(np.flatnonzero(chosen)):
        found.append(shown(placing.table.path(row)))
        if len(found) > _MOST_NAMED:
            break
    if found:
        more = " and more" if len(found) > _MOST_NAMED else ""
        raise TargetError(
            f"{destination}: there already: {', '.join(found[:_MOST_NAMED])}{more}",
            remedy="Restore to an empty directory, or replace what is there with --force.",
        )
