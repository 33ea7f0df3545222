"""Running the `borg` command, for borgs that can be had in no other way.

Exit codes: 0 done, 1 and 100 to 127 done with warnings, all else failed (borg, "Usage: General", return codes). With
`--log-json` every line of standard error is a JSON object, and an error's has its `msgid`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from blockferry.errors import DamagedSnapshotError, ToolMissingError
from blockferry.fuse import mount_point
from blockferry_borg.environment import BorgEnvironment
from blockferry_borg.failures import failure, without_credentials

log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds that borg has to roll back after it was told to end."""
_MOUNT_PATIENCE = 600.0
"""Seconds that `borg mount` may take: it reads all of an archive's items first."""
_POLL = 0.05


class Borg:
    """The `borg` command as it works on one repository, which it is told of by BORG_REPO: not for all to see."""

    def __init__(self, command: str, location: str, environment: BorgEnvironment) -> None:
        self.command = command
        self.where = f"borg:{without_credentials(location)}"
        self._repository = location
        self.environment = environment

    def run(self, *arguments: str) -> None:
        """Run borg to its end; raise what its failure stands for. Warnings are logged."""
        with self.start(*arguments) as running:
            running.wait()
            running.check(warnings_are_errors=False)

    def listing(self, *arguments: str) -> dict[str, Any]:
        """Run borg and return the JSON object that it prints."""
        with self.start(*arguments) as running:
            running.wait()
            running.check(warnings_are_errors=False)
            return running.json()

    @contextlib.contextmanager
    def start(self, *arguments: str, directory: Path | None = None, piped: bool = False) -> Iterator[Running]:
        """Start borg, in `directory`; leaving the context ends it if it has not ended.

        With `piped` its standard output is a pipe to read from, else it is kept.
        """
        umask = self.environment.umask()
        command = [self.command, "--log-json", "--lock-wait", str(self.environment.lock_wait())]
        command += [*(["--umask", umask] if umask else []), *arguments]
        if directory:
            # Never by subprocess's own `cwd`: this very process may serve the directory (blockferry/fuse.py).
            command = ["env", f"--chdir={directory}", *command]
        secret = self.environment.passphrase_pipe()
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as printed:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if piped else printed,
                    stderr=said,
                    env=self.environment.for_process({"BORG_REPO": self._repository}, secret),
                    pass_fds=[] if secret is None else [secret],
                    start_new_session=True,
                )
            finally:
                if secret is not None:
                    os.close(secret)
            running = Running(process, self.where, said, printed)
            try:
                yield running
            finally:
                running.end()

    @contextlib.contextmanager
    def mount(self, *arguments: str, item: str) -> Iterator[Path]:
        """Have `borg mount`, in the foreground, show an archive for the length of the context; give the item's path.

        Raise ToolMissingError if this borg cannot mount.
        """
        # Unmounting ends borg; a signal would not, while it waits for its kernel.
        with contextlib.ExitStack() as started, mount_point("borg") as point:
            running = started.enter_context(self.start(*arguments, str(point)))
            started.callback(running.wait, _PATIENCE)
            end = time.monotonic() + _MOUNT_PATIENCE
            while running.running() and not point.is_mount() and time.monotonic() < end:
                time.sleep(_POLL)
            if not point.is_mount():
                running.interrupt()
                raise ToolMissingError(
                    f"{self.where}: {running.message() or 'borg mount does not answer'}",
                    remedy="Install a borg that can mount (with pyfuse3 or llfuse; mfusepy for borg 2).",
                )
            found = next(iter(point.rglob(item)), None)
            if found is None:
                raise DamagedSnapshotError(
                    f"{self.where}: the archive holds no {item}", remedy="Look at it with `borg list`."
                )
            yield found


class Running:
    """A borg that was started."""

    def __init__(self, process: subprocess.Popen[bytes], where: str, said: IO[bytes], printed: IO[bytes]) -> None:
        self._process, self._where, self._said, self._printed = process, where, said, printed
        self.pipe = process.stdout

    def running(self) -> bool:
        """Tell whether borg has not ended yet."""
        return self._process.poll() is None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for borg's end, or for some time; tell whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def interrupt(self) -> None:
        """Have borg roll back and end. May be called from any thread."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End borg, and wait until it has."""
        if self.pipe:
            self.pipe.close()
        if self.running():
            self.interrupt()
            if not self.wait(_PATIENCE):
                self._process.kill()
        self._process.wait()

    def json(self) -> dict[str, Any]:
        """Return the JSON object that borg printed."""
        self._printed.seek(0)
        printed: dict[str, Any] = json.load(self._printed)
        return printed

    def message(self) -> str:
        """Return the last thing that borg said."""
        return next((text for _level, _kind, text in reversed(list(self._messages()))), "")

    def check(self, *, warnings_are_errors: bool) -> None:
        """Raise what an exit code of borg's, that has ended, stands for."""
        code = self._process.returncode
        warned = code == 1 or 100 <= code <= 127
        told = [(level, kind, text) for level, kind, text in self._messages() if text]
        if code == 0 or (warned and not warnings_are_errors):
            for _level, _kind, text in told:
                log.warning("%s: %s", self._where, without_credentials(text))
            return
        grave = [each for each in told if each[0] in ("ERROR", "CRITICAL") and each[1]] or told
        _level, kind, text = grave[0] if grave else ("", "", f"ended with status {code}")
        raise failure(self._where, kind or "borg", text)

    def _messages(self) -> Iterator[tuple[str, str, str]]:
        """Yield (level, message id, text) of everything borg said."""
        self._said.seek(0)
        for line in self._said:
            plain = line.decode("utf-8", "replace").strip()
            try:
                told = json.loads(plain)
                yield told.get("levelname", ""), told.get("msgid") or "", str(told.get("message") or "")
            except (ValueError, AttributeError):
                yield "", "", plain


def literal(text: str) -> str:
    """Return a text in which borg finds no placeholders (`borg help placeholders`)."""
    return text.replace("{", "{{").replace("}", "}}")
