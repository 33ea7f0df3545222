"""Every file that systemd reads of ours: what is in `files/`, filled in, and where it goes."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from blockferry import systemd
from blockferry.programs import find

BACKUP = "blockferry-backup@.service"
TIMER = "blockferry-backup@.timer"
RESTORE = "blockferry-restore@.service"
GUARD = "blockferry-guard@.service"
TRACK = "blockferry-track@.service"
TEMPLATES = (BACKUP, RESTORE, GUARD, TRACK)
_TMPFILES = "blockferry.tmpfiles"
_BORGMATIC = "borgmatic.conf"
_PLACES = {
    **{name: Path("etc/systemd/system", name) for name in TEMPLATES},
    _TMPFILES: Path("etc/tmpfiles.d/blockferry.conf"),
    _BORGMATIC: Path("etc/systemd/system/borgmatic.service.d/blockferry.conf"),
}
_USUAL_STATE = "/var/lib/blockferry"


def written_by(command: str) -> str:
    """Return the remark by which a file that we wrote is known."""
    return f"Written by `blockferry {command} install`."


def text(template: str, written: str, /, **values: str) -> str:
    """Return one of the files, with the values for the names in it; KeyError if one is missing."""
    values |= {"written": written}
    content = (importlib.resources.files("blockferry.systemd") / "files" / template).read_text()
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1].lower()], content)


def environment(**variables: str) -> str:
    """Return the lines that set variables to paths, without those that are ""; each ends with a newline."""
    return "".join(
        f"Environment={systemd.quoted(f'{name}={os.path.abspath(value)}')}\n"  # noqa: PTH100  # a link stays one
        for name, value in variables.items()
        if value
    )


def own_environment(config: str = "") -> str:
    """Return the lines with what our own environment says of places, and the configuration file if it is not usual."""
    names = ("BLOCKFERRY_STATE_DIR", "BLOCKFERRY_METRICS_DIR")
    return environment(BLOCKFERRY_CONFIG=config, **{name: os.environ.get(name, "") for name in names})


def install(root: Path | None, config: str, *, borgmatic: bool) -> list[Path]:
    """Write all units but timers, for this machine or below the `root` of another; return the files.

    With `borgmatic` also what its unit needs. Where systemd runs it reads them.
    """
    # Another machine, or a package, has the command where systemd looks for it.
    command = "blockferry" if root else systemd.quoted(systemd.own_command())
    variables = own_environment(config)
    state = systemd.quoted(os.path.abspath(os.environ.get("BLOCKFERRY_STATE_DIR") or _USUAL_STATE))  # noqa: PTH100  # a link stays one
    written = []
    for name, place in _PLACES.items():
        if name != _BORGMATIC or borgmatic:
            content = text(name, written_by("systemd"), command=command, environment=variables, state=state)
            written.append(systemd.write((root or Path("/")) / place, content))
    if root is None and systemd.runs():
        systemd.run(find("systemd-tmpfiles"), "--create", str(written[len(TEMPLATES)]))
    _reload(root)
    return written


def remove(root: Path | None) -> list[Path]:
    """Remove whatever `install` wrote, and return the files; what runs goes on."""
    places = [(root or Path("/")) / place for place in _PLACES.values()]
    ours = [path for path in places if path.is_file() and written_by("systemd") in path.read_text(errors="replace")]
    for path in ours:
        path.unlink()
    if ours:
        _reload(root)
    return ours


def _reload(root: Path | None) -> None:
    if root is None and systemd.runs():
        systemd.run(find("systemctl"), "daemon-reload")
