"""The log index: the small memory that all hosts of a shared volume have in common.

    keys      name -> a small JSON object, some of which vanish by themselves
    claims    epoch, chunk -> the host that was the first to claim it; of a chunk only the first claim counts
    queues    pieces of bytes, handed from one host to another, of bounded size

An index has to remember every claim of an epoch or to know that it does not: a second host that wins the same chunk
brings an image of it that is too new. So an epoch's claims are bound to one life of the index (a Redis process, or the
time until a host starts again), and whatever comes from another life is as closed.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from blockferry.errors import EpochClosedError, LogIndexError
from blockferry.extents import Offsets

PATIENCE = 2.0
"""Seconds after which a call has failed: a guard holds a write meanwhile."""
QUEUE_BYTES = 16 << 20
"""A queue that holds so many bytes takes no further piece. It has to fit into the index beside the claims."""
CHUNKS = 1 << 32
"""Chunks are numbered below this: 256 TiB of 64 KiB each."""


class LogIndex(Protocol):
    """An index that hosts share. May be used from several threads at once, not across a fork.

    Every call ends within PATIENCE seconds and raises LogIndexError if the index does not answer, is full or refuses.
    A call that failed may have taken effect nevertheless; `claim`, `put` without `new` and `remove` can be repeated.
    Nothing is tried again here. Names are any text without NUL; a name that begins with another lies below it.
    """

    reference: str
    """As the user wrote it, without credentials, so that it is the same on all hosts."""

    def put(self, key: str, value: dict[str, Any], *, new: bool = False, lasts: float | None = None) -> bool:
        """Keep an object that JSON can hold under a key, for `lasts` seconds if that is given.

        If it has to be `new` and there is one already, keep that and return False.
        """

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key, None if nothing is."""

    def list(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return what is kept under the keys that begin with a prefix, by key."""

    def remove(self, prefix: str) -> None:
        """Forget the keys, epochs with their claims, and queues whose names begin with a prefix."""

    def open_claims(self, epoch: str) -> None:
        """Let chunks be claimed in an epoch from now on; EpochClosedError if it is of another life of the index."""

    def close_claims(self, epoch: str) -> None:
        """Let no further chunk be claimed in an epoch. What was claimed is remembered."""

    def claim(self, epoch: str, host: str, chunks: Offsets) -> npt.NDArray[np.bool_]:
        """Claim chunks, all in one round trip; true where this host is the first, now or by an earlier claim.

        Raise EpochClosedError if claims of the epoch are not open: closed, never opened, or the index does not
        remember all of them. Then nothing was claimed.
        """

    def claimed(self, epoch: str, host: str) -> Offsets:
        """Return the chunks of which a host is the first, sorted.

        Raise EpochClosedError if the index does not know the epoch, or does not remember all of its claims: none at
        all, and none that is known, are different answers.
        """

    def push(self, queue: str, piece: bytes) -> bool:
        """Add a piece to the end of a queue; False if it holds QUEUE_BYTES already: try again later."""

    def pop(self, queue: str, wait: float) -> bytes | None:
        """Take the first piece of a queue; None if there is none within `wait` seconds, which PATIENCE does not count.

        Each piece goes to one caller, once. If the call fails it may be lost.
        """

    def close(self) -> None:
        """Let go of connections. Closing twice is allowed, any other call after it raises LogIndexError."""


def checked_name(name: str) -> str:
    """Return a name; ValueError if it holds a NUL, which separates names that are kept as one."""
    if "\0" in name:
        raise ValueError(f"{name!r}: a name in the log index holds a NUL")
    return name


def checked_chunks(chunks: Offsets) -> Offsets:
    """Return the numbers of chunks; ValueError if one is out of range."""
    if chunks.size and (int(chunks.min()) < 0 or int(chunks.max()) >= CHUNKS):
        raise ValueError("a chunk's number is out of range")
    return chunks


def to_text(value: dict[str, Any]) -> str:
    """Return an object as it is kept."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def from_text(reference: str, key: str, text: str | bytes) -> dict[str, Any]:
    """Return the object that is kept under a key; LogIndexError if it is none of ours."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LogIndexError(
            f"{reference}: what is kept under {key} was not written by blockferry",
            remedy="Give blockferry an index that nothing else writes to.",
        )
    return value


def not_open(reference: str, epoch: str) -> EpochClosedError:
    """Return the error of an epoch in which nothing can be claimed."""
    return EpochClosedError(
        f"{reference}: epoch {epoch} is closed, or the index does not remember all of its claims",
        remedy="This backup cannot be finished; begin another. If the index was started again, find out why.",
    )


def closed(reference: str) -> LogIndexError:
    """Return the error of an index that was let go of."""
    return LogIndexError(f"{reference}: the log index was closed", remedy="Open it again.")
