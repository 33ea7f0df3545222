"""The shared volume as one host sees it: read and written past the page cache, whose pages another host would not see.

What is acknowledged has reached the device, and what is read is what it holds now. Only the device's own cache stands
between a write and the disk: `sync` empties it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator

from blockferry import kernel
from blockferry.errors import VolumeError
from blockferry.layers import DirectLayer, is_aligned
from blockferry.volume import Volume

_BOUNCE = 1 << 20
"""Bytes that a write whose memory is not aligned is cut into: what FUSE hands over at once."""
_ZEROS = memoryview(mmap.mmap(-1, _BOUNCE))


class SharedDevice:
    """A block device, or a file that stands for one, opened past the page cache. Used by several threads at once."""

    def __init__(self, volume: Volume, descriptor: int) -> None:
        """Borrow `descriptor`, which is opened to read and write with O_DIRECT."""
        self.path = volume.path
        self.size = volume.size
        self.block_size = volume.block_size
        self._descriptor = descriptor
        self._reader = DirectLayer(descriptor, volume.size, block_size=volume.block_size, name=volume.path)
        self._idle: list[memoryview] = []
        self._partial = threading.Lock()
        """Held while a block is read, changed in part and written back."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; raise VolumeError if the device fails."""
        self._reader.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`; blocks that it covers in part are read first."""
        if (offset | len(data)) % self.block_size:
            with self._partial:
                self._write_partial(offset, data)
        elif is_aligned(data):
            self._write(offset, data)
        else:
            with self._bounce() as bounce:
                for start in range(0, len(data), _BOUNCE):
                    piece = bounce[: min(_BOUNCE, len(data) - start)]
                    piece[:] = data[start : start + len(piece)]
                    self._write(offset + start, piece)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, and give its space back where the device can do that."""
        block = self.block_size
        begin, end = -(-offset // block) * block, (offset + length) // block * block
        if begin >= end:
            self.write(offset, _ZEROS[:length])
            return
        if not self._punch(begin, end - begin):
            for start in range(begin, end, _BOUNCE):
                self._write(start, _ZEROS[: min(_BOUNCE, end - start)])
        for first, last in ((offset, begin), (end, offset + length)):
            if last > first:
                self.write(first, _ZEROS[: last - first])

    def sync(self) -> None:
        """Have the device make durable what it acknowledged."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failed("writing out its cache", error) from None

    def _write_partial(self, offset: int, data: memoryview) -> None:
        """Write what does not begin or end with blocks."""
        start = offset // self.block_size * self.block_size
        end = min(-(-(offset + len(data)) // self.block_size) * self.block_size, self.size)
        whole = memoryview(mmap.mmap(-1, end - start))
        self._reader.read_into(start, whole)
        whole[offset - start : offset - start + len(data)] = data
        self._write(start, whole)

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                raise self._failed(f"writing {len(data)} bytes at {offset}", error) from None

    def _punch(self, offset: int, length: int) -> bool:
        """Zero whole blocks by one request, if the device or file has such a thing."""
        try:
            kernel.fallocate(self._descriptor, kernel.PUNCH_HOLE_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL, errno.ENOSYS):
                return False
            raise self._failed(f"zeroing {length} bytes at {offset}", error) from None
        return True

    @contextlib.contextmanager
    def _bounce(self) -> Iterator[memoryview]:
        try:
            bounce = self._idle.pop()
        except IndexError:
            bounce = memoryview(mmap.mmap(-1, _BOUNCE))
        yield bounce
        self._idle.append(bounce)

    def _failed(self, doing: str, error: OSError) -> VolumeError:
        return VolumeError(
            f"{self.path}: {doing} failed: {error.strerror}", remedy="Look at the kernel log: the disk may be failing."
        )


@contextlib.contextmanager
def opened(volume: Volume) -> Iterator[SharedDevice]:
    """Open a volume to be written to by several hosts; raise VolumeError if it cannot be."""
    try:
        descriptor = os.open(volume.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise VolumeError(
            f"{volume.path}: cannot be opened to be written to past the page cache: {error.strerror}",
            remedy="Name the block device that all hosts share; run as root.",
        ) from None
    try:
        yield SharedDevice(volume, descriptor)
    finally:
        os.close(descriptor)
