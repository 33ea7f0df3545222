"""The packages that programs come with: every program that the code looks for has them, for three kinds of systems."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry import doctor, programs
from blockferry.errors import ToolMissingError
from blockferry.manager import plugin_manager
from blockferry.programs import PACKAGES, find, package_of

ROOT = Path(__file__).parents[2]
ASKERS = {"find", "look_for", "_program", "run_lvm", "tool_version", "elements", "package_of"}
"""What takes the name of a program first, by itself or handed on."""
BY_THEIR_OWN_MEANS = {"borg", "restic"}


def looked_for() -> Iterator[tuple[str, str]]:
    """Yield where a program is looked for, and its name."""
    for path in [*ROOT.glob("plugin/**/*.py"), *ROOT.glob("adapters/**/*.py")]:
        source = path.read_text()
        if "blockferry.programs" not in source and "devicemapper" not in source and "run_lvm" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            first = node.args[0]
            if name in ASKERS and isinstance(first, ast.Constant):
                yield f"{path.name}:{node.lineno}", str(first.value)


def test_every_program_that_is_looked_for_has_packages() -> None:
    found = dict(looked_for())
    assert len(found) > 20
    assert {place: name for place, name in found.items() if name not in PACKAGES} == {}
    assert PACKAGES.keys() == set(found.values()) | BY_THEIR_OWN_MEANS | {name for name, *_rest in doctor._PROGRAMS}


def test_every_package_has_a_name_on_each_system() -> None:
    for packages in PACKAGES.values():
        assert len(packages) == 3
        assert all(packages)


def test_the_doctor_looks_for_something_of_each_package() -> None:
    looked_at = {PACKAGES[name] for name, *_rest in doctor._PROGRAMS}
    left_out = {name for name, packages in PACKAGES.items() if packages not in looked_at}
    assert left_out == {"cat", "env", "libudev"}  # there wherever Linux is, and what is not a program


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"ID": "debian"}, "fdisk (Fedora: util-linux, Arch: util-linux)"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "fdisk (Fedora: util-linux, Arch: util-linux)"),
        ({"ID": "fedora"}, "util-linux (Debian: fdisk)"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "util-linux (Debian: fdisk)"),
        ({"ID": "arch"}, "util-linux (Debian: fdisk)"),
        ({"ID": "plan9"}, "fdisk (Fedora: util-linux, Arch: util-linux)"),
    ],
)
def test_the_name_of_a_package_on_this_system_comes_first(
    said: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: said)
    assert package_of("sfdisk") == named


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.shutil, "which", lambda _name, path: None)
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "arch"})
    with pytest.raises(ToolMissingError) as raised:
        find("udevadm")
    assert raised.value.remedy == "Install the package systemd (Debian: udev, Fedora: systemd-udev)."
    with pytest.raises(ToolMissingError, match="brings frobnicate"):
        find("frobnicate")  # a plugin's own
    remedies = {each.name: each.remedy for each in doctor.examine(plugin_manager()) if not each.found}
    assert remedies["nbdfuse"] == "install the package libnbd (Debian: libnbd-bin, Fedora: nbdfuse)"
    assert remedies.keys() >= {name for name, *_rest in doctor._PROGRAMS}


def test_a_system_that_does_not_say_what_it_is_is_told_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "freedesktop_os_release", unknown)
    assert package_of("borg") == "borgbackup (Arch: borg)"
