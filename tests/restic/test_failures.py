"""Whatever goes wrong: a clear error, no snapshot, nothing left running or mounted, and a repository that works on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.errors import (
    BlockferryError,
    DamagedSnapshotError,
    PassphraseError,
    RepositoryError,
    RepositoryLockedError,
    ToolMissingError,
    VolumeError,
)
from blockferry.layers import BaseLayer
from restic_support import MIB, PASSWORD, Image, content_of, mounts, open_repository, restic, store


def archives(repository: Path) -> list[str]:
    """Return every snapshot that restic has, ours or not, complete or not."""
    return [entry["id"] for entry in json.loads(restic(repository, "snapshots", "--json", "--no-lock")) or []]


def test_a_read_error_half_way_is_raised_as_it_is_and_leaves_no_snapshot(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    with pytest.raises(VolumeError, match="failed") as caught:
        store(repository, image, fails_at=7 * MIB)
    assert caught.value.remedy == "Look at the kernel log."
    assert archives(repository_path) == []
    assert list((repository_path / "locks").iterdir()) == []
    assert mounts(image) == []
    assert content_of(repository, store(repository, image)[0].snapshot) == image.expected()


def test_a_read_error_in_the_last_segment_leaves_no_snapshot(repository_path: Path, image: Image) -> None:
    total = image.used.align(4 * MIB, image.size).total
    with pytest.raises(VolumeError):
        store(open_repository(repository_path), image, fails_at=total - 100)
    assert archives(repository_path) == []


class Waiting(BaseLayer):
    """An image whose end waits for the rest of it, as a group's does; `fails` says whether the rest fails by itself."""

    def __init__(self, image: Image, *, fails: bool) -> None:
        self.size, self.extents = image.size, image.used
        self.end = image.used.align(4 * MIB, image.size).end // (4 * MIB) * 4 * MIB - 4 * MIB
        self.fails = fails
        self.waited, self.given_up = threading.Event(), threading.Event()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset >= self.end:
            self.waited.set()
            assert self.given_up.wait(60), "nobody told who waits"
            raise VolumeError("the rest never came")
        if self.fails:
            assert self.waited.wait(60)
            raise VolumeError("the rest failed")

    def give_up(self, error: BaseException) -> None:
        self.given_up.set()


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "interrupted"])
def test_a_read_that_waits_for_others_ends_with_them(repository_path: Path, image: Image, fails: bool) -> None:
    repository, source = open_repository(repository_path), Waiting(image, fails=fails)

    def advance(_count: int) -> None:
        if not fails and source.waited.is_set():
            raise KeyboardInterrupt

    record = image.record(None, repository.unit(image.size))
    with pytest.raises(VolumeError if fails else KeyboardInterrupt):
        repository.store(source, image.block_map(), record, bases=[], advance=advance)
    assert source.given_up.is_set()
    assert archives(repository_path) == []


@contextlib.contextmanager
def storing(repository: Path, image: Image, pause: float) -> Iterator[subprocess.Popen[str]]:
    """Give a process that stores an image, and that is half-way through it."""
    program = [
        sys.executable,
        str(Path(__file__).with_name("storing.py")),
        str(repository),
        str(image.path),
        str(pause),
    ]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    with subprocess.Popen(
        program,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "half-way\n"
            yield process
        finally:
            process.kill()


def test_killed_half_way_nothing_goes_on_and_nothing_is_left(repository_path: Path, image: Image) -> None:
    with storing(repository_path, image, pause=0.2) as process:
        assert len(mounts(image)) == 1
        assert len(running_restics(repository_path)) == 1
        process.kill()
        process.wait()
        eventually(lambda: not running_restics(repository_path) and not mounts(image))
    assert archives(repository_path) == []
    repository = open_repository(repository_path)
    snapshot = store(repository, image)[0].snapshot
    assert archives(repository_path) == [snapshot.archive]
    assert content_of(repository, snapshot) == image.expected()
    restic(repository_path, "unlock", "--remove-all")  # by now another process may have the number of the killed one
    restic(repository_path, "check", "--read-data")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_half_way_restic_cleans_up_after_itself(
    repository_path: Path, image: Image, number: signal.Signals
) -> None:
    with storing(repository_path, image, pause=0.2) as process:
        process.send_signal(number)
        _out, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM), err
    assert archives(repository_path) == []
    assert list((repository_path / "locks").iterdir()) == []
    assert running_restics(repository_path) == []
    assert mounts(image) == []


def test_a_restic_that_dies_leaves_no_snapshot(repository_path: Path, image: Image) -> None:
    with storing(repository_path, image, pause=0.2) as process:
        (pid,) = running_restics(repository_path)
        os.kill(pid, signal.SIGKILL)
        _out, err = process.communicate(timeout=60)
    assert "was killed by signal 9" in err
    assert archives(repository_path) == []
    assert mounts(image) == []


