"""Repositories as autorestic's backends describe them, what stands in its file of ours, and a location's hooks."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from blockferry.config.autorestic import backend_of
from blockferry.config.configuration import load_configuration
from blockferry.config.reference import ForeignReference
from blockferry.errors import UsageError
from blockferry.manager import plugin_manager
from commands_support import blockferry, command, run
from config_support import SECRET, real_autorestic, restic_repository

FILE = """\
version: 2
extras:
  blockferry:
    volumes:
      vm: {path: PLACE/vm.img}
global: {all: {limit-upload: [100]}, forget: {keep-last: [1]}}
locations:
  vm:
    from: [/etc]
    to: local-disk
    forget: prune
    options: {backup: {tag: [nightly]}}
    hooks:
      prevalidate: ['echo prevalidate $AUTORESTIC_LOCATION >> PLACE/log']
      before: ['echo before >> PLACE/log; exit STATUS']
      after: ['echo after $AUTORESTIC_SNAPSHOT_ID_0 >> PLACE/log']
      failure: ['echo failure >> PLACE/log']
      success: ['echo success >> log']
backends:
  local-disk: {type: local, path: ./repository, key: KEY, env: {restic_compression: max}}
"""


def write(place: Path, *, status: int = 0, text: str = FILE) -> Path:
    file = place / ".autorestic.yml"
    file.write_text(text.replace("PLACE", str(place)).replace("STATUS", str(status)).replace("KEY", SECRET))
    return file


def environment(reference: str, **around: str) -> dict[str, str]:
    named = ForeignReference.parse(reference)
    assert named
    return backend_of(named).environment(around)


def test_a_backend_gives_what_restic_is_to_find(tmp_path: Path) -> None:
    file = write(tmp_path)
    (tmp_path / ".autorestic.env").write_text("AUTORESTIC_LOCAL_DISK_RESTIC_KEY_HINT=abc\nOTHER=of the file\n")
    assert environment(f"autorestic:{file}", OTHER="set before", RESTIC_REPOSITORY_FILE="/x") == {
        "OTHER": "set before",
        "AUTORESTIC_LOCAL_DISK_RESTIC_KEY_HINT": "abc",
        "RESTIC_KEY_HINT": "abc",
        "RESTIC_REPOSITORY": f"{tmp_path}/repository",
        "RESTIC_PASSWORD": SECRET,
        "RESTIC_COMPRESSION": "max",
        "BLOCKFERRY_RESTIC_OPTIONS": "--limit-upload=100",
    }


BACKENDS = pytest.mark.parametrize(
    ("backend", "where"),
    [
        ("{type: s3, path: 's3.example/b', env: {aws_access_key_id: k}}", "s3:s3.example/b"),
        (
            "{type: rest, path: 'https://nas:8000/v', rest: {user: me, password: a/b@c}}",
            "rest:https://me:a%2Fb%40c@nas:8000/v",
        ),
        ("{type: rest, path: 'http://$NAS/v'}", "rest:http://nas/v"),
        ("{type: sftp, path: 'nas:/srv'}", "sftp:nas:/srv"),
        ("{type: local, path: ~/r}", str(Path.home() / "r")),
    ],
)


@BACKENDS
def test_every_type_of_backend_has_its_place(tmp_path: Path, backend: str, where: str) -> None:
    file = write(tmp_path, text=f"version: 2\nbackends:\n  a: {backend}\n  b: {{type: local, path: x}}\n")
    assert environment(f"autorestic:{file}#A", NAS="nas")["RESTIC_REPOSITORY"] == where


@pytest.mark.thorough
@BACKENDS
def test_a_real_autorestic_finds_the_same(
    tmp_path: Path, backend: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS", "nas")
    file = write(tmp_path, text=f"version: 2\nbackends:\n  a: {backend}\nlocations: {{}}\n")
    (tmp_path / ".autorestic.env").write_text(f"AUTORESTIC_A_RESTIC_PASSWORD={SECRET}\n")
    (tmp_path / "restic").write_text(f"#!/bin/sh\nexec env -0 >{tmp_path}/told\n")
    (tmp_path / "restic").chmod(0o755)
    run(real_autorestic(), "--ci", "-c", file, "--restic-bin", tmp_path / "restic", "exec", "-b", "a", "--", "version")
    told = dict(line.split("=", 1) for line in (tmp_path / "told").read_text().split("\0") if line)
    ours = environment(f"autorestic:{file}", **os.environ)
    assert (told["RESTIC_REPOSITORY"], told["RESTIC_PASSWORD"]) == (where, SECRET)
    assert {name: told.get(name) for name in ours} == ours


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backends: {a: {type: lokal, path: x}}\n", "1: backends.a.type: 'lokal'"),
        ("backends:\n  a: {type: local}\n", "2: backends.a: has no path"),
        ("backends: {a: {}, b: {}}\n", "has several backends"),
        ("locations: {}\n", "has no backends"),
        ("backends: {a: 7}\n", "1: backends.a: is no mapping"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        environment(f"autorestic:{write(tmp_path, text=text)}")


def test_volumes_stand_below_extras(tmp_path: Path) -> None:
    file = write(tmp_path)
    volume = load_configuration(plugin_manager(), str(file)).volume("vm")
    assert (volume.path, volume.repository) == (f"{tmp_path}/vm.img", f"autorestic:{file}")
    file.write_text(file.read_text().replace("path: /", "pat: /"))
    with pytest.raises(UsageError, match=r":5: extras\.blockferry\.volumes\.vm\.pat: no such key"):
        load_configuration(plugin_manager(), str(file))


def test_a_location_called_like_the_volume_gives_hooks_tags_and_rules(tmp_path: Path, volume: Path) -> None:
    repository = restic_repository(tmp_path / "repository")
    file = write(tmp_path)
    stored = blockferry("--config", file, "backup", "vm", "--json").json()
    assert len(snapshots(repository, "ar:location:vm,nightly")) == 1
    write(tmp_path, status=3)
    blockferry("--config", file, "backup", "vm").refused(1, "before", "status 3")
    assert (tmp_path / "log").read_text().splitlines() == [
        "prevalidate vm",
        "before",
        f"after {stored['archive']}",
        "success",
        "prevalidate vm",
        "before",
        "failure",
    ]


@pytest.mark.thorough
def test_a_real_autorestic_runs_the_hooks_in_the_same_order(tmp_path: Path, volume: Path) -> None:
    restic_repository(tmp_path / "repository")
    logs = []
    for status in (0, 3):
        file = write(tmp_path, status=status, text=FILE.replace("[/etc]", "[PLACE/vm.img]"))
        of_autorestic = [real_autorestic(), "--ci", "-c", file, "backup", "-l", "vm"]
        for words in (of_autorestic, command("--config", file, "backup", "vm")):
            (tmp_path / "log").unlink(missing_ok=True)
            subprocess.run(words, capture_output=True, check=False)
            logs.append(re.sub(r"(after [0-9a-f]{8})[0-9a-f]*", r"\1", (tmp_path / "log").read_text()))
    assert logs[2] == logs[3] == "prevalidate vm\nbefore\nfailure\n"
    listed = snapshots(tmp_path / "repository", "ar:location:vm,nightly")
    by_ids = "".join(f"prevalidate vm\nbefore\nafter {each['short_id']}\nsuccess\n" for each in listed)
    assert logs[0] + logs[1] == by_ids


def snapshots(repository: Path, tags: str) -> list[dict[str, str]]:
    environment = os.environ | {"RESTIC_PASSWORD": SECRET}
    return json.loads(run("restic", "-r", repository, "snapshots", "--tag", tags, "--json", env=environment))


@pytest.mark.thorough
def test_a_locations_rules_are_those_of_the_volume(tmp_path: Path, volume: Path) -> None:
    restic_repository(tmp_path / "repository")
    file = write(tmp_path)
    for _ in range(2):
        stored = blockferry("--config", file, "backup", "vm", "--json").json()
    (listed,) = blockferry("--config", file, "snapshots", "--json").json()["snapshots"]
    assert listed["id"] == stored["snapshot"]
