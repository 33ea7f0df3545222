"""Repositories of every kind that the tests of the borg adapter run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry_borg.plugin import blockferry_open_repository
from borg_support import BORGS, Place, missing
from sshd_support import PROGRAM, Sshd

Make = Callable[..., Place]
Open = Callable[[Place], object]


# Day by day with the newest series: what is not the adapter's own matter runs on the system's borg anyway.
@pytest.fixture(params=[pytest.param("1.2", marks=pytest.mark.thorough), "1.4"])
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
            repository = blockferry_open_repository(f"borg:{place.location}", os.environ)
            opened.callback(repository.close)
            return repository

        yield open_place


@pytest.fixture(scope="session")
def ssh_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An sshd of our own on 127.0.0.1, which lets us in by a key of our own; BORG_RSH is set to use it."""
    if not PROGRAM.exists():
        pytest.skip("needs sshd: install openssh-server")
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BORG_RSH", server.rsh)
        server.start()
        try:
            yield server.port
        finally:
            server.stop()
