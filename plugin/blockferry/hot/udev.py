"""What udev and systemd are told, and what udev knows of the devices that are here.

The rule does next to nothing for a device that is not armed: it looks for a file. For one that is, it has systemd start
a unit, named after the match: everything that can fail is done there, where it may take its time. Values come from
devices and are not to be trusted: one with other characters than a match may have is never looked for.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from blockferry import systemd
from blockferry.errors import ToolMissingError
from blockferry.hot.arming import KINDS, VALUE_CHARACTERS, Match
from blockferry.programs import find, package_of
from blockferry.systemd import units

if TYPE_CHECKING:
    import pyudev

RULE_FILE = "90-blockferry.rules"
UNIT_FILE = units.RESTORE
_RULES = Path("etc/udev/rules.d", RULE_FILE)
_UNITS = Path("etc/systemd/system", UNIT_FILE)
_OUR_DISKS = "*/blockferry/mounts/hot-*"
"""The files behind the loop devices that hot restores show (`disk.py`, `fuse.py`)."""

_RULE = """\
# Starts a hot restore onto a device that `blockferry arm` was told of. Written by `blockferry udev install`.
SUBSYSTEM!="block", GOTO="blockferry_end"
ACTION!="add|change", GOTO="blockferry_end"

# The disk that a hot restore shows, and its partitions, are what is restored, not what is restored onto.
ATTRS{{loop/backing_file}}=="{our_disks}", GOTO="blockferry_end"

{matches}
GOTO="blockferry_end"

LABEL="blockferry_armed"
TAG+="systemd", ENV{{UDISKS_IGNORE}}="1"
# Once each time that it shows up: who has looked at a disk makes an event, and systemd would start again what was
# stopped or refused.
ENV{{DISK_MEDIA_CHANGE}}!="1", IMPORT{{db}}="BLOCKFERRY_BEGUN"
ENV{{BLOCKFERRY_BEGUN}}!="1", ENV{{SYSTEMD_WANTS}}+="blockferry-restore@$env{{BLOCKFERRY_ARMED}}.service"
ENV{{BLOCKFERRY_BEGUN}}="1"

LABEL="blockferry_end"
"""

_MATCH = """\
ENV{{DEVTYPE}}=="{type}", ENV{{{property}}}=="?*", ENV{{{property}}}!="*[!{characters}]*", \\
  TEST=="{directory}/{kind}:$env{{{property}}}", ENV{{BLOCKFERRY_ARMED}}="{kind}:$env{{{property}}}", \\
  GOTO="blockferry_armed"
"""


def rule(state: Path) -> str:
    """Return udev's rule for what is armed below the state directory `state`."""
    matches = "\n".join(
        _MATCH.format(
            kind=name,
            type=kind.type,
            property=kind.property,
            characters=VALUE_CHARACTERS,
            directory=state / "armed",
        )
        for name, kind in KINDS.items()
    )
    return _RULE.format(our_disks=_OUR_DISKS, matches=matches)


def unit(command: str, state: str) -> str:
    """Return systemd's template: `command` runs us, `state` is the state directory if it is not the usual one."""
    named = units.environment(
        BLOCKFERRY_STATE_DIR=state, BLOCKFERRY_METRICS_DIR=os.environ.get("BLOCKFERRY_METRICS_DIR", "")
    )
    command = systemd.quoted(command) if "/" in command else command
    return units.text(UNIT_FILE, units.written_by("udev"), command=command, environment=named)


def install(root: Path | None) -> list[Path]:
    """Write the rule and the unit, for this machine or below the `root` of another, and return where they are."""
    state = os.environ.get("BLOCKFERRY_STATE_DIR", "")
    # Another machine, or a package, has the command where systemd looks for it.
    command = "blockferry" if root else systemd.own_command()
    contents = {
        _RULES: rule(Path(state or "/var/lib/blockferry")),
        _UNITS: unit(command, state),
    }
    written = [systemd.write((root or Path("/")) / place, content) for place, content in contents.items()]
    if root is None:
        if udevd_runs():
            systemd.run(find("udevadm"), "control", "--reload")
        if systemd.runs():
            systemd.run(find("systemctl"), "daemon-reload")
    return written


def is_installed() -> bool:
    """Tell whether udev has the rule."""
    places = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
    return any(Path(place, RULE_FILE).exists() for place in places)


def systemd_starts_it() -> bool:
    """Tell whether this machine's systemd knows the unit."""
    places = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
    return systemd.runs() and any(Path(place, UNIT_FILE).exists() for place in places)


def udevd_runs() -> bool:
    """Tell whether there is a udev daemon; one that ended may have left its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        try:
            asking.connect("/run/udev/control")
        except PermissionError:
            return True
        except OSError:
            return False
    return True


def context() -> pyudev.Context:
    """Return udev's library; raise ToolMissingError if it is not there."""
    import pyudev  # noqa: PLC0415  # few commands need it

    try:
        return pyudev.Context()
    except ImportError:
        raise ToolMissingError(
            "libudev is not installed", remedy=f"Install the package {package_of('libudev')}."
        ) from None


def devices_of(match: Match) -> list[pyudev.Device]:
    """Return the devices that are here and answer to a match."""
    kind = KINDS[match.kind]
    # To libudev one of several properties is enough.
    found = context().list_devices(subsystem="block", **{kind.property: match.value})
    return [each for each in found if each.device_type == kind.type and not _is_our_own(each)]


def _is_our_own(device: pyudev.Device) -> bool:
    """Tell whether a device is the disk that a hot restore shows, or a partition of it."""
    for each in (device, *device.ancestors):
        try:
            backing = (Path(each.sys_path) / "loop" / "backing_file").read_text().rstrip("\n")
        except OSError:
            continue
        return Path(backing).match(_OUR_DISKS + "/*/*")
    return False
