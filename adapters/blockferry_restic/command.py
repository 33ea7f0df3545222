"""Running restic: what it says line by line, in JSON, and what its exit codes mean.

Exit codes and messages: restic's documentation, "Scripting". restic says things on both of its streams, so both are
read. It never asks anything: it has no terminal, and what it would ask for is an error here.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import os
import re
import selectors
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from blockferry.errors import PassphraseError, RepositoryError, RepositoryLockedError, ToolMissingError
from blockferry.fuse import mount_point
from blockferry.programs import find
from blockferry_restic.location import Location

log = logging.getLogger(__name__)

OLDEST = (0, 18)
"""The first series whose exit codes, `--no-scan` and summaries this relies on."""

_NOTICED = re.compile(r"signal \S+ received, cleaning up")
_LONGEST_LINE = 64 << 20
"""`restic snapshots --json` is one line, of about 700 bytes a snapshot."""
_NOTICE = 2.0
"""Seconds in which restic is sure to have noticed a signal."""
_PATIENCE = 30.0
"""Seconds that restic has to finish after it was told to."""
_MOUNT_PATIENCE = 600.0
"""Seconds that `restic mount` may take: it loads the whole index first, over whatever line there is."""


class Restic:
    """restic, as it works on one repository."""

    def __init__(self, location: Location) -> None:
        self.location = location

    def start(self, *arguments: str, directory: str | None = None) -> Running:
        """Start restic with `arguments`, in `directory`; it dies with the thread that calls this."""
        # Never as subprocess's own `cwd`: the directory may be served by this very process (blockferry/fuse.py).
        chdir = [find("env"), f"--chdir={directory}"] if directory else []
        return Running([*_bound_to_us(), *chdir, *self._words(), *arguments], self.location)

    def each(self, *arguments: str) -> Iterator[Any]:
        """Run restic and yield what it says, decoded, as it says it; raise RepositoryError, by kind, if it fails."""
        with self.start(*arguments) as running:
            yield from running.messages()
            running.check(arguments[0])

    @contextlib.contextmanager
    def mount(self, *arguments: str) -> Iterator[Path]:
        """Have `restic mount` with `arguments` show the repository for the length of the context; give where it does.

        It is not bound to the calling thread: it ends when the mount is taken away, which `mount_point` sees to.
        """
        with mount_point("restic") as point, tempfile.TemporaryFile() as said:
            command = [*self._words(), "mount", "--no-lock", *arguments, str(point)]
            with _spawn(command, self.location, stdout=said, stderr=said) as process:
                try:
                    if not _appears(point, process):
                        said.seek(0)
                        notes = self._notes(said.read(1 << 16))
                        raise failure("mount", process.returncode or 1, notes, self.location.reference)
                    yield point
                finally:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_PATIENCE)
                    process.kill()

    def dump(self, snapshot: str, path: str, limit: int) -> bytes:
        """Return the content of a file in a snapshot; raise RepositoryError if it is missing or beyond `limit`."""
        command = [*_bound_to_us(), *self._words(), "dump", "--json", "--no-lock", snapshot, path]
        with tempfile.TemporaryFile() as found, tempfile.TemporaryFile() as said:
            with _spawn(command, self.location, stdout=found, stderr=said) as process:
                try:
                    code = process.wait()
                except BaseException:
                    process.kill()
                    raise
            if code:
                said.seek(0)
                raise failure("dump", code, self._notes(said.read(1 << 16)), self.location.reference)
            found.seek(0)
            content = found.read(limit + 1)
        if len(content) > limit:
            raise RepositoryError(f"{self.location.reference}: {path} of snapshot {snapshot} is beyond all bounds")
        return content

    def _words(self) -> list[str]:
        """Return the first words of every command line."""
        return [binary(self.location.variables), *self.location.options]

    def _notes(self, said: bytes) -> list[str]:
        """Return the complaints in what restic said."""
        return [self.location.hide(note) for _value, note in map(_understand, said.splitlines()) if note]


class Running:
    """A restic that was started. Leaving the context ends it if it has not ended.

    `interrupt` may be called from any thread, everything else by the one that started it.
    """

    def __init__(self, command: Sequence[str], location: Location) -> None:
        self._location = location
        self._notes: collections.deque[str] = collections.deque(maxlen=20)
        self._noticed = threading.Event()
        self._deadline: float | None = None
        self._process = _spawn(command, location, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._unfinished = {stream: bytearray() for stream in (self._process.stdout, self._process.stderr) if stream}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        for stream in self._unfinished:
            stream.close()

    def messages(self) -> Iterator[Any]:
        """Yield every JSON value that restic prints on either stream, until it ends, or is too slow to stop.

        Lines that are not JSON are kept for the error message.
        """
        with selectors.DefaultSelector() as selector:
            for stream, line in self._unfinished.items():
                selector.register(stream, selectors.EVENT_READ, line)
            while selector.get_map():
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._process.kill()
                    break
                for key, _events in selector.select(1.0):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    yield from self._values(key.data, chunk)
        self._noticed.set()

    def interrupt(self) -> None:
        """Tell restic to stop without making a snapshot; return as soon as it says so, or a little later.

        Not by SIGINT, which is ignored in everything that a shell without a terminal started in the background.
        """
        self.terminate()
        # It does not always get to say so. What it then did all the same is for `Repository.store` to undo.
        self._noticed.wait(_NOTICE)

    def stop(self) -> list[Any]:
        """End restic if it has not ended, gently first; return what it still said."""
        if self._process.poll() is None:
            self.terminate()
        said = list(self.messages())
        self._process.kill()
        self._process.wait()
        return said

    def terminate(self) -> None:
        """Send SIGTERM, if it has not ended, and set the time at which patience ends."""
        if self._deadline is None:
            self._deadline = time.monotonic() + _PATIENCE
        self._process.terminate()

    def check(self, verb: str) -> None:
        """Wait for restic's end; raise RepositoryError, by kind, if it failed."""
        code = self._process.wait()
        if code:
            raise failure(verb, code, list(self._notes), self._location.reference)

    def _values(self, line: bytearray, chunk: bytes) -> Iterator[Any]:
        """Add a chunk to an unfinished line; yield what the lines that it finishes say."""
        line += chunk
        if b"\n" not in chunk and chunk:
            if len(line) > _LONGEST_LINE:
                raise RepositoryError(f"{self._location.reference}: restic prints a line without an end")
            return
        *finished, rest = bytes(line).split(b"\n")
        line[:] = rest
        for each in finished if chunk else [*finished, rest]:
            value, note = _understand(each)
            if note:
                log.debug("restic: %s", self._location.hide(note))
                self._notes.append(self._location.hide(note))
                if _NOTICED.search(note):
                    self._noticed.set()
            if value is not None:
                yield value


