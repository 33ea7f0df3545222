"""Which repository a reference names, and that no credential is ever shown."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from blockferry.errors import PassphraseError, RepositoryError, UsageError
from blockferry_restic.location import Location, password
from blockferry_restic.plugin import blockferry_open_repository
from restic_support import Image, content_of, open_repository, restic_mounts, store

SECRET_URL = "rest:https://user:secr@et@nas.example:8000/vms"


def test_other_references_are_not_ours() -> None:
    assert blockferry_open_repository("borg:/srv/restic:x", {}) is None


@pytest.mark.parametrize(
    ("where", "directory"),
    [
        ("/srv/restic", "/srv/restic"),
        ("local:backup", "/home/backup"),
        ("relative/path", "/home/relative/path"),
        ("sftp:nas:/srv/restic", None),
        ("rest:http://nas:8000/", None),
        ("s3:s3.example.com/bucket", None),
    ],
)
def test_a_local_directory_is_told_from_everything_else(
    where: str, directory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/home")
    assert Location.named(where).directory == (None if directory is None else Path(directory))


def test_without_a_path_the_environment_names_the_repository(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("sftp:nas:/srv\n")
    assert Location.named("", {"RESTIC_REPOSITORY": "/srv/a"}).where == "/srv/a"
    assert Location.named("", {"RESTIC_REPOSITORY_FILE": str(tmp_path / "file")}).where == "sftp:nas:/srv"
    for environment in ({}, {"RESTIC_REPOSITORY_FILE": str(tmp_path / "none")}):
        with pytest.raises(UsageError, match="RESTIC_REPOSITORY"):
            Location.named("", environment)


def test_a_reference_a_message_and_a_repr_show_no_password() -> None:
    location = Location.named(SECRET_URL)
    assert location.reference == "restic:rest:https://user:***@nas.example:8000/vms"
    for text in (repr(location), location.hide(f"Head {SECRET_URL}: refused"), location.hide("tried secr@et in vain")):
        assert "secr" not in text
    assert location.environment()["RESTIC_REPOSITORY"] == SECRET_URL


def test_a_password_that_cannot_be_had_is_said_so_without_what_the_command_printed(tmp_path: Path) -> None:
    for environment, words in (
        ({}, "no password is set"),
        ({"RESTIC_PASSWORD_FILE": str(tmp_path / "none")}, "No such file"),
        ({"RESTIC_PASSWORD_COMMAND": "sh -c 'echo hunter2; exit 3'"}, "exit code 3"),
        ({"RESTIC_PASSWORD_COMMAND": "no-such-program"}, "not started"),
        ({"RESTIC_PASSWORD_COMMAND": "'unclosed"}, "not started"),
    ):
        with pytest.raises(PassphraseError, match=words) as caught:
            password(environment)
        assert "hunter2" not in str(caught.value)


def test_the_command_goes_before_the_file_and_the_file_before_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("\ufefffrom file \n", encoding="utf-8")
    every = {
        "RESTIC_PASSWORD": " from variable ",
        "RESTIC_PASSWORD_FILE": str(tmp_path / "file"),
        "RESTIC_PASSWORD_COMMAND": "echo 'from command'",
    }
    assert password(every) == "from command"
    del every["RESTIC_PASSWORD_COMMAND"]
    assert password(every) == "from file"
    del every["RESTIC_PASSWORD_FILE"]
    assert password(every) == " from variable "


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run an sshd of our own, which speaks on a pipe, and give the beginning of an sftp reference to it."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if sshd is None:
        pytest.skip("sshd is missing: install openssh-server")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = f"{sshd} -i -f /dev/null -h {tmp_path}/host -o AuthorizedKeysFile={tmp_path}/user.pub"
    server += " -o StrictModes=no -o PidFile=none -o Subsystem='sftp internal-sftp'"
    (tmp_path / "config").write_text(
        f"Host here\n ProxyCommand {server}\n IdentityFile {tmp_path}/user\n IdentitiesOnly yes\n"
        f" BatchMode yes\n StrictHostKeyChecking no\n UserKnownHostsFile {tmp_path}/known\n LogLevel ERROR\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/config "$@"\n')
    (tmp_path / "bin/ssh").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    return "sftp:here:"


@pytest.mark.slow
@pytest.mark.root
def test_a_repository_behind_sftp_holds_the_same(sftp: str, repository_path: Path, image: Image) -> None:
    remote = open_repository(f"{sftp}{repository_path}")
    base = store(remote, image)[0].snapshot
    image.write(0, b"changed")
    snapshot = store(remote, image, base, image.used.clip(0, 4096))[0].snapshot
    assert remote.snapshots() == [base, snapshot]
    assert remote.describe(snapshot)[0].base == base.id
    assert content_of(remote, snapshot) == image.expected()
    assert restic_mounts(repository_path) == []
    assert content_of(open_repository(repository_path), snapshot) == image.expected()


def test_what_goes_wrong_far_away_is_told_without_credentials() -> None:
    # restic tries for long: told to stop, it says why it could not go on, and that is what the user sees.
    remote = open_repository("rest:http://user:hunter2@127.0.0.1:1/")._restic
    with remote.start("snapshots", "--json", "--no-lock") as running:
        time.sleep(1.0)
        running.stop()
        with pytest.raises(RepositoryError) as caught:
            running.check("snapshots")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
