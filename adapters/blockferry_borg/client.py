"""Our side of the worker: starting it, asking it, reading what it logs. `worker/__init__.py` has the protocol."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from blockferry.errors import RepositoryError
from blockferry.programs import KEEP_FREED_MEMORY
from blockferry_borg.environment import BorgEnvironment
from blockferry_borg.failures import failure, without_credentials
from blockferry_borg.installation import Installation

log = logging.getLogger(__name__)

SLOTS = 4
SLOT_SIZE = 16 << 20
"""Bytes of a slot: what the largest chunk needs. Memory that nobody writes to is not there."""
BATCH = 8 << 20
"""Bytes of a slot that are filled at a time, or one chunk: some chunks, so that asking costs nothing."""

_LOOK_EVERY = 1.0
"""Seconds between two looks at whether a worker hangs."""
_PATIENCE = 60.0
"""Seconds for which a worker may roll back and let go of its lock before it is told to, and then made to."""

Reply = dict[str, Any]


class Worker:
    """A worker process and the memory shared with it. Used from one thread at a time.

    Any reply may be an error instead; after that, and after `close`, the process is gone.
    """

    def __init__(self, installation: Installation, repository: str, environment: BorgEnvironment) -> None:
        self.environment = environment
        self.where = f"borg:{without_credentials(repository)}"
        descriptor = os.memfd_create("blockferry")
        try:
            os.ftruncate(descriptor, SLOTS * SLOT_SIZE)
            self._memory = memoryview(mmap.mmap(descriptor, SLOTS * SLOT_SIZE))
            self._process = _start(installation, descriptor, environment)
        finally:
            os.close(descriptor)
        assert self._process.stdin and self._process.stdout  # noqa: S101  # both are pipes
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._listener = _started(self._listen, "borg log")
        self._greeted = False
        self._hung = False
        self._deadline: float | None = None
        self._watcher: threading.Thread | None = None
        try:
            self.send(
                repository=repository, lock_wait=environment.lock_wait(), umask=environment.umask(), slot=SLOT_SIZE
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def slot(self, number: int) -> memoryview:
        """Return the shared bytes of a slot."""
        return self._memory[number * SLOT_SIZE : (number + 1) * SLOT_SIZE]

    def send(self, **request: Any) -> None:
        """Send a request; if the worker is gone the next `receive` says why."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def receive(self, patience: float | None = None) -> Reply:
        """Return the next reply; raise the BlockferryError that it stands for, or that the worker died of.

        `patience` is for how many seconds to wait, where no answer takes long: then a worker that hangs is killed.
        """
        if not self._greeted:
            # Only now: whoever starts a worker has other things to do while it imports borg.
            self._greeted = True
            self.receive(None if patience is None else patience + self.environment.lock_wait())
        if patience is not None:
            self._deadline = time.monotonic() + patience
            self._watcher = self._watcher or _started(self._watch, "borg watch")
        line = self._replies.readline()
        self._deadline = None
        if not line.endswith(b"\n"):
            self.close()
            how = "did not answer in time" if self._hung else f"ended with status {self._process.returncode}"
            raise RepositoryError(
                f"{self.where}: borg's process {how}{self._last_words()}",
                remedy="Try the same with borg itself (borg info, borg check).",
            )
        reply: Reply = json.loads(line)
        if "error" in reply and "read" not in reply:
            self.close()
            raise self.error(reply)
        return reply

    def ask(self, *, patience: float | None = None, **request: Any) -> Reply:
        """Send a request and return the reply; `patience` as for `receive`."""
        self.send(**request)
        return self.receive(patience)

    def error(self, reply: Reply) -> Exception:
        """Return the error that a reply carries."""
        told = reply["error"]
        message = told["message"]
        if told["kind"].startswith("ConnectionClosed"):
            message += self._last_words()
        return failure(self.where, told["kind"], message, told["number"])

    def close(self) -> None:
        """Have the worker roll back what is not finished, let go of its lock and end. Closing twice is allowed."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        for insist in (self._process.terminate, self._process.kill, None):
            try:
                self._process.wait(_PATIENCE)
                break
            except subprocess.TimeoutExpired:
                if insist:
                    insist()
        self._listener.join(1)
        self._replies.close()

    def _watch(self) -> None:
        """Kill a worker that lets its deadline pass: it hangs on a network that is gone, or a disk."""
        while self._process.poll() is None:
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._hung = True
                self._process.kill()
            time.sleep(_LOOK_EVERY)

    def _listen(self) -> None:
        """Pass on what the worker logs: warnings to the log, all of it to whoever asks why it died."""
        assert self._process.stderr  # noqa: S101  # a pipe
        with self._process.stderr as lines:
            for line in lines:
                text = without_credentials(_message(line.decode("utf-8", "replace").strip()))
                if text:
                    self._said.append(text)
                    log.warning("%s: %s", self.where, text)

    def _last_words(self) -> str:
        self._listener.join(1)
        return f": {self._said[-1]}" if self._said else ""


def _start(installation: Installation, memory: int, environment: BorgEnvironment) -> subprocess.Popen[bytes]:
    """Start the worker, apart from the terminal: an interrupt is ours to pass on, and nothing can prompt there."""
    secret = environment.passphrase_pipe()
    script = Path(__file__).with_name("worker") / "__main__.py"
    try:
        return subprocess.Popen(
            [*installation.interpreter, "-u", str(script), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment.for_process(KEEP_FREED_MEMORY, secret),
            pass_fds=[memory] if secret is None else [memory, secret],
            start_new_session=True,
        )
    finally:
        if secret is not None:
            os.close(secret)


def _started(work: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _message(line: str) -> str:
    """Return what a line of borg's JSON log says, or the line if it is no such thing."""
    try:
        told = json.loads(line)
        return str(told.get("message") or "") if told.get("type") != "progress_percent" else ""
    except (ValueError, AttributeError):
        return line
