"""Which borg is used, and how it is recognised."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from blockferry.errors import ToolMissingError
from blockferry_borg.installation import Way, find_installation, interpreter_of
from borg_support import BORGS


@pytest.mark.parametrize(
    ("head", "interpreter"),
    [
        ("#!/usr/bin/python3\n", ("/usr/bin/python3",)),
        ("#! /opt/borg/bin/python3.11 -sP\n", ("/opt/borg/bin/python3.11", "-sP")),
        ("#!/usr/bin/env python3\n", (shutil.which("python3"),)),
        ("#!/usr/bin/env -S python3 -I\n", (shutil.which("python3"), "-I")),
        ("#!/bin/sh\n'''exec' \"/very long/bin/python3\" \"$0\" \"$@\"\n' '''\n", ("/very long/bin/python3",)),
        ("#!/bin/sh\n'''exec' /very/long/bin/python \"$0\" \"$@\"\n' '''\n", ("/very/long/bin/python",)),
        ('#!/bin/sh\nexec /opt/borg "$@"\n', ()),
        ("#!/usr/bin/perl\n", ()),
        ("#!\n", ()),
        ("\x7fELF\x02\x01\n", ()),
        ("", ()),
    ],
)
def test_the_interpreter_is_read_from_the_script(head, interpreter, tmp_path):
    (tmp_path / "borg").write_text(head + "import borg\n")
    assert interpreter_of(tmp_path / "borg") == interpreter


def test_a_link_to_borg_is_borg(series, tmp_path, monkeypatch):
    (tmp_path / "borg").symlink_to(BORGS[series])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = find_installation()
    assert (found.way, found.version[:3]) == (Way.WORKER, series)
    assert found.command == str(tmp_path / "borg")


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_borg_without_modules_is_standalone(series, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG", script(tmp_path / "borg", f'#!/bin/sh\nexec {BORGS[series]} "$@"\n'))
    assert find_installation().way is Way.STANDALONE
    # A script of a Python that has no such module is no better than a binary.
    head = f"#!{sys.executable}\nimport os, sys\nos.execv({BORGS[series]!r}, sys.argv)\n"
    monkeypatch.setenv("BLOCKFERRY_BORG", script(tmp_path / "borg", head))
    assert find_installation().way is Way.STANDALONE


@pytest.mark.parametrize("version", ["1.1.18", "1.3.0", "2.0.0b22", "2.0.0a1", "3.0.0", "0.30"])
def test_a_series_that_nobody_tried_is_refused(version, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG", script(tmp_path / "borg", f"#!/bin/sh\necho borg {version}\n"))
    with pytest.raises(ToolMissingError, match=version):
        find_installation()


@pytest.mark.parametrize("version", ["2.0.0b23", "2.0.0b31", "2.0.0", "2.0.1"])
def test_borg_2_is_known_from_the_beta_that_takes_maps(version, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFERRY_BORG", script(tmp_path / "borg", f"#!/bin/sh\necho borg {version}\n"))
    assert find_installation().way is Way.MAPPED


def test_no_borg_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissingError) as caught:
        find_installation()
    assert "BLOCKFERRY_BORG" in caught.value.remedy
    monkeypatch.setenv("BLOCKFERRY_BORG", script(tmp_path / "broken", "#!/bin/sh\necho it is broken >&2\nexit 3\n"))
    with pytest.raises(ToolMissingError, match="it is broken"):
        find_installation()
