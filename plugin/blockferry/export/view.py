"""What is shown of one volume: its bytes, read as somebody asks for them, until something goes wrong."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from blockferry.blockmap import BlockMap, Kind
from blockferry.errors import BlockferryError
from blockferry.export.memory import Shown
from blockferry.layers import Layer
from blockferry.segments import Segments, segment_kinds

log = logging.getLogger(__name__)


class View:
    """A volume that holds still. Read by several threads at once.

    After the first failure no read succeeds any more: a job that goes on all the same must not take what it got for
    the volume.
    """

    def __init__(self, shown: Shown, layer: Layer, check: Callable[[], None], *, problems: int | None = None) -> None:
        """Take what is shown, its bytes, and what raises BlockferryError when they do not hold still.

        Of a group, so many `problems` with its files are known.
        """
        # Whoever reads the files gets all of them: that some are as before is no matter of theirs.
        self.record = shown.record
        self.block_map = BlockMap.build(shown.record.size, data=shown.block_map.extents(Kind.DATA, Kind.SAME))
        kinds = segment_kinds(self.block_map.on_grid(self.record.unit), self.record.unit)
        self.segments = Segments(self.record.size, self.record.unit, kinds, shown.stamps)
        self.image_stamp = shown.image_stamp
        self.layer = layer
        self.changed = int((shown.block_map.on_grid(self.record.unit)).extents(Kind.DATA).total)
        self.problems = problems
        self.bytes_read = 0
        self.failure = ""
        self._check = check
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The volume's name."""
        return self.record.volume

    @property
    def newest(self) -> int:
        """The latest of all stamps, in ns since the epoch."""
        return max(int(np.max(self.segments.stamps, initial=0)), self.image_stamp)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the volume; OSError with EIO if it cannot be had, or could not before."""
        if not self.failure:
            try:
                self.layer.read_into(offset, buffer)
            except BaseException as error:  # whatever it is, nobody may go on from here
                self._fail(error)
        if self.failure:
            raise OSError(errno.EIO, self.failure)
        with self._lock:
            self.bytes_read += len(buffer)

    def check(self) -> None:
        """Find out whether the volume still holds still."""
        try:
            self._check()
        except BlockferryError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.failure:
                self.failure = error.message if isinstance(error, BlockferryError) else f"internal error: {error!r}"
                log.error("%s: %s", self.name, self.failure)

    def status(self) -> dict[str, Any]:
        """Return the figures that `export --json` and `release --json` print; sizes in bytes."""
        record = self.record
        return {
            "name": record.volume,
            "path": record.path,
            "snapshot": record.snapshot,
            "tier": record.tier.value,
            "tier_reason": record.tier_reason,
            "method": record.method,
            "tracker": record.tracker,
            "tracker_ready": bool(record.checkpoints),
            "stability": record.stability.value,
            "freeze": record.freeze,
            "unit": record.unit,
            "bytes_volume": record.size,
            "bytes_used": record.bytes_used,
            "bytes_changed": record.bytes_changed,
            "bytes_new": self.changed,
            "bytes_read": self.bytes_read,
            "failure": self.failure,
        } | ({} if self.problems is None else {"problems": self.problems})
