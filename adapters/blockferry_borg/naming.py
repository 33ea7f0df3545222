"""What archives are called where BLOCKFERRY_BORG_ARCHIVE_NAME says it, with the placeholders of borg."""

from __future__ import annotations

import datetime
import getpass
import os
import socket
import string
import uuid
from collections.abc import Mapping

from blockferry.errors import UsageError

_TIME = "%Y-%m-%dT%H:%M:%S"


class _Time:
    """A time that is formatted as borg does."""

    def __init__(self, time: datetime.datetime) -> None:
        self.time = time

    def __format__(self, form: str) -> str:
        return self.time.strftime(form or _TIME)


def named(template: str, variables: Mapping[str, str], **ours: str) -> str:
    """Return a name whose placeholders are replaced: those of borg, and `ours`; raise UsageError for an unknown one."""
    now = datetime.datetime.now(datetime.UTC)
    host = socket.gethostname()
    values: dict[str, object] = {
        "hostname": variables.get("BORG_HOSTNAME") or host.split(".")[0],
        "now": _Time(now.astimezone()),
        "utcnow": _Time(now),
        "unixtime": int(now.timestamp()),
        "pid": os.getpid(),
        "uuid4": str(uuid.uuid4()),
        **ours,
    }
    try:
        asked = {name for _text, name, _form, _conversion in string.Formatter().parse(template) if name}
        if asked & {"fqdn", "reverse-fqdn"}:
            values["fqdn"] = fqdn = socket.getfqdn(host)
            values["reverse-fqdn"] = ".".join(reversed(fqdn.split(".")))
        if "user" in asked:
            values["user"] = variables.get("BORG_USERNAME") or getpass.getuser()
        unknown = asked - values.keys()
        name = "" if unknown else template.format_map(values)
    except (ValueError, LookupError, AttributeError) as error:
        raise UsageError(f"{template!r} cannot be a name: {error}", remedy="See `borg help placeholders`.") from None
    if unknown or not name.strip() or "/" in name:
        what = f"{{{min(unknown)}}} is not known here" if unknown else "it is empty or has a / in it"
        raise UsageError(f"{template!r} cannot be a name: {what}", remedy="See `borg help placeholders`.")
    return name
