"""The JSON Schema of blockferry's own format, for editors: what it says a test holds to what `own.py` reads."""

from __future__ import annotations

from typing import Any

from blockferry.retention import KEEPS

_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_REFERENCE = {
    "type": ["string", "null"],
    "pattern": "^$|^[a-z]+:",
    "description": "Where to: borg:PATH-OR-URL, restic:PATH-OR-URL, borgmatic:FILE#LABEL, resticprofile:FILE#PROFILE "
    "or autorestic:FILE#BACKEND.",
}
_KEEPS = {
    key: {"type": ["integer", "null"], "minimum": 0, "description": "How many snapshots to keep."} for key in KEEPS
}


def schema() -> dict[str, Any]:
    """Return the schema, as JSON has it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockferry's configuration",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "repository": _REFERENCE,
            "volumes": _named(_volume(), "Volumes that have a name: `blockferry backup NAME`."),
            "groups": _named(_group(), "Groups of files: `blockferry backup NAME`."),
            "metrics": {
                "type": ["string", "null"],
                "pattern": "^$|^/",
                "description": "The directory for files of metrics, as node_exporter reads them.",
            },
        },
    }


def _named(entry: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "description": description,
        "propertyNames": {"pattern": _NAME},
        "additionalProperties": entry,
    }


def _volume() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["path"],
        "properties": {
            "path": _text("What to back up: a device, an image file.") | {"type": "string", "minLength": 1},
            "mount": _text("Where its filesystem is mounted, for the groups on it."),
            "repository": _REFERENCE,
            **_KEEPS,
        },
    }


def _group() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["volume"],
        "properties": {
            "volume": _text("A directory at or below a mount point, or the name of a volume.")
            | {"type": "string", "minLength": 1},
            "paths": _texts("Absolute paths, the volume's or below it; none: all of it."),
            "patterns": _texts("Which files, in borg's words: `- *.tmp`."),
            "exclude_if_present": _texts("A directory that has something of one of these names is left out."),
            "exclude_caches": {"type": ["boolean", "null"], "description": "Leave out what says that it is a cache."},
            "schedule": _text("When, as systemd's OnCalendar: hourly, for example."),
            "repository": _REFERENCE,
            **_KEEPS,
        },
    }


def _text(description: str) -> dict[str, Any]:
    return {"type": ["string", "null"], "description": description}


def _texts(description: str) -> dict[str, Any]:
    return {"type": ["array", "null"], "items": {"type": "string"}, "description": description}
