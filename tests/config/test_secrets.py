"""No secret of another tool's file is ever in a command line, in what is printed, or in what is kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from blockferry.config import standing_in
from blockferry.config.borgmatic import resolve
from blockferry.config.reference import ForeignReference
from commands_support import blockferry
from config_support import SECRET, Job, restic_repository
from secrets_support import Watch, kept


def test_borgmatics_passphrase_stays_where_it_belongs(
    job: Job, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    job.write("keep_secondly: 1\nskip_actions: [check]\ncommands: [{before: action, when: [create], run: ['true']}]")
    with Watch(SECRET) as watch:
        said = blockferry("-vv", "backup", volume, "--repo", job.reference)
        again = blockferry("-vv", "--log-json", "backup", volume, "--repo", job.reference)
        restored = blockferry("-vv", "restore", "latest", tmp_path / "back.img", "--repo", job.reference)
    assert (said.code, again.code, restored.code) == (0, 0, 0), said.err + again.err + restored.err
    assert watch.looks > 10
    assert watch.seen == set()
    assert watch.environments == set(), "borg has it from a pipe, as borgmatic gives it"
    assert not any(SECRET in done.out + done.err for done in (said, again, restored))
    assert list(kept(SECRET, tmp_path / "state", job.repository, tmp_path / "source")) == []


def test_restics_password_is_in_the_environment_of_restic_alone(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path / "state"))
    restic_repository(tmp_path / "repository")
    file = tmp_path / "p.yaml"
    file.write_text(
        f"default:\n  repository: {tmp_path}/repository\n  env: {{RESTIC_PASSWORD: {SECRET}}}\n"
        "  retention: {after-backup: true, keep-last: 1, prune: true}\n"
    )
    with Watch(SECRET) as watch:
        done = [blockferry("-vv", "backup", volume, "--repo", f"resticprofile:{file}")]
        done.append(blockferry("-vv", "restore", "latest", tmp_path / "back.img", "--repo", f"resticprofile:{file}"))
    assert [each.code for each in done] == [0, 0], done
    assert watch.seen == set()
    # setpriv and env become restic; what is just becoming one of them has no command line.
    programs = {line.partition(" ")[0].rpartition("/")[2] for line in watch.environments}
    assert programs <= {"restic", "setpriv", "env", ""}, watch.environments
    assert not any(SECRET in each.out + each.err for each in done)
    assert list(kept(SECRET, tmp_path / "state", tmp_path / "repository")) == []


def test_what_borgmatic_told_is_not_shown(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    named = ForeignReference.parse(job.reference)
    assert named
    location, told = resolve(named, os.environ)
    assert (location, told.passphrase) == (str(job.repository), SECRET)
    assert SECRET not in repr(told) + caplog.text
    assert isinstance(told, standing_in.Told)
