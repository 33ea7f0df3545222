"""Writing an archive: an ordinary one, of ordinary files, all or nothing.

An item's chunk list is packed while its chunks are stored and goes straight into borg's item buffer, so that memory
does not grow with the volume.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import grp
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from borg.archive import Archive, Statistics
from borg.cache import Cache
from borg.compress import CompressionSpec
from borg.constants import zeros
from borg.helpers import Manifest, msgpack
from borg.item import Item

from blockferry_borg.worker.archives import (
    CHECKPOINT,
    IMAGE,
    ChunkEntries,
    Connection,
    DamagedError,
    chunk_lists,
    unit_of,
)
from blockferry_borg.worker.channel import Channel

_PART_CHUNKS = 8192
"""Chunks that a part item of a checkpoint lists at most, and entries that are packed at a time."""


class BaseUnusableError(Exception):
    """The base's chunks cannot be referred to; the parent has to send the bytes instead."""


class CompressionError(Exception):
    """The compression is none."""


def store(connection: Connection, channel: Channel, request: dict[str, Any]) -> None:
    """Write one archive from the parent's frames; until the commit at its end there is none."""
    with connection.open(exclusive=True) as repository:
        manifest, key = Manifest.load(repository, (Manifest.Operation.WRITE,))
        key.compressor = _compressor(request["compression"])
        with Cache(repository, key, manifest, lock_wait=connection.lock_wait) as cache:
            writer = Writer(repository, manifest, key, cache, request)
            channel.send(ready=True)
            writer.store_items(channel)
            stored = writer.finish()
    channel.send(stored=stored)


def _compressor(specification: str) -> Any:
    try:
        return CompressionSpec(specification).compressor
    except (ValueError, argparse.ArgumentTypeError):
        raise CompressionError(f"{specification!r} is no compression that borg knows") from None


