"""A Redis or Valkey of our own, on a socket and on a port with TLS; and the log indexes in it and in files."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import RedisError, UnixDomainSocketConnection

from blockferry.cluster.index import LogIndex
from blockferry.manager import log_index_named, plugin_manager
from blockferry.programs import look_for

PAGE = Path(__file__).parents[1] / "docs" / "shared-index.md"
PROGRAMS = [name for name in ("redis-server", "valkey-server") if look_for(name)]
PASSWORD = "hunter2 of the index"


@functools.cache
def _manager() -> Any:
    return plugin_manager()


def open_index(reference: str) -> LogIndex:
    return log_index_named(_manager(), reference)


class RedisServer:
    """A server that keeps nothing on a disk; `socket` is its socket, `port` one with TLS that asks for certificates."""

    def __init__(self, home: Path, program: str, *settings: str, prefix: Sequence[str] = ()) -> None:
        """Start it as argument of the command `prefix`, if there is one."""
        self.home = home
        self.prefix = prefix
        self.program = look_for(program)
        self.socket = home / "socket"
        self.settings = settings
        self.port = 0

    @property
    def reference(self) -> str:
        return f"redis+unix://{self.socket}"

    def tls_reference(self, user: str = "blockferry@", certificate: str = "client", authority: str = "ca") -> str:
        own = f"&cert={self.home}/{certificate}.pem&key={self.home}/{certificate}-key.pem" if certificate else ""
        return f"rediss://{user}localhost:{self.port}/0?ca={self.home}/{authority}.pem{own}"

    def listen_with_tls(self) -> None:
        """Listen on a port, too, for whoever has a certificate and is the user of the page on the shared index."""
        for name in ("ca", "other"):
            make_authority(self.home, name)
        for name in ("server", "client"):
            make_certificate(self.home, name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        files = {"tls-cert-file": "server.pem", "tls-key-file": "server-key.pem", "tls-ca-cert-file": "ca.pem"}
        self.settings += (
            f"tls-port {self.port}",
            "bind 127.0.0.1",
            *(f"{name} {self.home / file}" for name, file in files.items()),
            acl_line(PASSWORD),
        )

    def start(self, *, wait: bool = True) -> None:
        """Start it, empty unless it was told to save, and wait until it answers, or only until it listens."""
        lines = ["port 0", f"unixsocket {self.socket}", 'save ""', f"dir {self.home}", "appendonly no", *self.settings]
        (self.home / "redis.conf").write_text("\n".join([*lines, ""]))
        command = [*self.prefix, str(self.program), str(self.home / "redis.conf")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(RedisError):
                self.ask("PING" if wait else "INFO")
                return
            assert self.process.poll() is None, f"{self.program} has ended"
            assert time.monotonic() < deadline, f"{self.program} does not answer"
            time.sleep(0.02)

    def ask(self, *words: str | int) -> Any:
        """Send a command of our own."""
        connection: Any = UnixDomainSocketConnection(path=str(self.socket), protocol=2)
        try:
            connection.connect()
            connection.send_command(*words)
            return connection.read_response()
        finally:
            connection.disconnect()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Have it neither answer nor hang up."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_redis(
    *settings: str, program: str = "", tls: bool = False, prefix: Sequence[str] = ()
) -> Iterator[RedisServer]:
    """Run a server with further lines of redis.conf."""
    if not PROGRAMS:
        pytest.skip("needs redis-server: run scripts/bootstrap --test")
    home = Path(tempfile.mkdtemp(prefix="ferry-redis-"))  # pytest's own paths are too long for a socket
    server = RedisServer(home, program or PROGRAMS[0], *settings, prefix=prefix)
    try:
        if tls:
            server.listen_with_tls()
        server.start()
        yield server
    finally:
        if hasattr(server, "process"):
            server.kill()
        shutil.rmtree(home)


def acl_line(password: str) -> str:
    """Return the line that the page on the shared index shows for the user."""
    (line,) = re.findall(r"^user blockferry .*$", PAGE.read_text(), re.MULTILINE)
    return line.replace(">PASSWORD", f'">{password}"')


def make_authority(home: Path, name: str) -> None:
    subject = ["-subj", f"/CN={name}", "-days", "2", "-keyout", f"{home}/{name}-key.pem", "-out", f"{home}/{name}.pem"]
    may = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]  # Python 3.13 asks for that
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject, *may)


def make_certificate(home: Path, name: str, authority: str = "ca") -> None:
    request, extension = home / f"{name}.csr", home / f"{name}.ext"
    extension.write_text("subjectAltName=DNS:localhost\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"]
    _openssl("req", *new, "-keyout", f"{home}/{name}-key.pem", "-out", str(request))
    by = ["-CA", f"{home}/{authority}.pem", "-CAkey", f"{home}/{authority}-key.pem", "-CAcreateserial", "-days", "2"]
    _openssl("x509", "-req", "-in", str(request), *by, "-extfile", str(extension), "-out", f"{home}/{name}.pem")


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, env=os.environ | {"RANDFILE": "/dev/null"})
