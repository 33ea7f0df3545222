"""Borg's repository and what lies in an archive of ours, read piece by piece.

An archive's items are one stream of msgpack maps, and a map's `chunks` is an array of (id, size, compressed size):
borg, "Internals: Data structures and file formats", Archives and Items. That stream is unpacked entry by entry, so
that a chunk list of millions is never in memory as Python objects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from borg.archive import Archive, DownloadPipeline
from borg.archiver import Archiver
from borg.cache import assert_secure
from borg.constants import MAX_DATA_SIZE
from borg.helpers import Location, Manifest, msgpack
from borg.remote import RemoteRepository
from borg.repository import Repository

IMAGE = "volume.img"
ITEMS = ("blockferry.json", "blockferry.map", IMAGE)
"""The items of an archive, in their order: what describes the image can be read without its long chunk list."""

CHECKPOINT = re.compile(r"\.checkpoint(\.\d+)?\Z")
"""What borg, and we, add to the name of an archive that is not finished."""
COMMENT = "blockferry "


class DamagedError(Exception):
    """An archive is not what we wrote."""


class LocationError(Exception):
    """What should say where a repository is does not."""


class Connection:
    """How to open the repository, as often as needed."""

    def __init__(self, reference: str, lock_wait: int, umask: str) -> None:
        try:
            Location(reference)
        except ValueError as error:
            raise LocationError(str(error)) from None
        # Borg's own parser knows what this version's repository classes want to be told.
        options = ["--lock-wait", str(lock_wait), *(["--umask", umask] if umask else [])]
        self.arguments = Archiver().parse_args([*options, "list", "--", reference])
        self.lock_wait = lock_wait
        self._key: Any = None
        os.umask(self.arguments.umask)

    def open(self, *, exclusive: bool = False, lock: bool = True) -> Any:
        """Return a repository, to be used as a context."""
        location = self.arguments.location
        options = {"exclusive": exclusive, "lock": lock, "lock_wait": self.lock_wait}
        if location.proto == "ssh":
            return RemoteRepository(location.omit_archive(), args=self.arguments, **options)
        return Repository(location.path, **options)

    def manifest(self, repository: Any) -> tuple[Any, Any]:
        """Return the manifest and key, for reading, once borg's own checks have found nothing against this repository.

        The key is unlocked once: that takes a tenth of a second by design. Who writes must load it with the repository
        that is written to, because it counts there what it has encrypted.
        """
        manifest, self._key = Manifest.load(repository, (Manifest.Operation.READ,), key=self._key)
        assert_secure(repository, manifest, self.lock_wait)
        return manifest, self._key


def comments(repository: Any, manifest: Any, key: Any) -> list[tuple[str, str]]:
    """Return (name, comment) of every archive that blockferry wrote, oldest first."""
    listed = [info for info in manifest.archives.list(sort_by=["ts"]) if not CHECKPOINT.search(info.name)]
    ahead = _Ahead(repository, [info.id for info in listed])
    found = [(info.name, Archive(ahead, key, manifest, info.name).comment or "") for info in listed]
    return [(name, comment) for name, comment in found if comment.startswith(COMMENT)]


class _Ahead:
    """Stands in for a repository of which objects are wanted in a known order: asks for all of them at once."""

    def __init__(self, repository: Any, ids: list[bytes]) -> None:
        self.objects = repository.get_many(ids)

    def get(self, _id: bytes) -> Any:
        """Return the next object; the caller keeps to the order."""
        return next(self.objects)


def unit_of(archive: Any) -> int:
    """Return the chunk size of an archive of ours; raise DamagedError if it was chunked in another way."""
    algorithm, *numbers = archive.metadata.get("chunker_params") or (None,)
    if (
        algorithm not in ("fixed", b"fixed")
        or not numbers
        or any(numbers[1:])
        or not 512 <= numbers[0] <= MAX_DATA_SIZE
    ):
        raise DamagedError(f"archive {archive.name} is not in chunks of one size; did borg recreate rewrite it?")
    unit: int = numbers[0]
    return unit


class Chunk(NamedTuple):
    """What an entry of a chunk list says, but for the size of the compressed chunk; size in bytes."""

    id: bytes
    size: int


class ChunkEntries:
    """A chunk list that is yet to be unpacked, `field` of the item `path`.

    The field is `chunks`, or `chunks_healthy`: what the list was before `borg check --repair` put chunks of zeros in
    the place of lost ones.
    """

    def __init__(self, unpacker: Any, path: str, field: str) -> None:
        self.path, self.field = path, field
        self.count: int = unpacker.read_array_header()
        self._unpacker = unpacker
        self._left = self.count

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the entries that are left; raise DamagedError at what is none."""
        while self._left:
            yield self.next()

    def next(self) -> Chunk:
        """Return the next entry."""
        self._left -= 1
        entry = self._unpacker.unpack()
        if isinstance(entry, tuple) and len(entry) in (2, 3):
            chunk, size = entry[:2]
            if isinstance(chunk, bytes) and len(chunk) == 32 and isinstance(size, int) and 0 < size <= MAX_DATA_SIZE:
                return Chunk(chunk, size)
        raise DamagedError(f"the chunk list of {self.path} holds what is no chunk")

    def skip(self, count: int) -> None:
        """Pass over entries."""
        self._left -= count
        for _ in range(count):
            self._unpacker.skip()

    def skip_rest(self) -> None:
        """Pass over all that is left."""
        self.skip(self._left)


def chunk_lists(archive: Any) -> Iterator[ChunkEntries]:
    """Yield the chunk lists of an archive's items, in order; what the caller leaves of one is passed over.

    Raise DamagedError if the items are not those that we write.
    """
    unpacker = msgpack.Unpacker(_Metadata(archive), use_list=False, read_size=MAX_DATA_SIZE)
    try:
        for path in ITEMS:
            others = {}
            for _ in range(unpacker.read_map_header()):
                field = unpacker.unpack().decode()
                if field in ("chunks", "chunks_healthy"):
                    entries = ChunkEntries(unpacker, path, field)
                    yield entries
                    entries.skip_rest()
                else:
                    others[field] = unpacker.unpack()
            # Borg sorts the fields of an item that it rewrites: the path may come after the chunks.
            if others.get("path") != path.encode():
                raise DamagedError(f"archive {archive.name} holds {others.get('path')!r} where {path} should be")
    except (msgpack.UnpackException, msgpack.OutOfData, ValueError, AttributeError) as error:
        raise DamagedError(f"archive {archive.name}: its items cannot be read: {error}") from None


class _Metadata:
    """The item stream of an archive as a file for msgpack to read."""

    def __init__(self, archive: Any) -> None:
        self.pieces = DownloadPipeline(archive.repository, archive.key).fetch_many(archive.metadata.items)

    def read(self, _size: int) -> bytes:
        """Return the next piece; the unpacker expects any size that a chunk may have."""
        return bytes(next(self.pieces, b""))
