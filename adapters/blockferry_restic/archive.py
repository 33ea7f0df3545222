"""One restic snapshot to read from, in either of two ways that must give the same bytes.

`LocalArchive` reads the repository's format itself, `RemoteArchive` has restic do it, wherever the repository is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from blockferry.errors import DamagedSnapshotError
from blockferry.extents import ExtentSet, Offsets
from blockferry.layers import BaseLayer
from blockferry.segment_files import SegmentsLayer
from blockferry.segments import PER_DIRECTORY, VOLUME_DIRECTORY, segment_number
from blockferry_restic.command import Restic
from blockferry_restic.format import File, RepositoryReader, Rows
from blockferry_restic.layer import BlobImage

Check = Callable[[Offsets, Offsets], None]
"""Takes the numbers, sorted, and the sizes of all segments that a snapshot has."""


class Archive(Protocol):
    """A snapshot that blockferry stored. Errors are RepositoryError and its kinds."""

    def file(self, name: str, limit: int) -> bytes:
        """Return a file at the root; DamagedSnapshotError if it is missing or has more than `limit` bytes."""

    def image(self, size: int, unit: int, check: Check) -> BaseLayer:
        """Return what the segments hold, once `check` is content with those that are there: they are its extents."""


class LocalArchive:
    """A snapshot in a local repository. Not locked: what a prune takes away meanwhile is an error."""

    def __init__(self, reader: RepositoryReader, snapshot: str) -> None:
        self._reader = reader
        self._index = reader.index()
        self._snapshot = snapshot
        self._root = reader.root(self._index, snapshot)

    def file(self, name: str, limit: int) -> bytes:
        """Return a file at the root."""
        if name not in self._root.files:
            raise DamagedSnapshotError(f"snapshot {self._snapshot[:8]} has no {name}", remedy="Take another snapshot.")
        return self._reader.read(self._index, self._root.files[name], limit)

    def image(self, size: int, unit: int, check: Check) -> BlobImage:
        """Return the image, of which only the places of its blobs are in memory."""
        numbers, lengths, starts, rows = self._load(unit)
        check(numbers, lengths)
        extents = ExtentSet.from_ranges(numbers * unit, np.minimum(numbers * unit + lengths, size))
        return BlobImage(functools.partial(self._reader.blob, self._index), size, extents, starts, rows)

    def _load(self, unit: int) -> tuple[Offsets, Offsets, Offsets, Rows]:
        """Return the numbers and sizes of all segments, and the starts in the image and rows of all their blobs."""
        parts = []
        volume = self._root.directories.get(VOLUME_DIRECTORY)
        directories = self._reader.tree(self._index, volume).directories if volume else {}
        for name, subtree in sorted(directories.items()):
            files = sorted(self._reader.tree(self._index, subtree).files.items())
            parts.append(self._load_directory(name, [file for _name, file in files], unit))
        nothing = np.empty(0, np.int64)
        if not parts:
            return nothing, nothing, nothing, nothing
        numbers, lengths, starts, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return numbers, lengths, starts, rows

    def _load_directory(self, name: str, files: list[File], unit: int) -> tuple[Offsets, Offsets, Offsets, Rows]:
        """Return the same for one directory; DamagedSnapshotError if the blobs of a segment do not make it up."""
        if not 0 < len(files) <= PER_DIRECTORY:
            raise _damaged(self._snapshot, f"directory {name} holds {len(files)} files")
        try:
            numbers = np.array([segment_number(name, file.name, unit) for file in files], np.int64)
        except ValueError as error:
            raise _damaged(self._snapshot, str(error)) from None
        rows = self._reader.locate(self._index, [blob for file in files for blob in file.content])
        blob_lengths = self._index.lengths(rows)
        counts = np.array([len(file.content) for file in files], np.int64)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(blob_lengths)])
        first = np.cumsum(counts) - counts
        lengths = before[first + counts] - before[first]
        sizes = np.array([file.size for file in files], np.int64)
        if bool((lengths != sizes).any()):
            raise _damaged(self._snapshot, f"in directory {name} a segment's blobs have not the segment's size")
        starts = before[:-1] + np.repeat(numbers * unit - before[first], counts)
        return numbers, lengths, starts, rows


class RemoteArchive:
    """A snapshot that restic reads for us: `dump` for the small files, `ls` for the list, `mount` for the image."""

    def __init__(self, restic: Restic, snapshot: str) -> None:
        self._restic = restic
        self._snapshot = snapshot

    def file(self, name: str, limit: int) -> bytes:
        """Return a file at the root."""
        return self._restic.dump(self._snapshot, f"/{name}", limit)

    def image(self, size: int, unit: int, check: Check) -> SegmentsLayer:
        """Return the image, which keeps a `restic mount` until it is closed."""
        numbers, lengths = self._list(unit)
        check(numbers, lengths)
        with contextlib.ExitStack() as held:
            # The template alone: the usual directories of all hosts and times would be made as well.
            point = held.enter_context(self._restic.mount("--path-template", "%I", "--tag", "blockferry"))
            root = point / self._snapshot
            if not root.is_dir():
                raise _damaged(self._snapshot, "restic mount does not show it")
            return SegmentsLayer(root / VOLUME_DIRECTORY, size, unit, numbers, held.pop_all())

    def _list(self, unit: int) -> tuple[Offsets, Offsets]:
        """Return the numbers and the sizes of all segments, as `restic ls` lists them."""
        numbers, lengths = [], []
        listing = ["--json", "--no-lock", "--recursive", self._snapshot, f"/{VOLUME_DIRECTORY}"]
        for node in self._restic.each("ls", *listing):
            found = self._segment(node, unit)
            if found is not None:
                numbers.append(found[0])
                lengths.append(found[1])
        order = np.argsort(np.array(numbers, np.int64), kind="stable")
        return np.array(numbers, np.int64)[order], np.array(lengths, np.int64)[order]

    def _segment(self, node: Any, unit: int) -> tuple[int, int] | None:
        """Return the number and size of the segment that a line of `restic ls` is about, None if of none."""
        match node:
            case {"type": "file", "path": str(path), "size": int(size)}:
                try:
                    _root, _volume, directory, name = path.split("/")
                    return segment_number(directory, name, unit), size
                except ValueError:
                    raise _damaged(self._snapshot, f"{path} is not a segment") from None
            case _:
                return None


def _damaged(snapshot: str, what: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(
        f"snapshot {snapshot[:8]}: {what}",
        remedy="Take another snapshot; `restic check` tells whether the repository is sound.",
    )