class Writer:
    """Writes an archive inside a transaction of the repository, and checkpoints of it beside it."""

    def __init__(self, repository: Any, manifest: Any, key: Any, cache: Any, request: dict[str, Any]) -> None:
        self.repository, self.manifest, self.key, self.cache = repository, manifest, key, cache
        self.request = request
        self.unit: int = request["unit"]
        self.archive = self.new_archive(cache)
        self.stats = self.archive.stats
        self.checkpoints = Checkpoints(self, request["checkpoint"])
        self.packer = msgpack.Packer()
        self.zero_ids: dict[int, bytes] = {}
        self.bases = [self._open_base(name) for name in request["bases"]]

    def new_archive(self, cache: Any) -> Any:
        """Return an archive that is yet to be saved."""
        name, parameters = self.request["archive"], ("fixed", self.unit, 0)
        return Archive(
            self.repository, self.key, self.manifest, name, cache=cache, create=True, chunker_params=parameters
        )

    def store_items(self, channel: Channel) -> None:
        """Store item after item until the parent says that it was the last."""
        frame = channel.take()
        while "end" not in frame:
            frame = self._store_item(channel, frame)

    def finish(self) -> int:
        """Commit the archive; checkpoints of this run, and of earlier ones that were killed, have done their work.

        Return the bytes by which the repository grew.
        """
        for name in self._checkpoint_names():
            stale = Archive(self.repository, self.key, self.manifest, name, cache=self.cache, consider_part_files=True)
            stale.delete(Statistics())
        self.archive.save(comment=self.request["comment"])
        # Borg 1.4 counts the metadata apart.
        metadata = getattr(self.archive, "meta_stats", None)
        stored: int = self.stats.usize + (metadata.usize if metadata else 0)
        return stored

    def _open_base(self, name: str) -> Base:
        try:
            return Base(Archive(self.repository, self.key, self.manifest, name), self.unit)
        except (Archive.DoesNotExist, DamagedError) as error:
            raise BaseUnusableError(f"cannot be read: {error}") from None

    def _checkpoint_names(self) -> list[str]:
        """Return the names of this volume's checkpoints; who holds the lock knows that nobody else writes them."""
        stamp = r"-\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d-[0-9a-f]+"
        ours = re.compile(re.escape(self.request["volume"]) + stamp + CHECKPOINT.pattern)
        return [name for name in self.manifest.archives if ours.match(name)]

    def _store_item(self, channel: Channel, header: dict[str, Any]) -> dict[str, Any]:
        """Store the item of a header from the frames that follow; return the first frame that is not its own."""
        size, offset = header["size"], 0
        streamed = StreamedItem(self.archive.items_buffer, new_item(header["item"], size), -(-size // self.unit))
        frame = channel.take()
        while "runs" in frame:
            data = memoryview(b"") if frame["slot"] is None else channel.slot(frame["slot"])
            for kind, length, *base in frame["runs"]:
                if kind == "data":
                    entries, data = self._store_data(data[:length]), data[length:]
                else:
                    entries = self._store_zeros(length) if kind == "zero" else self._store_same(offset, length, *base)
                for packed in entries:
                    streamed.append(packed)
                offset += length
            if frame["slot"] is not None:
                channel.send(free=frame["slot"])
            self.checkpoints.save_if_due()
            frame = channel.take()
        if offset != size:
            raise ValueError(f"{header['item']}: {offset} bytes came, {size} were announced")
        self.stats.nfiles += 1
        return frame

    def _store_data(self, data: memoryview) -> Iterator[bytes]:
        """Store the bytes of a run; yield the packed entries of its chunks."""
        for start in range(0, len(data), self.unit):
            # Borg's compressors would make this copy if we did not.
            chunk = bytes(data[start : start + self.unit])
            if zeros.startswith(chunk):
                entry = self._zero_entry(len(chunk), 1)
            else:
                entry = self.cache.add_chunk(self.key.id_hash(chunk), chunk, self.stats, wait=False)
                self.repository.async_response(wait=False)
            self.checkpoints.add(entry)
            yield self.packer.pack(entry)

    def _store_zeros(self, length: int) -> Iterator[bytes]:
        """Refer to the chunk of zeros as often as it fits, and to a shorter one for what is left."""
        whole, rest = divmod(length, self.unit)
        for size, count in ((self.unit, whole), (rest, 1)):
            if size and count:
                packed = self.packer.pack(self._zero_entry(size, count))
                for done in range(0, count, _PART_CHUNKS):
                    yield packed * min(_PART_CHUNKS, count - done)

    def _zero_entry(self, size: int, count: int) -> Any:
        """Return the entry of a chunk of zeros, which is referred to `count` times more."""
        chunk = memoryview(zeros)[:size]
        if size not in self.zero_ids:
            self.zero_ids[size] = self.key.id_hash(chunk)
        entry = self.cache.add_chunk(self.zero_ids[size], chunk, self.stats, wait=False)
        self.repository.async_response(wait=False)
        if count > 1:
            # What chunk_incref does, for all of a run at once: a terabyte of holes costs no more than one.
            self.cache.chunks.add(entry.id, count - 1, entry.size, entry.csize)
            self.stats.update(entry.size * (count - 1), entry.csize * (count - 1), False)
        return entry

    def _store_same(self, offset: int, length: int, number: int) -> Iterator[bytes]:
        """Refer to a base's chunks; raise BaseUnusableError if one is not there as it should be."""
        for start in range(offset, offset + length, self.unit):
            chunk = self.bases[number].take(start // self.unit)
            expected = min(self.unit, offset + length - start)
            if chunk.size != expected or not self.cache.seen_chunk(chunk.id, expected):
                raise BaseUnusableError(f"lacks the chunk at {start}")
            yield self.packer.pack(self.cache.chunk_incref(chunk.id, self.stats))


class Base:
    """The chunks of a base's image, taken by number, in order."""

    def __init__(self, archive: Any, unit: int) -> None:
        """Raise BaseUnusableError if chunks of it were lost, or are of another size than `unit`."""
        if unit_of(archive) != unit:
            raise BaseUnusableError(f"is stored in chunks of {unit_of(archive)} bytes, not of {unit}")
        # Whether an item was repaired stands behind its chunks: hence the pass over all of it beforehand.
        if any(entries.field == "chunks_healthy" for entries in chunk_lists(archive)):
            raise BaseUnusableError("was repaired by borg check: some of its chunks are lost")
        # The generator is kept: it would end, and its stream with it.
        self._lists = chunk_lists(archive)
        self._entries: ChunkEntries = next(entries for entries in self._lists if entries.path == IMAGE)
        self._position = 0

    def take(self, number: int) -> Any:
        """Return a chunk; numbers must ascend."""
        if number >= self._entries.count:
            raise BaseUnusableError("ends before the volume does")
        self._entries.skip(number - self._position)
        self._position = number + 1
        return self._entries.next()


class StreamedItem:
    """A file item of which the chunk list is packed entry by entry into borg's item buffer."""

    def __init__(self, buffer: Any, item: Any, count: int) -> None:
        """Begin an item that will have `count` chunks."""
        self.buffer = buffer
        packer = msgpack.Packer()
        fields = item.as_dict()
        head = [packer.pack_map_header(len(fields) + 1)]
        head += [packer.pack(part) for field in fields.items() for part in field]
        head += [packer.pack("chunks"), packer.pack_array_header(count)]
        buffer.buffer.write(b"".join(head))

    def append(self, packed: bytes) -> None:
        """Add packed entries."""
        self.buffer.buffer.write(packed)
        if self.buffer.is_full():
            self.buffer.flush()


class Checkpoints:
    """An archive beside the one that is written, which holds on to the chunks that were stored so far.

    As borg's own checkpoints do, so that a run that is killed is not for nothing; named as borg names them, so that
    its tools leave them out of lists and prune them.
    """

    def __init__(self, writer: Writer, interval: int) -> None:
        """Save one every `interval` seconds; 0: never."""
        self.writer = writer
        self.interval = interval
        self.last = time.monotonic()
        self.archive = writer.new_archive(_CacheLeftOpen(writer.cache))
        self.pending: list[Any] = []
        self.parts = 0
        self.saved = False

    def add(self, entry: Any) -> None:
        """Hold on to a chunk that was stored."""
        if self.interval:
            self.pending.append(entry)
            if len(self.pending) >= _PART_CHUNKS:
                self._write_part()

    def save_if_due(self) -> None:
        """Commit what was stored, once an interval."""
        if not self.interval or time.monotonic() - self.last < self.interval:
            return
        self._write_part()
        name = self.archive.checkpoint_name
        if self.saved:
            del self.writer.manifest.archives[name]
            self.writer.cache.chunk_decref(self.archive.id, self.archive.stats)
        self.archive.save(name)
        self.saved = True
        self.last = time.monotonic()

    def _write_part(self) -> None:
        """Add an item that lists the pending chunks; `part` is what hides it from borg list and extract."""
        if not self.pending:
            return
        self.parts += 1
        item = new_item(f"{IMAGE}.borg_part_{self.parts}", sum(entry.size for entry in self.pending))
        item.part = self.parts
        item.chunks = self.pending
        for entry in self.pending:
            self.writer.cache.chunk_incref(entry.id, self.archive.stats)
        self.archive.add_item(item, show_progress=False)
        self.pending = []


class _CacheLeftOpen:
    """Borg's chunks cache, which a checkpoint does not commit with the repository.

    It counts what the unfinished archive refers to as well. If this run is killed, the next one finds the cache to be
    older than the repository, and counts anew; else chunks would be held for ever that nobody refers to.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def commit(self) -> None:
        """Leave that to the end of the run."""


def new_item(path: str, size: int) -> Any:
    """Return a regular file of `size` bytes, for its owner alone, without chunks yet."""
    now = time.time_ns()
    item = Item(path=path, mode=0o100600, uid=os.getuid(), gid=os.getgid(), mtime=now, atime=now, ctime=now, size=size)
    item.user, item.group = getpass.getuser(), None
    with contextlib.suppress(KeyError):
        item.group = grp.getgrgid(item.gid).gr_name
    item.hardlink_master = False
    return item