def running_restics(repository: Path) -> list[int]:
    """Return the processes that work on a repository: their environment names it."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (each / "comm").read_text().strip()
            if name == "restic" and f"RESTIC_REPOSITORY={repository}\0" in (each / "environ").read_text():
                found.append(int(each.name))
    return found


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel brings about in its own time."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_or_missing_password_is_told_apart_from_other_failures(
    repository_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, password: str | None
) -> None:
    snapshot = store(open_repository(repository_path), image)[0].snapshot
    if password is None:
        monkeypatch.delenv("RESTIC_PASSWORD")
    else:
        monkeypatch.setenv("RESTIC_PASSWORD", password)
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "of another host"))  # which remembers nothing
    repository = open_repository(repository_path)
    word = "no password" if password is None else "password is wrong"
    for attempt in (repository.snapshots, lambda: repository.open(snapshot), lambda: store(repository, image)):
        with pytest.raises(PassphraseError, match=word) as caught:
            attempt()
        assert "RESTIC_PASSWORD_FILE" in caught.value.remedy
        assert PASSWORD not in str(caught.value)


def test_the_password_may_come_from_a_file_or_a_command(
    repository_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = store(open_repository(repository_path), image)[0].snapshot
    monkeypatch.delenv("RESTIC_PASSWORD")
    (tmp_path / "a file").write_text(f"{PASSWORD}\n")
    monkeypatch.setenv("RESTIC_PASSWORD_FILE", str(tmp_path / "a file"))
    assert open_repository(repository_path).describe(snapshot)[0].snapshot == snapshot.id
    monkeypatch.delenv("RESTIC_PASSWORD_FILE")
    monkeypatch.setenv("RESTIC_PASSWORD_COMMAND", f"cat '{tmp_path}/a file'")
    repository = open_repository(repository_path)
    assert repository.describe(snapshot)[0].snapshot == snapshot.id
    assert repository.snapshots() == [snapshot]


def test_no_repository_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="there is no restic repository"):
        open_repository(tmp_path / "nothing").snapshots()


def test_a_repository_that_another_restic_holds_is_for_later(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    holder = subprocess.Popen(
        ["restic", "-r", str(repository_path), "check", "--read-data"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        eventually(lambda: any(len(path.name) == 64 for path in (repository_path / "locks").iterdir()))
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(RepositoryLockedError, match="locked") as caught:
            store(repository, image)
        assert caught.value.exit_code == 75
        assert mounts(image) == []
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.communicate()
    assert holder.returncode == 0
    assert store(repository, image)[0].snapshot in repository.snapshots()


@pytest.mark.root
def test_a_full_disk_is_said_so_and_leaves_the_repository_usable(
    image: Image,
    tmp_path: Path,
    attach: Callable[..., str],
    mount: Callable[..., Path],
    fresh_repositories: dict[str, Path],
) -> None:
    with (tmp_path / "small.ext4").open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(tmp_path / "small.ext4")], check=True)
    place = mount(attach(tmp_path / "small.ext4"))
    path = shutil.copytree(fresh_repositories["2"], place / "repository")
    with pytest.raises(RepositoryError, match="disk is full"):
        store(open_repository(path), image)
    assert archives(path) == []
    assert mounts(image) == []
    restic(
        path, "prune", "--unsafe-recover-no-free-space", json.loads(restic(path, "cat", "config", "--no-lock"))["id"]
    )


def test_a_flipped_bit_anywhere_is_an_error_and_never_wrong_bytes(repository_path: Path, image: Image) -> None:
    repository = open_repository(repository_path)
    snapshot = store(repository, image)[0].snapshot
    expected = image.expected()
    for kind in ("data/*", "index", "snapshots", "keys"):
        for path in repository_path.glob(f"{kind}/*"):
            content = path.read_bytes()
            path.chmod(0o600)
            for position in {len(content) // 2, len(content) // 5}:
                damaged = bytearray(content)
                damaged[position] ^= 1
                path.write_bytes(damaged)
                try:
                    found = content_of(open_repository(repository_path), snapshot)
                except BlockferryError as error:
                    assert isinstance(error, RepositoryError), error
                    assert error.remedy
                else:  # the header of a pack, which the index makes needless
                    assert found == expected
            path.write_bytes(content)
    assert content_of(open_repository(repository_path), snapshot) == expected


@pytest.mark.parametrize("damage", ["flipped", "gone", "cut short"])
def test_a_damaged_pack_is_named(repository_path: Path, image: Image, damage: str) -> None:
    repository = open_repository(repository_path)
    snapshot = store(repository, image)[0].snapshot
    pack = max((repository_path / "data").glob("*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 0x80  # at its beginning the record may be, which is not read again
    pack.unlink()
    if damage != "gone":
        pack.write_bytes(content if damage == "flipped" else content[:100])
    with pytest.raises(DamagedSnapshotError, match=pack.name) as caught:
        content_of(repository, snapshot)
    assert "restic check" in caught.value.remedy


def test_a_restic_that_is_too_old_or_missing_is_said_so(
    repository_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLOCKFERRY_RESTIC", str(tmp_path / "restic"))
    with pytest.raises(ToolMissingError, match="not installed"):
        store(open_repository(repository_path), image)
    (tmp_path / "restic").write_text("#!/bin/sh\necho 'restic 0.14.0 compiled with go1.19.8 on linux/amd64'\n")
    (tmp_path / "restic").chmod(0o700)
    with pytest.raises(ToolMissingError, match=r"version 0\.14; 0\.18 is the oldest"):
        store(open_repository(repository_path), image)
