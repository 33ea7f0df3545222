"""A group's definition is read, refused with a place and a remedy, and kept in a snapshot's record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockferry.errors import DamagedSnapshotError, UsageError
from blockferry.groups.definition import Group
from blockferry.groups.patterns import Verdict
from blockferry.groups.tags import tag_in

WHOLE = {
    "volume": "/mnt/data/",
    "paths": ["/mnt/data/mail", "/mnt/data//www/"],
    "patterns": ["P fm", "- *.tmp"],
    "exclude_if_present": [".nobackup"],
    "exclude_caches": True,
    "schedule": " Mon..Fri   02:30 ",
    "keep_daily": 7,
    "keep_weekly": 0,
    "repository": "borg:/srv/borg",
}


def refused(**keys: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Group.parse("small", {"volume": "/mnt/data"} | keys, "there: groups.small")
    assert caught.value.remedy
    return caught.value


def test_everything_that_is_defined_is_there() -> None:
    group = Group.parse("small", WHOLE, "there")
    assert group == Group(
        name="small",
        root="/mnt/data",
        paths=("/mnt/data/mail", "/mnt/data/www"),
        patterns=("P fm", "- *.tmp"),
        exclude_if_present=(".nobackup",),
        exclude_caches=True,
        schedule="Mon..Fri 02:30",
        keep={"keep_daily": 7, "keep_weekly": 0},
        repository="borg:/srv/borg",
    )
    assert group.rules.verdict("mail/new/a.tmp") is Verdict.EXCLUDE


def test_by_default_a_group_is_all_that_is_on_its_filesystem() -> None:
    group = Group.parse("all", {"volume": "/", "paths": None}, "there")
    assert group.paths == ("/",)
    assert not group.rules


def test_a_path_below_another_one_is_in_it_already() -> None:
    paths = ["/mnt/data/a/b", "/mnt/data/a", "/mnt/data/ab", "/mnt/data/a"]
    assert Group.parse("g", {"volume": "/mnt/data", "paths": paths}, "there").paths == ("/mnt/data/a", "/mnt/data/ab")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": []}, "path: no such key"),
        ({"volume": None}, "volume: is missing"),
        ({"volume": "mnt/data"}, "no absolute path"),
        ({"volume": 7}, "no plain text"),
        ({"paths": ["/mnt/database"]}, "'/mnt/database' is not below /mnt/data"),
        ({"paths": ["mail"]}, "no absolute path"),
        ({"paths": ["/mnt/data/../etc"]}, "'..'"),
        ({"paths": "/mnt/data/mail"}, "no list"),
        ({"patterns": ["+ a", "- re:("]}, "patterns: pattern 2, '- re:('"),
        ({"patterns": ["R /mnt/data/mail"]}, "`paths`"),
        ({"patterns": ["- /mnt/data/mail/*.tmp"]}, "looked for below /mnt/data"),
        ({"exclude_if_present": ["a/b"]}, "no file name"),
        ({"exclude_caches": "yes"}, "neither true nor false"),
        ({"keep_daily": -1}, "keep_daily: -1 is no whole number"),
        ({"keep_daily": True}, "no whole number"),
        ({"keep_daily": "7"}, "no whole number"),
        ({"schedule": "daily\nExecStart=/bin/sh"}, "no plain text"),
    ],
)
def test_what_is_off_is_named_with_its_place(keys: dict[str, object], words: str) -> None:
    message = refused(**keys).message
    assert message.startswith("there: groups.small: ")
    assert words in message


def test_a_key_that_is_not_known_brings_the_nearest_one() -> None:
    assert refused(exclude_cache=True).remedy == "Did you mean exclude_caches?"
    assert refused(keep_dayly=7).remedy == "Did you mean keep_daily?"


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a\n", "ä", "x" * 65, 7, None])
def test_a_name_that_could_be_something_else_in_a_unit_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match="cannot be a name"):
        Group.parse(name, {"volume": "/mnt/data"}, "there")  # type: ignore[arg-type]


def test_a_pattern_may_begin_with_a_slash_below_the_root() -> None:
    group = Group.parse("g", {"volume": "/mnt/data", "patterns": ["- /mail/old", "- /mnt/database"]}, "there")
    assert group.rules.verdict("mail/old/x") is Verdict.EXCLUDE


def test_a_record_holds_the_group_but_not_where_it_was_stored() -> None:
    odd = os.fsdecode(b"/mnt/data/\xff")
    group = Group.parse("small", WHOLE | {"paths": [odd]}, "there")
    stored = json.loads(json.dumps(group.as_json()))
    assert "repository" not in stored
    again = Group.from_json(stored | {"of_a_later_version": 1})
    assert again.paths == (odd,)
    assert again.as_json() == group.as_json()


@pytest.mark.parametrize(
    "damage",
    [
        {"root": "../.."},
        {"paths": ["/etc"]},
        {"paths": None, "root": None},
        {"patterns": [7]},
        {"keep": [1]},
        {"name": "../x"},
    ],
)
def test_a_record_that_describes_no_group_is_damaged(damage: dict[str, object]) -> None:
    with pytest.raises(DamagedSnapshotError):
        Group.from_json(Group.parse("small", WHOLE, "there").as_json() | damage)
    with pytest.raises(DamagedSnapshotError):
        Group.from_json(["small"])


SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"


@pytest.mark.parametrize(
    ("content", "is_cache"),
    [(SIGNATURE + b"\n# by ccache", True), (SIGNATURE, True), (SIGNATURE[:-1], False), (b"", False)],
)
def test_a_directory_is_a_cache_if_the_tag_has_the_signature(tmp_path: Path, content: bytes, is_cache: bool) -> None:
    (tmp_path / "CACHEDIR.TAG").write_bytes(content)
    assert tag_of(tmp_path, exclude_caches=True) == ("CACHEDIR.TAG" if is_cache else "")
    assert tag_of(tmp_path) == ""


def test_a_tag_that_is_a_link_or_a_pipe_or_a_directory_is_none(tmp_path: Path) -> None:
    (tmp_path / "tag").write_bytes(SIGNATURE)
    tag = tmp_path / "CACHEDIR.TAG"
    for make in (lambda: tag.symlink_to("tag"), lambda: os.mkfifo(tag), tag.mkdir):
        make()
        assert tag_of(tmp_path, exclude_caches=True) == ""
        tag.rmdir() if tag.is_dir() and not tag.is_symlink() else tag.unlink()


def test_a_directory_with_something_of_a_name_is_left_out(tmp_path: Path) -> None:
    (tmp_path / ".nobackup").symlink_to("nowhere")
    assert tag_of(tmp_path, exclude_if_present=[".nobackup"]) == ".nobackup"
    assert tag_of(tmp_path, exclude_if_present=[".nobackups"]) == ""


def tag_of(directory: Path, **keys: object) -> str:
    group = Group.parse("g", {"volume": "/mnt/data"} | keys, "there")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return tag_in(descriptor, set(os.listdir(directory)), group)
    finally:
        os.close(descriptor)
