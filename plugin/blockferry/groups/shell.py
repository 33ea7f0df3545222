"""Shell globs with `**/` as regular expressions, as borg's `sh:` style reads them."""

from __future__ import annotations

import re

# What is no whole set is a literal bracket: what could belong to a set is not given back.
_PARTS = re.compile(r"(?P<levels>\*\*/)|(?P<star>\*)|(?P<any>\?)|\[(?P<set>!?+\]?+[^\]]*+)\]|(?P<literal>.)", re.DOTALL)


def translate(glob: str) -> str:
    """Return the regular expression of a glob, to be matched against a whole path.

    `**/` is any number of directories, none too; `*` and `?` do not cross a slash; a set, `[a-z]` or `[!a]`, may.
    """
    return "(?s:" + "".join(_translate(part) for part in _PARTS.finditer(glob)) + r")\Z"


def _translate(part: re.Match[str]) -> str:
    """Return the regular expression of one part of a glob."""
    kind = part.lastgroup
    if kind == "levels":
        return "(?:[^/]*/)*"
    if kind == "star":
        return "[^/]*"
    if kind == "any":
        return "[^/]"
    if kind == "set":
        members = part["set"].replace("\\", "\\\\")
        if members.startswith("!"):
            members = "^" + members[1:]
        elif members.startswith("^"):
            members = "\\" + members
        return f"[{members}]"
    return re.escape(part["literal"])
