"""Lines of the log as systemd's journal takes them: with a priority, and fields that can be asked for.

The protocol is that of https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram of NAME=value lines. A value of several
lines has its length before it, 64 bits, little-endian. A datagram that is too large goes as a descriptor of a sealed
memory file; ours are short, and cut.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from typing import IO

SOCKET = "/run/systemd/journal/socket"
_MOST = 48 << 10
"""Bytes of a value: well below what a socket takes by default."""
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

_about: dict[str, object] = {}


def about(**fields: object) -> None:
    """Say what the lines from here on are about: `volume`, `snapshot`, `tier`. An empty one is left out."""
    _about.update(fields)


def is_ours(stream: IO[str]) -> bool:
    """Tell whether a stream leads to the journal, as systemd says in JOURNAL_STREAM (systemd.exec(5))."""
    named = os.environ.get("JOURNAL_STREAM", "")
    try:
        facts = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{facts.st_dev}:{facts.st_ino}" and os.path.exists(SOCKET)  # noqa: PTH110  # of a socket


class JournalHandler(logging.Handler):
    """Sends records to the journal, `record.fields` with them; what it does not take goes to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        fields = {"MESSAGE": self.format(record), "PRIORITY": priority, "SYSLOG_IDENTIFIER": "blockferry"}
        fields |= {"LOGGER": record.name} | _named(_about) | _named(getattr(record, "fields", {}))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
                journal.settimeout(5.0)
                journal.sendto(b"".join(_field(name, str(value)) for name, value in fields.items()), SOCKET)
        except OSError:
            print(f"<{priority}>{fields['MESSAGE']}", file=sys.stderr)  # noqa: T201  # its prefix (sd-daemon(3))


def _named(fields: object) -> dict[str, object]:
    """Return the plain values of a mapping under the names that they have in the journal."""
    named = fields.items() if isinstance(fields, Mapping) else ()
    plain = {name: value for name, value in named if isinstance(value, (str, int, float)) and value != ""}
    return {f"BLOCKFERRY_{re.sub('[^A-Z0-9_]', '_', name.upper())}": value for name, value in plain.items()}


def _field(name: str, value: str) -> bytes:
    content = value.encode("utf-8", "backslashreplace")[:_MOST]
    if b"\n" in content:
        return name.encode() + b"\n" + struct.pack("<Q", len(content)) + content + b"\n"
    return name.encode() + b"=" + content + b"\n"
