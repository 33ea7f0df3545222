"""`blockferry config`: all mistakes at once, what was understood, and a schema that says what the reading says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from blockferry.config.configuration import load_configuration
from blockferry.config.own import KEYS, VOLUME_KEYS
from blockferry.config.schema import schema
from blockferry.errors import UsageError
from blockferry.groups import definition
from blockferry.manager import plugin_manager
from commands_support import blockferry

WRONG = """\
repository: borgmatic:/nowhere.yaml
volums: {}
volumes:
  a: {path: /x, mont: 7, repository: foo}
  b:
    mount: 8
groups:
  g: {volume: zz, keep_daily: many, paths: 7}
  h:
    volume: a
  i:
    schedle: x
    volume: /mnt
"""


def test_every_mistake_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(WRONG)
    done = blockferry("--config", file, "config", "check", "--json")
    assert done.code == 2
    told = json.loads(done.out)["mistakes"]
    assert all(each["remedy"] for each in told)
    assert [each["message"].removeprefix(f"{file}:") for each in told] == [
        "2: volums: no such key",
        "4: volumes.a.mont: no such key",
        "6: volumes.b.mount: 8 is no plain text",
        "5: volumes.b: has no path",
        "8: groups.g.volume: zz: no volume of that name",
        "8: groups.g.keep_daily: 'many' is no whole number from 0 on",
        "8: groups.g.paths: 7 is no list of texts",
        "12: groups.i.schedle: no such key",
    ]
    blockferry("--config", file, "snapshots").refused(2, "volums")


def test_what_a_reference_names_is_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    (tmp_path / "p.yaml").write_text("default: {repository: /x}\n")
    file.write_text(
        f"repository: borgmatic:/nowhere.yaml\nvolumes:\n  a: {{path: /x, repository: foo}}\n"
        f"  b: {{path: /x, repository: 'resticprofile:{tmp_path}/p.yaml#defalt'}}\n"
        f"  c: {{path: /x, repository: 'resticprofile:{tmp_path}/p.yaml'}}\n"
        "  d: {path: /x, repository: restic:/srv}\n"
    )
    told = json.loads(blockferry("--config", file, "config", "check", "--json").out)["mistakes"]
    words = ("1: repository: borgmatic:/nowhere.yaml", "3: volumes.a.repository: foo:", "4: volumes.b.repository: ")
    assert len(told) == len(words)
    for each, begin in zip(told, words, strict=True):
        assert each["message"].startswith(f"{file}:{begin}")
    assert told[-1]["remedy"] == "Did you mean default?"


def test_what_was_understood_is_shown_without_passwords(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "repository: restic:rest:https://me:hunter2@nas/x\nvolumes: {vm: {path: /x}}\n"
        "groups: {g: {volume: /mnt, schedule: hourly}}\n"
    )
    shown = blockferry("--config", file, "config", "show", "--json").json()
    assert shown["volumes"]["vm"] == {"path": "/x", "mount": "", "repository": "restic:rest:https://***@nas/x"}
    assert shown["groups"]["g"]["schedule"] == "hourly"
    assert "hunter2" not in json.dumps(shown) + blockferry("--config", file, "config", "show").out
    assert "nothing is wrong" in blockferry("--config", file, "config", "check").out


def test_the_schema_has_the_keys_that_are_read() -> None:
    printed = json.loads(blockferry("config", "schema").out)
    assert printed == schema()
    properties = printed["properties"]
    assert tuple(properties) == KEYS
    assert tuple(properties["volumes"]["additionalProperties"]["properties"]) == VOLUME_KEYS
    assert set(properties["groups"]["additionalProperties"]["properties"]) == set(definition._KEYS)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("{}", True),
        ("repository: borg:/srv", True),
        ("repository: null", True),
        ("repository: 7", False),
        ("repositry: borg:/srv", False),
        ("volumes: {vm: {path: /x, mount: /mnt}}", True),
        ("volumes: {vm: {path: 7}}", False),
        ("volumes: {vm: {mount: /mnt}}", False),
        ("volumes: {'a b': {path: /x}}", False),
        ("volumes: {vm: {path: /x, mounted: /y}}", False),
        ("volumes: [a]", False),
        ("groups: {g: {volume: /mnt}}", True),
        ("groups: {g: {volume: /mnt, paths: [/mnt/a], patterns: ['- *.o'], exclude_caches: true, keep_last: 3}}", True),
        ("groups: {g: {paths: [/mnt/a]}}", False),
        ("groups: {g: {volume: /mnt, keep_last: -1}}", False),
        ("groups: {g: {volume: /mnt, keep_last: true}}", False),
        ("groups: {g: {volume: /mnt, paths: /mnt}}", False),
        ("groups: {g: {volume: /mnt, exclude_caches: 'yes'}}", False),
        ("groups: {g: {volume: /mnt, schedule: 7}}", False),
    ],
)
def test_the_schema_and_the_reading_agree(tmp_path: Path, text: str, good: bool) -> None:
    from ruamel.yaml import YAML  # noqa: PLC0415

    valid = jsonschema.Draft202012Validator(schema()).is_valid(YAML(typ="safe", pure=True).load(text))
    (tmp_path / "config.yaml").write_text(text)
    try:
        load_configuration(plugin_manager(), str(tmp_path / "config.yaml"))
    except UsageError:
        read = False
    else:
        read = True
    assert (valid, read) == (good, good)
