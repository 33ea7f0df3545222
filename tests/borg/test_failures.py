"""What goes wrong is told in a line or two, with what to do; and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from blockferry.blockmap import BlockMap
from blockferry.errors import (
    BlockferryError,
    DamagedSnapshotError,
    PassphraseError,
    RepositoryError,
    RepositoryLockedError,
    SnapshotNotFoundError,
    UsageError,
)
from blockferry.extents import ExtentSet
from blockferry_borg.failures import failure, without_credentials
from blockferry_borg.plugin import blockferry_open_repository
from borg_support import BORGS, MIB, Place, Volume, content, newest, store


def whole(size: int) -> BlockMap:
    return BlockMap.build(size, data=ExtentSet.whole(size))


def told(error: BlockferryError) -> str:
    """Return what a user reads, having made sure that it is short and says what to do."""
    assert len(str(error).splitlines()) == 2
    assert error.remedy
    assert "Traceback" not in str(error)
    assert "correct horse" not in str(error)
    return str(error)


@newest
def test_a_wrong_passphrase(place, open_repository, monkeypatch):
    monkeypatch.setenv("BORG_PASSPHRASE", "wrong horse")
    with pytest.raises(PassphraseError) as caught:
        open_repository(place).snapshots()
    assert "BORG_PASSPHRASE" in told(caught.value)
    assert "wrong horse" not in str(caught.value)


def test_no_passphrase_asks_nobody(place, open_repository, monkeypatch):
    monkeypatch.delenv("BORG_PASSPHRASE")
    with pytest.raises(PassphraseError) as caught:
        open_repository(place).snapshots()
    assert "BORG_PASSCOMMAND" in told(caught.value)


@newest
def test_a_passphrase_from_a_descriptor_or_a_command_serves_every_worker(place, open_repository, monkeypatch):
    monkeypatch.delenv("BORG_PASSPHRASE")
    reading, writing = os.pipe()
    os.write(writing, b"correct horse\n")
    os.close(writing)
    with monkeypatch.context() as patch:
        patch.setenv("BORG_PASSPHRASE_FD", str(reading))
        repository = open_repository(place)
        stored = store(repository, Volume(content(MIB)), whole(MIB))
        with repository.open(stored.snapshot) as layer:
            layer.read_into(0, memoryview(bytearray(10)))
        assert repository.snapshots() == [stored.snapshot]
    os.close(reading)
    monkeypatch.setenv("BORG_PASSCOMMAND", "echo correct horse")
    assert open_repository(place).snapshots() == [stored.snapshot]


@newest
def test_a_key_that_is_not_here(make_repository, open_repository, monkeypatch, tmp_path):
    place = make_repository("keyfile")
    monkeypatch.setenv("BORG_KEYS_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(PassphraseError) as caught:
        open_repository(place).snapshots()
    assert "BORG_KEYS_DIR" in told(caught.value)


def test_no_repository_there(place, open_repository, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nothing", "empty"):
        with pytest.raises(RepositoryError) as caught:
            open_repository(Place(place.borg, str(tmp_path / path))).snapshots()
        assert "borg init" in told(caught.value)
        assert path in str(caught.value)


def test_a_new_unencrypted_repository_is_not_trusted_unasked(make_repository, open_repository, monkeypatch, tmp_path):
    place = make_repository("none")
    monkeypatch.setenv("BORG_BASE_DIR", str(tmp_path / "another-user"))
    repository = open_repository(place)
    with pytest.raises(RepositoryError) as caught:
        repository.snapshots()
    assert "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK" in told(caught.value)
    with pytest.raises(RepositoryError):
        store(repository, Volume(content(MIB)), whole(MIB))
    monkeypatch.setenv("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
    assert repository.snapshots() == []


def test_a_repository_that_moved_is_not_trusted_unasked(place, open_repository, monkeypatch):
    store(open_repository(place), Volume(content(MIB)), whole(MIB))
    moved = Place(place.borg, f"{place.location}-moved")
    shutil.move(place.location, moved.location)
    repository = open_repository(moved)
    with pytest.raises(RepositoryError) as caught:
        repository.snapshots()
    assert "BORG_RELOCATED_REPO_ACCESS_IS_OK" in told(caught.value)
    monkeypatch.setenv("BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes")
    assert len(repository.snapshots()) == 1


def test_a_locked_repository_is_a_reason_to_come_again(place, open_repository, monkeypatch):
    repository = open_repository(place)
    stored = store(repository, Volume(content(MIB)), whole(MIB))
    monkeypatch.setenv("BLOCKFERRY_LOCK_WAIT", "0")
    with subprocess.Popen(
        [place.borg, "with-lock", place.location, "sh", "-c", "echo locked; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        for attempt in (
            lambda: store(open_repository(place), Volume(content(MIB)), whole(MIB)),
            lambda: open_repository(place).delete([stored.snapshot]),
            lambda: open_repository(place).snapshots(),
        ):
            with pytest.raises(RepositoryLockedError) as caught:
                attempt()
            assert caught.value.exit_code == 75
            assert "BLOCKFERRY_LOCK_WAIT" in told(caught.value)
        holder.stdin.close()
    assert repository.snapshots() == [stored.snapshot]


@newest
def test_a_source_that_fails_leaves_nothing(place, open_repository):
    repository = open_repository(place)
    with pytest.raises(OSError, match="the disk is broken here"):
        store(repository, Volume(content(30 * MIB), fails_at=20 * MIB), whole(30 * MIB))
    assert place.archives() == []
    stored = store(repository, Volume(content(30 * MIB)), whole(30 * MIB))
    assert repository.snapshots() == [stored.snapshot]
    place.check()


@newest
def test_a_base_that_is_lost_and_a_source_that_lacks_its_bytes(place, open_repository):
    repository = open_repository(place)
    volume = Volume(content(2 * MIB))
    base = store(repository, volume, whole(2 * MIB)).snapshot
    repository.delete([base])
    part = Volume(content(2 * MIB))
    part.extents = ExtentSet.whole(MIB)
    same = BlockMap.build(2 * MIB, data=part.extents, same=volume.extents)
    with pytest.raises(RepositoryError, match="the base"):
        store(repository, part, same, base=base)
    assert place.archives() == []


@pytest.mark.slow
@pytest.mark.root
def test_a_full_disk_leaves_nothing(make_repository, open_repository, tmp_path, attach, mount, monkeypatch):
    image = tmp_path / "small"
    with image.open("wb") as opened:
        opened.truncate(48 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    room = mount(attach(image))
    place = make_repository(location=str(room / "repository"))
    repository = open_repository(place)
    stored = store(repository, Volume(content(4 * MIB)), whole(4 * MIB))
    with pytest.raises(RepositoryError) as caught:
        store(repository, Volume(content(120 * MIB, seed=5)), whole(120 * MIB))
    assert "borg compact" in told(caught.value)
    assert place.archives() == [stored.snapshot.archive]
    assert place.extract(stored.snapshot.archive) == content(4 * MIB).tobytes()
    repository.delete([stored.snapshot])


@newest
def test_a_snapshot_that_is_gone(place, open_repository):
    repository = open_repository(place)
    snapshot = store(repository, Volume(content(MIB)), whole(MIB)).snapshot
    repository.delete([snapshot])
    repository.delete([snapshot])
    for attempt in (repository.describe, repository.open):
        with pytest.raises(SnapshotNotFoundError) as caught:
            attempt(snapshot)
        told(caught.value)


@newest
def test_an_archive_of_another_form_is_not_read_as_an_image(place, open_repository, tmp_path):
    repository = open_repository(place)
    snapshot = store(repository, Volume(content(MIB)), whole(MIB)).snapshot
    place.run("delete", f"{place.location}::{snapshot.archive}")
    (tmp_path / "volume.img").write_bytes(b"x" * 5000)
    parameters = ["--chunker-params", "fixed,1048576"]
    subprocess.run(
        [place.borg, "create", *parameters, f"{place.location}::{snapshot.archive}", "volume.img"],
        cwd=tmp_path,
        check=True,
    )
    for attempt in (repository.describe, repository.open):
        with pytest.raises(DamagedSnapshotError) as caught:
            attempt(snapshot)
        told(caught.value)


@newest
@pytest.mark.parametrize(
    ("variable", "value"),
    [("BLOCKFERRY_LOCK_WAIT", "soon"), ("BLOCKFERRY_BORG_CHECKPOINT", "-1"), ("BLOCKFERRY_BORG_COMPRESSION", "lz5")],
)
def test_a_setting_that_makes_no_sense(variable, value, place, open_repository, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BlockferryError) as caught:
        store(open_repository(place), Volume(content(MIB)), whole(MIB))
    assert variable in told(caught.value)


@newest
def test_a_reference_that_is_none(make_repository, monkeypatch):
    for reference in ("borg:", "borg:/srv/repository::archive"):
        with pytest.raises(UsageError) as caught:
            blockferry_open_repository(reference, os.environ)
        told(caught.value)
    repository = blockferry_open_repository("borg:ssh://", os.environ)
    with contextlib.closing(repository), pytest.raises(UsageError) as caught:
        repository.snapshots()
    told(caught.value)


@newest
def test_no_host_there(series, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG", BORGS[series])
    monkeypatch.setenv("BORG_RSH", "sh -c 'echo no route to host >&2; sleep 1; exit 255'")
    repository = blockferry_open_repository("borg:ssh://somebody@nowhere.example/./repository", os.environ)
    with contextlib.closing(repository), pytest.raises(RepositoryError) as caught:
        repository.snapshots()
    assert "no route to host" in told(caught.value)


def test_every_error_has_two_lines_and_no_secret():
    for kind in ("LockTimeout", "DoesNotExist", "NobodyKnows", "OSError", "PathNotAllowed", "ObjectNotFound"):
        error = failure("borg:/srv", kind, "line with ssh://me:secret@host/x\nTraceback of a remote\n")
        assert "secret" not in told(error)
    assert without_credentials("ssh://me@host:22/path") == "ssh://me@host:22/path"


@newest
def test_the_worker_takes_its_modules_from_borg_alone(place, open_repository, tmp_path, monkeypatch):
    """A file in the current directory, or beside the worker, is not what borg imports."""
    (tmp_path / "msgpack.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    assert open_repository(Place(place.borg, str(Path(place.location).relative_to(tmp_path)))).snapshots() == []
