"""Trees of files that this process makes up, mounted through FUSE for another program to read, or for the kernel.

    with mounted(tree) as path:
        subprocess.run(["env", f"--chdir={path}", "restic", "backup", "."])

Three things keep this from hanging or leaving traces:

- The server runs in a thread of this process. While `fork` and `exec` happen Python holds its interpreter lock, so a
  child must never touch the mount before `exec`: hand its path over as an argument or to `env --chdir`, never as
  `cwd=` of subprocess.
- A mount must not outlive its owner, whatever that dies of. A shell waits at the end of a pipe for it and unmounts
  (libfuse's own `auto_unmount` does so for root only, unless others may look into the mount). The mount lies in a
  private directory (0700) that its owner keeps locked: what even the shell could not clear away the next one does.
- libfuse takes over the terminating signals that nobody handles (libfuse, lib/fuse_signals.c) and would merely end the
  tree. They end the process here, by way of an exception, so that whoever uses the tree can clean up.

`fuse_tree.py` says what a tree is; `fuse_server.py` is the side that talks to libfuse.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import fcntl
import importlib
import itertools
import logging
import os
import re
import signal
import stat
import subprocess
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blockferry.errors import BlockferryError, ToolMissingError
from blockferry.fuse_tree import Tree
from blockferry.programs import find
from blockferry.volume import all_mounts

if TYPE_CHECKING:
    from blockferry.fuse_server import TreeServer

log = logging.getLogger(__name__)

_MOST_MOUNTS = 8
"""How many trees may lie over each other on one directory."""
_PATIENCE = 20.0
"""Seconds for which a mount may take to appear, and its server to end."""


@contextlib.contextmanager
def mounted(tree: Tree, *, name: str = "blockferry") -> Iterator[Path]:
    """Mount a tree for the length of the context and give the directory it is mounted on.

    Leaving the context takes the mount away, whoever still holds files open in it. Raise ToolMissingError if FUSE is
    not installed, BlockferryError if it does not let us mount. `name` is part of the path, which is the same for every
    mount of that name unless two exist at once.
    """
    with mount_point(name) as point, _terminating_signals_raise():
        server = _serve(tree, point)
        try:
            yield point
        finally:
            _unmount(point)
            server.join(_PATIENCE)
            if server.is_alive():
                log.warning("%s: the FUSE server is still busy with a read that does not return", point)


@contextlib.contextmanager
def mounted_on(tree: Tree, point: Path, *, stays_dead: bool = False) -> Iterator[threading.Thread]:
    """Mount a tree on a directory of the user's and give the server's thread, which ends when it is unmounted.

    Under root other users see it too, as far as the modes of its files let them. Leaving the context, or the end of
    this process, takes the mount away; if it `stays_dead`, it is there after a process that was killed: whoever reads
    gets errors then, where an empty directory would look as if there were nothing to read. `unmount_from` takes it
    away. Errors as for `mounted`.
    """
    watched = contextlib.nullcontext() if stays_dead else _unmounted_at_death(point)
    with watched, _terminating_signals_raise():
        server = _serve(tree, point, shared=os.geteuid() == 0)
        try:
            yield server
        finally:
            if server.is_alive():
                _unmount(point)
                server.join(_PATIENCE)


def unmount_from(point: Path) -> None:
    """Take the trees away that are mounted on a directory, their servers alive or dead; nothing else is touched."""
    for _ in range(_MOST_MOUNTS):
        if ours_on(point):
            _unmount(point)


def unmounted(point: Path) -> bool:
    """Take a mount away unless it is in use; tell whether that went well."""
    if os.geteuid() == 0:
        command = [find("umount"), "--", os.fspath(point)]
    else:
        command = [_fusermount(), "-u", "-q", "--", os.fspath(point)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True)
    return done.returncode == 0


def ours_on(point: Path) -> bool:
    """Tell whether what is mounted on a directory, if anything is, is a tree of ours."""
    return _mounted_on(point)[-1:] == ["fuse.blockferry"]


@contextlib.contextmanager
def mount_point(name: str) -> Iterator[Path]:
    """Give an empty private directory to mount something on, and unmount and remove it afterwards.

    The mount is taken away even if it is in use, if its server is dead, or if this process is killed.
    """
    root = _runtime_directory()
    with contextlib.ExitStack() as held:
        with _locked(root):  # nobody sweeps away a directory that is not locked yet
            _sweep(root)
            directory = _new_directory(root, name)
            held.enter_context(_locked(directory))
        held.callback(_clear, directory)
        point = directory / "tree"
        point.mkdir(mode=0o700)
        with _unmounted_at_death(point):
            yield point


def _new_directory(root: Path, name: str) -> Path:
    """Make a directory of that name, or one like it if somebody who lives has it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:64] or "mount"
    for number in itertools.count(1):
        directory = root / (plain if number == 1 else f"{plain}-{number}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            break
    return directory


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a directory's lock, which the kernel lets go of when this process dies; BlockingIOError if not `wait`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _unmounted_at_death(point: Path) -> Iterator[None]:
    """Have a shell unmount `point` as soon as the context, or this process, is no more."""
    script = 'trap "" INT HUP TERM; read -r _; exec "$0" -u -z -q -- "$1"'
    with subprocess.Popen(
        ["/bin/sh", "-c", script, _fusermount(), point],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


def _unmount(point: Path) -> None:
    """Take a mount away, even if it is in use or its server is dead; nothing happens if there is none."""
    if os.geteuid() == 0:
        # The force is what ends the server at once although somebody still holds a file open.
        command = ["umount", "--force", "--lazy", "--", os.fspath(point)]
    else:
        command = [_fusermount(), "-u", "-z", "-q", "--", os.fspath(point)]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True)


def _runtime_directory() -> Path:
    """Return the directory of this user's mounts, for its owner alone."""
    user = os.geteuid()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if user == 0:
        base = Path("/run/blockferry")
    elif session:
        base = Path(session, "blockferry")
    else:
        base = Path(tempfile.gettempdir(), f"blockferry-{user}")
    path = base / "mounts"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        both = [each.lstat() for each in (base, path)]
    except OSError as error:
        raise BlockferryError(
            f"{path}: the directory for mounts cannot be made: {error.strerror}",
            remedy="Set XDG_RUNTIME_DIR to a directory that is yours.",
        ) from None
    # Below /tmp anybody could have made them before us.
    ours = all(stat.S_ISDIR(facts.st_mode) and facts.st_uid == user and not facts.st_mode & 0o022 for facts in both)
    if not ours or both[1].st_mode & 0o077:
        raise BlockferryError(
            f"{path}: is not a directory that only you can enter",
            remedy="Remove it, or set XDG_RUNTIME_DIR to a directory that is yours.",
        )
    return path


def _sweep(root: Path) -> None:
    """Remove the mounts whose owner died: nobody holds their lock."""
    for directory in root.iterdir():
        with contextlib.suppress(OSError), _locked(directory, wait=False):
            log.info("%s: clearing away what a process that died has left", directory)
            _clear(directory)


def _clear(directory: Path) -> None:
    """Unmount and remove a mount's directory; what cannot be removed yet is left for the next sweep."""
    point = directory / "tree"
    if _mounted_on(point):
        _unmount(point)
    try:
        if point.exists():
            point.rmdir()
        directory.rmdir()
    except OSError as error:
        log.debug("%s: left for later: %s", directory, error)


def _mounted_on(point: Path) -> list[str]:
    """Return the types of what is mounted on a directory, the uppermost last, be their servers alive or dead.

    The kernel's list is asked: looking at a dead one fails, which Path.is_mount hides since Python 3.12.
    """
    where = os.fspath(point.parent.resolve() / point.name)  # as the kernel has it, without symbolic links
    return [mount.filesystem for mount in all_mounts() if mount.point == where]


def _fusermount() -> str:
    """Return the program that mounts and unmounts, for root as for others; ToolMissingError without it."""
    return find("fusermount3")


def _serve(tree: Tree, point: Path, *, shared: bool = False) -> threading.Thread:
    """Start the server of a tree and return its thread once the mount answers."""
    _fusermount()
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise ToolMissingError(
            "/dev/fuse cannot be opened",
            remedy="Load the kernel module (modprobe fuse); in a container, add the device.",
        )
    server_class = _server_class()
    ready, ended = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            server_class(tree, point, ready, shared=shared)
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)
        ended.set()
        ready.set()

    thread = threading.Thread(target=serve, name="fuse", daemon=True)
    with _same_directory():
        thread.start()
        answered = ready.wait(_PATIENCE)
    if not answered or ended.is_set():
        raise BlockferryError(
            f"{point}: FUSE could not mount it ({failures[0] if failures else 'no answer'})",
            remedy="May this user mount? Try as root, or look at fusermount3's message above.",
        )
    return thread


@contextlib.contextmanager
def _same_directory() -> Iterator[None]:
    """Go back to the working directory: libfuse leaves it for / before it mounts (lib/helper.c, fuse_daemonize)."""
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


@contextlib.contextmanager
def _terminating_signals_raise() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit here where they would have ended the process without a trace."""
    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in taken:
        signal.signal(each, _exit_by_signal)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def _exit_by_signal(number: int, _frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)


def _server_class() -> type[TreeServer]:
    """Return the class whose instances serve a tree, from being made until the tree is unmounted."""
    # mfusepy prefers version 2 by itself, and looks for its library only once, when it is imported.
    # Its name ends in .3 until libfuse 3.16 and in .4 since.
    previous = os.environ.setdefault("FUSE_LIBRARY_PATH", ctypes.util.find_library("fuse3") or "libfuse3.so.3")
    try:
        module = importlib.import_module("blockferry.fuse_server")
    except OSError:
        raise ToolMissingError(f"{previous} is not installed", remedy="Install the package fuse3.") from None
    server: type[TreeServer] = module.TreeServer
    return server
