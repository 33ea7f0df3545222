"""The worker's end of the two pipes to the parent, and the memory shared with it."""

from __future__ import annotations

import json
import mmap
import os
from typing import Any


class Abandoned(BaseException):  # not an error, and no Exception: no handler of borg's may swallow it
    """The parent is gone, or wants us gone."""


class Channel:
    """Takes requests and sends replies. Standard input and output are its own from then on."""

    def __init__(self, descriptor: int) -> None:
        """Take over both, and the shared memory: what borg asks meets the end of a file, what it prints is logged."""
        self._memory = memoryview(mmap.mmap(descriptor, 0))
        self._requests = os.fdopen(os.dup(0), "rb")
        self._replies = os.fdopen(os.dup(1), "wb", buffering=0)
        self.slot_size = 0
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)

    def take(self) -> dict[str, Any]:
        """Return the next request; raise Abandoned at the end of standard input."""
        line = self._requests.readline()
        if not line.endswith(b"\n"):
            raise Abandoned
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, **reply: Any) -> None:
        """Send a reply; raise Abandoned if nobody reads it any more."""
        try:
            self._replies.write(json.dumps(reply).encode() + b"\n")
        except BrokenPipeError:
            raise Abandoned from None

    def slot(self, number: int) -> memoryview:
        """Return the shared bytes of a slot."""
        return self._memory[number * self.slot_size : (number + 1) * self.slot_size]
