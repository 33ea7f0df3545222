"""Where a repository is: one way to write each place, whoever names it."""

from __future__ import annotations

import os.path
import re

_SCP = re.compile(r"((?:[^@:/]+@)?(?:\[[0-9A-Fa-f:.]+\]|[^@:/\[\]]+)):(.+)")
"""`user@host:path` (borg, helpers/parseformat.py, `scp_re`)."""
_OTHER_SCHEMES = ("rclone:", "s3:", "b2:")
"""What borg 2 knows beside URLs."""


def canonical(location: str) -> str:
    """Return a location as a URL or an absolute path: it means the same in any directory.

    By this a repository is known again, be it named in an option, in the environment or in borgmatic's configuration.
    """
    location = re.sub(r"\Afile://(?=/)", "", location)
    if "://" in location or location.startswith(_OTHER_SCHEMES):
        return location
    if match := _SCP.fullmatch(location):
        host, path = match.groups()
        between = "" if path.startswith("/") else "/" if path.startswith("~") else "/./"
        return f"ssh://{host}{between}{path}"
    return os.path.abspath(location)  # noqa: PTH100  # links stay: what the user says stays recognizable
