"""The log index in Redis or Valkey: for any number of hosts."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockferry.cluster import redis_scripts as scripts
from blockferry.cluster.index import (
    QUEUE_BYTES,
    LogIndex,
    checked_chunks,
    checked_name,
    from_text,
    not_open,
    to_text,
)
from blockferry.cluster.redis_address import parse, password
from blockferry.errors import ToolMissingError
from blockferry.extents import Offsets
from blockferry.hookspecs import hookimpl

if TYPE_CHECKING:
    from blockferry.cluster.redis_server import Link, Server

_WAIT = 1.0
"""Seconds for which the server itself is asked to wait: shorter than it may be silent."""
_NAMES = f"{scripts.PREFIX}names"
_KINDS = ("key", "epoch", "all", "host", "queue", "bytes", "bell")


@hookimpl
def blockferry_log_index(reference: str) -> LogIndex | None:
    """Return the index in a Redis."""
    address = parse(reference)
    if address is None:
        return None
    try:
        from blockferry.cluster.redis_server import Server  # noqa: PLC0415  # takes a while, and few need it
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ToolMissingError(
            f"{address.reference}: the Python package redis is not installed",
            remedy="Install it where blockferry is: pip install 'blockferry[redis]'.",
        ) from None
    return RedisIndex(Server(address, password()))


class RedisIndex:
    """A log index in a Redis. Implements `LogIndex`; an epoch lives as long as the server's process."""

    def __init__(self, server: Server) -> None:
        """Take a server that answers; it is closed with the index."""
        self.reference = server.reference
        self._server = server

    def put(self, key: str, value: dict[str, Any], *, new: bool = False, lasts: float | None = None) -> bool:
        """Keep an object under a key."""
        name = _name("key", key)
        milliseconds = "" if lasts is None else max(1, math.ceil(lasts * 1000))
        keys = (_NAMES, _key(name))
        arguments = (name, to_text(value), milliseconds, "NX" if new else "")
        return bool(self._server.use(lambda link: link.run(scripts.PUT, keys, *arguments)))

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key."""
        text = self._server.use(lambda link: link.ask("GET", _key(_name("key", key))))
        return None if text is None else from_text(self.reference, key, text)

    def list(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return what is kept under the keys that begin with a prefix."""
        found = self._server.use(lambda link: link.run(scripts.LIST, (_NAMES,), _name("key", prefix)))
        names = (name.decode("utf-8", "replace").removeprefix("key:") for name in found[0::2])
        return {name: from_text(self.reference, name, text) for name, text in zip(names, found[1::2], strict=True)}

    def remove(self, prefix: str) -> None:
        """Forget what begins with a prefix."""
        prefixes = [_name(kind, prefix) for kind in _KINDS]
        self._server.use(lambda link: link.run(scripts.REMOVE, (_NAMES,), *prefixes))

    def open_claims(self, epoch: str) -> None:
        """Let chunks be claimed."""
        name = _name("epoch", epoch)
        keys = (_NAMES, _key(name))
        if not self._server.use(lambda link: link.run(scripts.OPEN, keys, name, *_states(link))):
            raise not_open(self.reference, epoch)

    def close_claims(self, epoch: str) -> None:
        """Let no further chunk be claimed."""
        keys = (_key(_name("epoch", epoch)),)
        self._server.use(lambda link: link.run(scripts.CLOSE, keys, *_states(link)))

    def claim(self, epoch: str, host: str, chunks: Offsets) -> npt.NDArray[np.bool_]:
        """Claim chunks, by one script."""
        packed = checked_chunks(chunks).astype("<u4").tobytes()
        names = (_name("all", epoch), _name("host", epoch, host))
        keys = (_NAMES, _key(_name("epoch", epoch)), *map(_key, names))
        won = self._server.use(lambda link: link.run(scripts.CLAIM, keys, _states(link)[0], packed, *names))
        if won is None:
            raise not_open(self.reference, epoch)
        return np.frombuffer(won, np.bool_)

    def claimed(self, epoch: str, host: str) -> Offsets:
        """Return the chunks of which a host is the first."""
        keys = (_key(_name("epoch", epoch)), _key(_name("host", epoch, host)))
        bits = self._server.use(lambda link: link.run(scripts.CLAIMED, keys, *_states(link)))
        if bits is None:
            raise not_open(self.reference, epoch)
        return _set_in(np.frombuffer(bits, np.uint8))

    def push(self, queue: str, piece: bytes) -> bool:
        """Add a piece to a queue."""
        names = [_name(kind, queue) for kind in ("queue", "bytes", "bell")]
        keys = (_NAMES, *map(_key, names))
        return bool(self._server.use(lambda link: link.run(scripts.PUSH, keys, piece, QUEUE_BYTES, *names)))

    def pop(self, queue: str, wait: float) -> bytes | None:
        """Take the first piece of a queue."""
        keys = [_key(_name(kind, queue)) for kind in ("queue", "bytes")]
        bell = _key(_name("bell", queue))
        deadline = time.monotonic() + wait
        while True:
            piece: bytes | None = self._server.use(lambda link: link.run(scripts.POP, keys))
            left = min(deadline - time.monotonic(), _WAIT)
            if piece is not None or left <= 0:
                return piece
            seconds = f"{max(left, 0.01):.3f}"  # 0 would be for ever
            self._server.use(lambda link, seconds=seconds: link.ask("BLPOP", bell, seconds))  # type: ignore[misc]

    def close(self) -> None:
        """Let go of the server."""
        self._server.close()


def _name(kind: str, *names: str) -> str:
    return f"{kind}:" + "\0".join(checked_name(name) for name in names)


def _key(name: str) -> str:
    return scripts.PREFIX + name


def _states(link: Link) -> tuple[str, str]:
    """Return how an open and a closed epoch of this life of the server are written."""
    return f"open {link.life}", f"closed {link.life}"


def _set_in(bitmap: npt.NDArray[np.uint8]) -> Offsets:
    """Return the numbers of the bits that are set; most of a bitmap is zero."""
    filled = np.flatnonzero(bitmap)
    row, bit = np.nonzero(np.unpackbits(bitmap[filled]).reshape(-1, 8))
    return (filled[row] * 8 + bit).astype(np.int64)
