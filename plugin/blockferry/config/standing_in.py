"""Running borgmatic with ourselves in borg's place: what it would tell borg, credentials resolved, it tells us.

borgmatic is given the path of a script as the borg to use (`--local-path`). The script hands what it was called with to
us, over a socket in a directory that only we can enter: nothing is written to a file or a command line, and what is
secret is read from the pipe that borgmatic made for borg.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from blockferry.errors import BlockferryError, ToolMissingError
from blockferry.state import state_directory

log = logging.getLogger(__name__)

COMMAND_VARIABLE = "BLOCKFERRY_BORGMATIC"
_LAST_LINES = 20
_POLL = 0.2
_PATIENCE = 30.0
"""Seconds that borgmatic has to end, with its hooks, after it was told to."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What borgmatic would have borg do."""

    words: Sequence[str]
    repository: str
    """BORG_REPO, "" where the words name the repository."""
    directory: str


@dataclasses.dataclass(frozen=True)
class Told:
    """What borg would find: its environment and the passphrase that was in its pipe."""

    environment: Mapping[str, str] = dataclasses.field(repr=False)
    passphrase: str | None = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Run:
    """The answer to a call that it is to be run: by borg, with these words."""

    words: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Done:
    """The answer to a call that was dealt with here."""

    status: int = 0
    said: str = ""


Take = Callable[[], Told]
"""Fetches, once, what borg would find."""
Answer = Callable[[Call, Take], Run | Done]


def command(environment: Mapping[str, str]) -> str:
    """Return the path of borgmatic, from BLOCKFERRY_BORGMATIC or PATH; raise ToolMissingError if there is none."""
    named = environment.get(COMMAND_VARIABLE) or "borgmatic"
    found = shutil.which(named, path=environment.get("PATH"))
    if found is None:
        raise ToolMissingError(
            f"{named} is not installed",
            remedy=f"Install borgmatic 2.1 or later, or set {COMMAND_VARIABLE} to its path.",
        )
    return found


def plain(line: str) -> str:
    """Return a line without colours, and without the passwords of the URLs in it."""
    return re.sub(r"(\w+://[^/\s:@]*):[^/\s@]*@", r"\1:***@", re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", line)).strip()


def run(
    words: Sequence[str],
    environment: Mapping[str, str],
    answer: Answer,
    *,
    said: Callable[[str], object] = lambda _line: None,
) -> tuple[int, list[str]]:
    """Run `borgmatic` with `words` and ourselves in borg's place, and return its exit status and its last lines.

    `answer` is called in this thread for each call of borg, one after the other; what it raises ends borgmatic, as a
    borg that failed does, and is raised when borgmatic has run its hooks. `said` gets each line that borgmatic prints.
    """
    with _place() as directory, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "socket"))
        listening.listen()
        listening.settimeout(_POLL)
        script = directory / "borg"
        asks = [sys.executable, "-I", str(Path(__file__).with_name("stand_in.py")), str(directory / "socket")]
        script.write_text(f'#!/bin/sh\nexec {shlex.join(asks)} "$@"\n')
        script.chmod(0o700)
        process = subprocess.Popen(
            [command(environment), "--local-path", str(script), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # an interrupt is ours to pass on
        )
        lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        assert process.stdout  # noqa: S101  # a pipe
        listener = threading.Thread(target=_listen, args=(process.stdout, lines, said), daemon=True)
        listener.start()
        failures: list[BaseException] = []
        try:
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(ConnectionError, BrokenPipeError):
                        connection.settimeout(None)
                        _serve(connection, answer, failures)
        finally:
            _end(process)
            listener.join(1)
    if failures:
        raise failures[-1]
    return process.returncode, list(lines)


def _serve(connection: socket.socket, answer: Answer, failures: list[BaseException]) -> None:
    """Answer one call; remember what went wrong for when borgmatic has ended. One that goes well forgives it."""
    with connection.makefile("rwb") as stream:

        def reply(**said: Any) -> None:
            stream.write(json.dumps(said).encode() + b"\n")
            stream.flush()

        def take() -> Told:
            reply(**{"hand over": True})
            told = json.loads(stream.readline())
            return Told(told["environment"], told["passphrase"])

        asked = json.loads(stream.readline())
        call = Call(asked["words"], asked["repository"], asked["directory"])
        try:
            answered = answer(call, take)
        except BlockferryError as error:
            failures.append(error)
            reply(status=2, said=error.message.splitlines()[0])
            return
        if isinstance(answered, Run):
            reply(run=list(answered.words))
        else:
            failures.clear()  # borgmatic tries again by itself
            reply(status=answered.status, said=answered.said)


def _listen(stream: IO[bytes], lines: collections.deque[str], said: Callable[[str], object]) -> None:
    """Keep the last lines that borgmatic prints, and pass each on."""
    with stream:
        for line in stream:
            text = plain(line.decode("utf-8", "replace"))
            if text:
                lines.append(text)
                said(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End borgmatic if it has not ended: gently, for the sake of its hooks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """Make a directory that only we can enter, where programs may lie: /tmp is not always such a place."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), state_directory()]  # noqa: S108  # mkdtemp makes it
    # borgmatic cuts what it is given at blanks.
    fit = (each for each in candidates if each.is_dir() and not re.search(r"\s", str(each)))
    parent = next((each for each in fit if not os.statvfs(each).f_flag & os.ST_NOEXEC), None)
    with tempfile.TemporaryDirectory(prefix="blockferry-", dir=parent) as made:
        yield Path(made)
