"""Files of environment variables (`.env`), as resticprofile and autorestic read them: github.com/joho/godotenv."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from blockferry.errors import UsageError

_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_.]*)\s*[=:]\s*
    (?:'(?P<literal>[^']*)'|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>.*?))(?:\s*|\s+\#.*)\Z""",
    re.VERBOSE | re.DOTALL,
)
_NAMED = re.compile(r"(?P<escape>\\)?\$(?:\{(?P<braced>[A-Za-z0-9_]+)\}|(?P<name>[A-Za-z_][A-Za-z0-9_]*))")


def read_environment(file: str) -> dict[str, str]:
    """Return the variables of a file; raise UsageError, with the line but never with what is in it, if it is none."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file}: cannot be read: {reason}", remedy="Check the name of the file.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise UsageError(f"{file}:{number}: is not NAME=VALUE", remedy="Values on several lines are not read here.")
        if match["literal"] is not None:
            value = match["literal"]
        elif match["quoted"] is not None:
            value = _expanded(re.sub(r"\\([nr\"\\])", lambda each: _ESCAPES[each[1]], match["quoted"]), found)
        else:
            value = _expanded(match["plain"], found)
        found[match["name"]] = value
    return found


_ESCAPES = {"n": "\n", "r": "\r", '"': '"', "\\": "\\"}


def _expanded(text: str, known: Mapping[str, str]) -> str:
    """Return a text in which the variables of the same file have their values."""
    return _NAMED.sub(
        lambda each: each[0][1:] if each["escape"] else known.get(each["braced"] or each["name"], ""), text
    )
