"""Repositories of every kind that the tests of the borg adapter run on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry_borg.plugin import blockferry_open_repository
from borg_support import BORGS, Place, missing

Make = Callable[..., Place]
Open = Callable[[Place], object]


@pytest.fixture(params=["1.2", "1.4"])
def series(request: pytest.FixtureRequest) -> str:
    """Each series of borg that the worker knows."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def make_repository(series: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes a repository with borg's own command."""
    monkeypatch.setenv("BLOCKFERRY_BORG", BORGS[series])
    monkeypatch.setenv("BORG_PASSPHRASE", "correct horse")
    monkeypatch.setenv("BORG_SELFTEST", "disabled")  # of borg's own code, 0.2 s at every start

    def make(encryption: str = "repokey-blake2", location: str = "") -> Place:
        place = Place(BORGS[series], location or str(tmp_path / f"repository-{encryption}"))
        place.run("init", "--encryption", encryption, place.location)
        return place

    return make


@pytest.fixture
def place(make_repository: Make) -> Place:
    """A local, encrypted repository."""
    return make_repository()


@pytest.fixture
def open_repository() -> Iterator[Open]:
    """Return a function that opens a repository through the plugin's hook; all are closed when the test ends."""
    with contextlib.ExitStack() as opened:

        def open_place(place: Place) -> object:
            repository = blockferry_open_repository(f"borg:{place.location}")
            opened.callback(repository.close)
            return repository

        yield open_place


@pytest.fixture(scope="session")
def ssh_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An sshd of our own on 127.0.0.1, which lets us in by a key of our own; BORG_RSH is set to use it."""
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs sshd: install openssh-server")
    home = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    (home / "user.pub").rename(home / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": home / "host",
        "AuthorizedKeysFile": home / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    (home / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd as root insists on it (privilege separation)
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR -o UserKnownHostsFile=/dev/null"
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(home / "sshd_config")]) as server,
    ):
        try:
            patch.setenv("BORG_RSH", f"ssh -i {home / 'user'} {options}")
            _wait_for(port)
            yield port
        finally:
            server.send_signal(signal.SIGTERM)


def _wait_for(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("sshd does not answer")
