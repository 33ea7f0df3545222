"""An image file in use is cloned in one instant (FICLONE: XFS, btrfs and others), and the clone is read.

The clone has no name (O_TMPFILE): it goes with the process, whatever ends it, and is reached as /proc/self/fd/N.
Sharing blocks, it takes room only for what is written to the image meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from blockferry import kernel
from blockferry.freeze import CannotHoldError, entered
from blockferry.freeze.fsfreeze import filesystems_frozen
from blockferry.hookspecs import Declined, FreezeOptions, Frozen, hookimpl
from blockferry.snapshot import Stability
from blockferry.volume import Volume


@hookimpl
def blockferry_freeze(
    volume: Volume, options: FreezeOptions, declined: Declined
) -> AbstractContextManager[Frozen] | None:
    """Hold an image file still by cloning it."""
    if volume.is_device:
        declined("reflink: it is a device, not an image file")
        return None
    return entered("reflink", _held(volume, options.fsfreeze_seconds), declined)


@contextlib.contextmanager
def _held(volume: Volume, seconds: float | None) -> Iterator[Frozen]:
    with contextlib.ExitStack() as opened:
        source = _open(Path(volume.path), os.O_RDONLY, opened)
        # Beside the image: clones are made within one filesystem. The image may be named by a symbolic link.
        directory = Path(volume.path).resolve().parent
        target = _open(directory, os.O_RDWR | os.O_TMPFILE, opened)
        stability, method = _clone(volume, source, target, seconds)
        size = os.fstat(target).st_size
        if size < volume.offset + volume.size:
            raise CannotHoldError(f"the image has shrunk to {size} bytes")
        yield Frozen(dataclasses.replace(volume, path=f"/proc/self/fd/{target}"), stability, method)


def _clone(volume: Volume, source: int, target: int, seconds: float | None) -> tuple[Stability, str]:
    """Clone the image, its filesystems frozen meanwhile if that is allowed and possible; say how it went."""
    stability, method = Stability.CRASH_CONSISTENT, "reflink copy"
    with contextlib.ExitStack() as frozen:
        if seconds is not None:
            try:
                how, check = frozen.enter_context(filesystems_frozen(volume, seconds))
            except CannotHoldError as reason:
                method = f"reflink copy ({reason})"
            else:
                frozen.callback(check)  # right before the thaw
                stability = Stability.FROZEN
        began = time.monotonic()
        try:
            kernel.clone(source, target)
        except OSError as error:
            raise CannotHoldError(f"the image cannot be cloned: {error.strerror}") from None
        if stability is Stability.FROZEN:
            method = f"reflink copy under {how} for {time.monotonic() - began:.3f} s"
    return stability, method


def _open(path: Path, flags: int, opened: contextlib.ExitStack) -> int:
    """Open a file until the backup's end."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotHoldError(f"{path}: {error.strerror}") from None
    opened.callback(os.close, descriptor)
    return descriptor
