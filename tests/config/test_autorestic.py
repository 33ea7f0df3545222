"""Repositories as autorestic's backends describe them, what stands in its file of ours, and a location's hooks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockferry.config.autorestic import backend_of
from blockferry.config.configuration import load_configuration
from blockferry.config.reference import ForeignReference
from blockferry.errors import UsageError
from blockferry.manager import plugin_manager
from commands_support import blockferry, run
from config_support import SECRET, restic_repository

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
    to: Local-Disk
    forget: prune
    options: {backup: {tag: [nightly]}}
    hooks:
      prevalidate: ['echo prevalidate $AUTORESTIC_LOCATION >> PLACE/log']
      before: ['echo before >> PLACE/log; exit STATUS']
      after: ['echo after $AUTORESTIC_SNAPSHOT_ID_0 >> PLACE/log']
      failure: ['echo failure >> PLACE/log']
      success: ['echo success >> log']
backends:
  Local-Disk: {type: local, path: ./repository, key: KEY, env: {restic_compression: max}}
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


@pytest.mark.parametrize(
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
def test_every_type_of_backend_has_its_place(tmp_path: Path, backend: str, where: str) -> None:
    file = write(tmp_path, text=f"version: 2\nbackends:\n  a: {backend}\n  b: {{type: local, path: x}}\n")
    assert environment(f"autorestic:{file}#A", NAS="nas")["RESTIC_REPOSITORY"] == where


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
    environment = os.environ | {"RESTIC_PASSWORD": SECRET}
    tagged = run("restic", "-r", repository, "snapshots", "--tag", "ar:location:vm,nightly", "--json", env=environment)
    assert tagged.count('"short_id"') == 1
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
def test_a_locations_rules_are_those_of_the_volume(tmp_path: Path, volume: Path) -> None:
    restic_repository(tmp_path / "repository")
    file = write(tmp_path)
    for _ in range(2):
        stored = blockferry("--config", file, "backup", "vm", "--json").json()
    (listed,) = blockferry("--config", file, "snapshots", "--json").json()["snapshots"]
    assert listed["id"] == stored["snapshot"]
