"""The disk of a hot restore over NBD, for other hosts and programs: one nbdkit a place, all children of our process.

nbdkit's file plugin serves the file that FUSE shows, under the name that knows no page cache: a client reads what is
there, whoever wrote it. The plugin offers its clients several connections at a time (multi-conn), for which a flush on
one has to cover what was written by all: what a client has written is in the restore cache when it is told so, and a
flush, or a write with FUA, is an `fdatasync`, which is the cache's `sync` of all that anybody has written.

We listen, and hand nbdkit the socket (systemd.socket(5), sd_listen_fds(3)): that it is private, or that its address is
taken, is known before there is any nbdkit. nbdkit ends when we do, whatever we die of: a shell waits at the end of a
pipe for that, and kills it. Asked to end, by a signal or because its parent died, it would wait for its clients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
import socket
import stat
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path
from typing import IO, Any

from blockferry.errors import BlockferryError, UsageError
from blockferry.programs import find

log = logging.getLogger(__name__)

CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
"""What nbdkit looks for in its directory of certificates."""
_AS_DESCRIPTOR_3 = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&0 </dev/null'
_KILLED_AT_END = 'trap "" INT HUP TERM; read -r _; kill -KILL "$0"'
_PATIENCE = 10.0
"""Seconds for nbdkit to begin, and to end."""
_BACKLOG = 128


@dataclasses.dataclass(frozen=True)
class Wish:
    """Where a disk is to be served, and how. Either `socket` or `host` is set."""

    socket: str = ""
    """The path of a Unix socket, for its owner alone."""
    host: str = ""
    """A numeric address, or a name that has one."""
    port: int = 0
    """0: any that is free."""
    tls: str = ""
    """A directory of certificates, with which clients are checked too, or a file of pre-shared keys; "": no TLS."""
    writable: bool = False

    def tls_options(self) -> list[str]:
        """Return nbdkit's options for it."""
        if not self.tls:
            return ["--tls=off"]
        if Path(self.tls).is_dir():
            return ["--tls=require", f"--tls-certificates={self.tls}", "--tls-verify-peer"]
        return ["--tls=require", f"--tls-psk={self.tls}"]


def checked(wish: Wish, *, insecure: bool) -> Wish:
    """Return a wish that nobody has to be warned of; raise UsageError that says why it is none."""
    if wish.socket:
        if wish.tls or insecure:
            raise UsageError(
                "--tls and --insecure are for --listen", remedy="A socket is for its owner alone: leave them out."
            )
        return wish
    _refuse_every_address(wish.host)
    if bool(wish.tls) == insecure:
        raise UsageError(
            f"{wish.host}: whoever reaches that address could read the disk"
            if not insecure
            else "--tls and --insecure exclude each other",
            remedy="Say --tls DIR, with certificates of server and clients, or --insecure on a network of your own.",
        )
    if wish.tls:
        _refuse_unusable(Path(wish.tls))
    return wish


def _refuse_every_address(host: str) -> None:
    every = not host
    with contextlib.suppress(ValueError):
        every = ipaddress.ip_address(host).is_unspecified
    if every:
        raise UsageError(
            f"{host or 'no address'}: would be every network that this host is in",
            remedy="Name the address of one: --listen 10.0.0.5:10809.",
        )


def _refuse_unusable(tls: Path) -> None:
    """Refuse certificates or keys that are not there, or that others could read."""
    files = [tls / name for name in CERTIFICATES] if tls.is_dir() else [tls]
    missing = [str(each) for each in files if not each.is_file()]
    if missing:
        raise UsageError(
            f"--tls: not there: {', '.join(missing)}",
            remedy=f"Name a directory with {', '.join(CERTIFICATES)}, or a file of pre-shared keys (psktool).",
        )
    if files[-1].stat().st_mode & 0o077:
        raise UsageError(f"{files[-1]}: others can read this key", remedy=f"chmod 600 {files[-1]}")


