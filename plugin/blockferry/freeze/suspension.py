"""Filesystems frozen for a while, under a watchdog that thaws them whatever becomes of us.

The watchdog is a process of its own session. It thaws when our end of its pipe closes, when we are killed, and when
the time is over. Only if both of us are killed at once, as a service manager does to a whole control group at last,
the filesystem stays frozen: `fsfreeze --unfreeze MOUNTPOINT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from blockferry import kernel
from blockferry.errors import VolumeError
from blockferry.freeze import CannotHoldError, watchdog
from blockferry.state import state_directory
from blockferry.volume import Mount, all_mounts

_ASK_SECONDS = 1.0
"""How often the watchdog is asked whether somebody else thawed."""

_END_SECONDS = 10.0
"""How long the watchdog may take to thaw and end."""


@dataclasses.dataclass
class Suspension:
    """Filesystems that are frozen, by their mount points, and their watchdog."""

    points: list[str]
    seconds: float
    dog: _Watchdog
    asked: float = dataclasses.field(default_factory=time.monotonic)
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Whoever has it talks with the watchdog: many threads may read a volume, and an answer is for one of them."""

    def check(self, *, ask: bool = False) -> None:
        """Raise VolumeError if the time is over, or if somebody else thawed a filesystem or killed the watchdog.

        The latter is noticed within a second, or at once with `ask`.
        """
        with self.turn:
            if ask or time.monotonic() - self.asked > _ASK_SECONDS:
                self.asked = time.monotonic()
                self.dog.ask()
            elif not self.dog.has_answer():
                return
            answer = self.dog.answer()
        where = ", ".join(self.points)
        if answer == ["expired"]:
            raise VolumeError(
                f"{where}: the backup was not done when the {self.seconds:g} s for which it may be frozen were over",
                remedy="Allow more with --fsfreeze SECONDS, or use an LVM snapshot or an image on XFS or btrfs.",
            )
        if answer != ["frozen"]:
            raise VolumeError(
                f"{where}: somebody thawed it during the backup",
                remedy="Let no other tool freeze and thaw it meanwhile (fsfreeze, a guest agent, a storage snapshot).",
            )


@contextlib.contextmanager
def suspended(mounts: list[Mount], seconds: float) -> Iterator[Suspension]:
    """Keep the mounted filesystems from being written to, each in a state that needs no repair.

    Raise CannotHoldError if one cannot be frozen, or if something that we write to lies on it.
    """
    with contextlib.ExitStack() as opened:
        descriptors = _opened(mounts, opened)
        for descriptor in descriptors.values():
            kernel.syncfs(descriptor)  # what is dirty is written now, while others need not wait
        dog = _Watchdog(list(descriptors.values()), seconds)
        try:
            answer = dog.answer()
            if answer[:1] == ["failed"]:
                reason = os.strerror(int(answer[2]))
                raise CannotHoldError(f"{list(descriptors)[int(answer[1])]} cannot be frozen: {reason}")
            if answer != ["frozen"]:
                raise CannotHoldError("the watchdog that freezes did not start")
            yield Suspension(list(descriptors), seconds, dog)
        finally:
            dog.thaw()


def _opened(mounts: list[Mount], opened: contextlib.ExitStack) -> dict[str, int]:
    """Open a mount point of each filesystem; return the descriptors by mount point."""
    ours = {_superblock_of(path): purpose for purpose, path in reversed(list(_written_by_us()))}
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for mount in mounts:
        if mount.superblock in ours:
            raise CannotHoldError(f"{mount.point} cannot be frozen: {ours[mount.superblock]} lies on it")
        if mount.superblock not in found:
            try:
                descriptor = os.open(mount.point, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CannotHoldError(f"{mount.point} cannot be opened: {error.strerror}") from None
            opened.callback(os.close, descriptor)
            if _superblock(descriptor) == mount.superblock:  # else another filesystem is mounted over it
                found[mount.superblock] = mount.point, descriptor
    covered = [mount.point for mount in mounts if mount.superblock not in found]
    if covered:
        raise CannotHoldError(f"{covered[0]} cannot be frozen: another filesystem is mounted over it")
    return dict(found.values())


class _Watchdog:
    """Our end of the watchdog: `watchdog.py` has the words that it understands and says."""

    def __init__(self, descriptors: list[int], seconds: float) -> None:
        """Start it; it freezes the filesystems of the descriptors at once."""
        self.descriptors = descriptors
        its_input, self.questions = os.pipe()
        answers, its_output = os.pipe()
        self.answers = os.fdopen(answers, "rb", buffering=0)
        command = [sys.executable, "-I", "-S", "-B", watchdog.__file__, str(seconds), *map(str, descriptors)]
        try:
            self.process = subprocess.Popen(
                command, stdin=its_input, stdout=its_output, pass_fds=descriptors, start_new_session=True, cwd="/"
            )
        finally:
            os.close(its_input)
            os.close(its_output)

    def ask(self) -> None:
        """Ask whether everything is frozen still."""
        with contextlib.suppress(BrokenPipeError):  # it ended, and said why or nothing at all
            os.write(self.questions, b"?\n")

    def has_answer(self) -> bool:
        """Tell whether it said something, or ended."""
        waiting = select.poll()  # not select(2): that has no room for the descriptors of a large process
        waiting.register(self.answers, select.POLLIN)
        return bool(waiting.poll(0))

    def answer(self) -> list[str]:
        """Wait for its next words; none if it ended."""
        return self.answers.readline().decode().split()

    def thaw(self) -> None:
        """Have it thaw, and do it ourselves should it be dead."""
        os.close(self.questions)
        self.answers.close()
        try:
            if self.process.wait(_END_SECONDS) != 0:
                watchdog.thaw(self.descriptors)
        except subprocess.TimeoutExpired:
            watchdog.thaw(self.descriptors)
            self.process.kill()
            self.process.wait()


def _written_by_us() -> Iterator[tuple[str, str]]:
    """Yield what a backup writes to, as far as it is known here: freezing it would stop the backup for good."""
    yield "the root filesystem", "/"
    yield "blockferry's state", str(state_directory())
    yield "the directory for temporary files", tempfile.gettempdir()
    home = str(Path.home())
    yield "the cache", os.environ.get("XDG_CACHE_HOME", os.path.join(home, ".cache"))
    for name in ("BORG_BASE_DIR", "BORG_CACHE_DIR", "BORG_REPO", "RESTIC_CACHE_DIR", "RESTIC_REPOSITORY"):
        if os.environ.get(name, "").startswith("/"):
            yield f"what {name} names", os.environ[name]
    for number, name in ((1, "standard output"), (2, "standard error")):
        with contextlib.suppress(OSError):
            path = str(Path(f"/proc/self/fd/{number}").readlink())
            if path.startswith("/"):  # else a pipe or a socket
                yield name, path


def _superblock_of(path: str) -> tuple[int, int] | None:
    """Return the filesystem that a path, or what exists of it, lies on."""
    for place in (Path(path), *Path(path).parents):
        try:
            descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return _superblock(descriptor)
        finally:
            os.close(descriptor)
    return None


def _superblock(descriptor: int) -> tuple[int, int] | None:
    """Return the filesystem of a descriptor, by the mount that it was opened through (proc_pid_fdinfo(5), mnt_id).

    Not by `st_dev`, which on btrfs differs from subvolume to subvolume.
    """
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    return next((mount.superblock for mount in all_mounts() if str(mount.id) == number), None)