def failure(verb: str, code: int, notes: Sequence[str], reference: str) -> RepositoryError:
    """Return the error that an exit code of `restic VERB` stands for; `notes` is what restic said, last word last."""
    words = notes[-1].removeprefix("Fatal: ").splitlines()[0] if notes else "it said nothing"
    kind: type[RepositoryError] = RepositoryError
    if code == 10:
        what, remedy = "there is no restic repository", "Check the path; `restic init` makes one."
    elif code == 11:
        kind, what = RepositoryLockedError, f"the repository is locked: {words}"
        remedy = "Try again when the other restic has finished; `restic unlock` removes the locks of dead ones."
    elif code == 12:
        kind, what = PassphraseError, "the password is wrong"
        remedy = "Check RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD."
    elif "empty password" in words or "unable to read password" in words:
        kind, what = PassphraseError, "no password is set"
        remedy = "Set RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD."
    elif code == 130:
        what, remedy = f"restic {verb} was interrupted", "Nothing was stored; run it again."
    elif any("no space left on device" in note for note in notes):
        what, remedy = "the repository's disk is full", "Make room there (restic prune), then run it again."
    elif code < 0:
        what, remedy = f"restic {verb} was killed by signal {-code}", "Out of memory? See the kernel log."
    else:
        what = f"restic {verb} failed with exit code {code}: {words}"
        remedy = "`restic check` tells whether the repository is sound."
    return kind(f"{reference}: {what}", remedy=remedy)


def binary(environment: Mapping[str, str]) -> str:
    """Return the path of restic, from $BLOCKFERRY_RESTIC or PATH; ToolMissingError if it is missing or too old."""
    named = environment.get("BLOCKFERRY_RESTIC", "restic")
    found = shutil.which(named, path=environment.get("PATH"))
    oldest = ".".join(map(str, OLDEST))
    if found is None:
        raise ToolMissingError(
            f"{named} is not installed",
            remedy=f"Install restic {oldest} or later, or set BLOCKFERRY_RESTIC to its path.",
        )
    series = _series(found)
    if series < OLDEST:
        raise ToolMissingError(
            f"{found}: is of version {series[0]}.{series[1]}; {oldest} is the oldest that will do",
            remedy="Install a newer restic (`restic self-update`), or set BLOCKFERRY_RESTIC to the path of one.",
        )
    return found


@functools.cache
def _series(path: str) -> tuple[int, int]:
    """Return the version of a restic, (0, 0) if it does not say."""
    done = subprocess.run([path, "version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    match = re.match(r"restic (\d+)\.(\d+)", done.stdout.decode("utf-8", "replace"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _appears(point: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until something is mounted; tell whether it was before the process ended or patience did."""
    deadline = time.monotonic() + _MOUNT_PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if point.is_mount():
                return True
        time.sleep(0.05)
    return False


def _bound_to_us() -> list[str]:
    """Return the words before a command that make the kernel kill it when the thread that starts it dies."""
    return [find("setpriv"), "--pdeathsig", "KILL"]


def _spawn(command: Sequence[str], location: Location, *, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
    """Start a process without a terminal: Ctrl-C reaches us alone, and we decide how restic ends."""
    return subprocess.Popen(
        command,
        env=location.environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def _understand(line: bytes) -> tuple[Any, str]:
    """Return a line's JSON value, None if it is none, and the complaint in it, "" if there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None, re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", line.decode("utf-8", "replace")).strip()
    match value:
        case {"message_type": "exit_error", "message": str(message)}:
            return value, message
        case {"message_type": "error", "error": {"message": str(message)}, "item": str(item)}:
            return value, f"{item}: {message}"
        case _:
            return value, ""