class Export:
    """A disk that is served, until it is closed or we end."""

    def __init__(self, path: Path, wish: Wish, scratch: Path) -> None:
        """Serve the file `path`; `scratch` is a private file's place. Raise BlockferryError if that cannot be done."""
        self.wish = wish
        self.path = path
        self.last_words = ""
        self._listener = _listening(wish)
        self.uri = _uri(wish, self._listener)
        try:
            self._process = self._started(scratch)
            self._watch = subprocess.Popen(
                ["/bin/sh", "-c", _KILLED_AT_END, str(self._process.pid)], stdin=subprocess.PIPE, start_new_session=True
            )
        except BaseException:
            self._remove_socket()
            raise
        finally:
            self._listener.close()  # nbdkit has it: when that ends, nobody waits to be let in

    @property
    def ended(self) -> bool:
        """Whether nbdkit has ended by itself. Its number stays taken until we close: the shell is to kill no other."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def clients(self) -> int:
        """Return how many connections there are: for each nbdkit has opened the file once."""
        count = 0
        with contextlib.suppress(OSError):  # it may end while we look, and so may a connection
            for entry in Path(f"/proc/{self._process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    count += entry.readlink() == self.path
        return count

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says of it."""
        return {"uri": self.uri, "writable": self.wish.writable, "clients": self.clients()}

    def close(self) -> None:
        """Stop, whoever is connected."""
        self._remove_socket()
        with self._watch:  # closes the pipe, and waits
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):  # else it ends with a read that waits for the repository
            self._process.wait(_PATIENCE)

    def _started(self, scratch: Path) -> subprocess.Popen[str]:
        """Start nbdkit, and wait until it has read its options."""
        scratch.unlink(missing_ok=True)
        command = [
            find("nbdkit"),
            "--exit-with-parent",  # for the moment until the shell is there
            f"--pidfile={scratch}",
            *([] if self.wish.writable else ["--readonly"]),
            *self.wish.tls_options(),
            "file",
            f"file={self.path}",
        ]
        process = subprocess.Popen(
            ["/bin/sh", "-c", _AS_DESCRIPTOR_3, "sh", *command],
            stdin=self._listener.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert process.stderr is not None  # noqa: S101  # it is a pipe
        listening_to = threading.Thread(target=self._listen_to, args=[process.stderr], daemon=True)
        listening_to.start()
        deadline = time.monotonic() + _PATIENCE
        while not scratch.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        began = scratch.exists() and process.poll() is None
        scratch.unlink(missing_ok=True)
        if began:
            return process
        process.kill()
        process.wait()
        listening_to.join(1.0)
        raise BlockferryError(f"nbdkit does not serve it: {self.last_words or 'it says nothing'}")

    def _listen_to(self, stream: IO[str]) -> None:
        """Log what nbdkit says: clients that were refused, reads that failed."""
        with stream:
            for line in stream:
                self.last_words = line.strip()
                log.warning("%s: %s", self.uri, self.last_words)

    def _remove_socket(self) -> None:
        if self.wish.socket:
            Path(self.wish.socket).unlink(missing_ok=True)


def _listening(wish: Wish) -> socket.socket:
    """Return a socket that listens where it is wished for, private from the beginning."""
    try:
        return _unix_socket(wish.socket) if wish.socket else _tcp_socket(wish.host, wish.port)
    except OSError as error:
        place = wish.socket or f"{wish.host}:{wish.port}"
        raise BlockferryError(
            f"{place}: cannot be listened at: {error.strerror or error}",
            remedy="Name a path in a directory that is there, or an address of this host and a port that is free.",
        ) from None


def _unix_socket(path: str) -> socket.socket:
    _remove_dead(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Before it has a name: it gets one with these permissions (unix(7)), at no instant with others.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens at any more: who did was killed."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as other:
                try:
                    other.connect(path)
                except ConnectionRefusedError:
                    Path(path).unlink()


def _tcp_socket(host: str, port: int) -> socket.socket:
    # What the name stands for first: each further address would be a further socket, and nobody named those.
    family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _uri(wish: Wish, listener: socket.socket) -> str:
    """Return the NBD URI (nbd's doc/uri.md) by which clients find it."""
    if wish.socket:
        return f"nbd+unix:///?socket={urllib.parse.quote(wish.socket)}"
    host, port = listener.getsockname()[:2]
    scheme = "nbds" if wish.tls else "nbd"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class Exports:
    """All exports of one hot restore, by place."""

    def __init__(self, path: Path, scratch: Path, *, writable: bool) -> None:
        """Serve the file `path`, which can be written to or not; `scratch` is a private file's place."""
        self.path = path
        self._scratch = scratch
        self._writable = writable
        self._all: dict[tuple[str, int], Export] = {}

    def serve(self, wish: Wish) -> Export:
        """Serve at a place, instead of what is served there already."""
        if wish.writable and not self._writable:
            raise UsageError("this restore is read-only: it has no target", remedy="Leave out --write.")
        place = (wish.socket or wish.host, wish.port)
        if there := self._all.pop(place, None):
            there.close()
        export = self._all[place] = Export(self.path, wish, self._scratch)
        return export

    def status(self) -> list[dict[str, Any]]:
        """Return what `status --json` says of each."""
        self._sweep()
        return [export.status() for export in self._all.values()]

    def users(self) -> list[str]:
        """Return where somebody is connected, a phrase each export."""
        return [f"{said['uri']} ({said['clients']} connected)" for said in self.status() if said["clients"]]

    def stop(self) -> list[str]:
        """Stop all of them; return their URIs."""
        stopped = []
        while self._all:
            _place, export = self._all.popitem()
            export.close()
            stopped.append(export.uri)
        return stopped

    def _sweep(self) -> None:
        """Forget those whose nbdkit ended by itself."""
        for place, export in list(self._all.items()):
            if export.ended:
                log.error("%s: nbdkit ended: %s", export.uri, export.last_words)
                export.close()
                del self._all[place]
