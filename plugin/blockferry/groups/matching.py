"""Whether a path matches patterns in borg's styles, as quickly as it can be told.

Patterns of which any may match are asked in one go. What is only a prefix, a name or the end of a name is compared as
that, without a regular expression: most patterns are.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os.path
import re
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

from blockferry.groups.shell import translate

STYLES = ("fm", "sh", "re", "pp", "pf")
UNREADABLE = (ValueError, re.error, OverflowError, RecursionError)
"""What reading a pattern raises if it is none."""
_MAGIC = re.compile(r"[*?\[]")


class Pattern(NamedTuple):
    """A pattern, and the style in which it is to be read."""

    style: str
    text: str

    @classmethod
    def parse(cls, text: str, default: str) -> Pattern:
        """Read `STYLE:PATTERN`, or a pattern in the default style; raise ValueError if there is no such style."""
        if len(text) > 2 and text[2] == ":" and text[:2].isalnum():
            return cls(style_named(text[:2]), text[3:])
        return cls(default, text)

    @property
    def full_path(self) -> str:
        """The one path that `pf:` means."""
        return os.path.normpath(self.text).lstrip("/")


@dataclasses.dataclass
class Matcher:
    """Patterns of which any may match."""

    prefixes: tuple[str, ...] = ()
    """How the framed path, `/PATH/`, may begin."""
    needles: tuple[str, ...] = ()
    """What may be in the framed path."""
    framed: Callable[[str, int], object] | None = None
    """What may match `PATH/`, given the framed path and 1."""
    searches: tuple[Callable[[str], object], ...] = ()
    """What may be found in the path itself."""

    @classmethod
    def of(cls, patterns: Iterable[Pattern]) -> Matcher:
        """Return a matcher of patterns of any style but `pf`; raise one of `UNREADABLE` if one cannot be compiled."""
        prefixes, needles, expressions, searches = [], [], [], []
        for pattern in patterns:
            if pattern.style == "re":
                searches.append(_compile(pattern.text).search)
            elif pattern.style == "pp":
                prefixes.append("/" + (os.path.normpath(pattern.text).rstrip("/") + "/").lstrip("/"))
            elif needle := _needle(pattern):
                needles.append(needle)
            else:
                expressions.append(_expression(pattern))
                _compile(expressions[-1])
        framed = _compile("|".join(f"(?:{each})" for each in expressions)).match if expressions else None
        return cls(tuple(prefixes), tuple(needles), framed, tuple(searches))

    def matches(self, path: str, framed: str) -> bool:
        """Tell whether one of the patterns matches a path, given without and with a slash before and behind it."""
        if framed.startswith(self.prefixes):
            return True
        for needle in self.needles:
            if needle in framed:
                return True
        if self.framed and self.framed(framed, 1):
            return True
        for search in self.searches:  # noqa: SIM110  # a generator takes three times as long
            if search(path):
                return True
        return False


def style_named(name: str) -> str:
    """Return the name of a style; raise ValueError if there is none of that name."""
    if name not in STYLES:
        raise ValueError(f"{name}: no such style; there are {', '.join(STYLES)}")
    return name


def _ends_in_slash(pattern: Pattern) -> tuple[str, bool]:
    """Return a glob's normal form, and whether it means only what is in the directory."""
    normal = os.path.normpath(pattern.text)
    return (normal.rstrip("/"), True) if pattern.text.endswith("/") else (normal, False)


def _needle(pattern: Pattern) -> str:
    """Return the string that `/PATH/` has if and only if a glob matches; "" if there is none."""
    normal, only_within = _ends_in_slash(pattern)
    normal = normal.lstrip("/")
    if only_within:
        return ""
    if pattern.style == "sh" and normal.startswith("**/"):
        rest = normal.removeprefix("**/")
        if not _MAGIC.search(rest):
            return f"/{rest}/"
        ending = rest.removeprefix("*")
    elif pattern.style == "fm" and normal.startswith("*"):
        ending = normal.removeprefix("*")
    else:
        return ""
    # One that began with a slash would match at the very beginning too, which is before the path.
    return "" if _MAGIC.search(ending) or ending.startswith("/") else f"{ending}/"


def _expression(pattern: Pattern) -> str:
    """Return the regular expression of a glob, to be matched against `PATH/`, as borg makes it."""
    normal, only_within = _ends_in_slash(pattern)
    below = "/**/*" if pattern.style == "sh" else "/*"
    glob = (normal + below + ("/" if only_within else "")).lstrip("/")
    return translate(glob) if pattern.style == "sh" else fnmatch.translate(glob)


def _compile(expression: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        # Python warns of sets that it may read otherwise one day: nothing that a user of patterns can be asked.
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(expression)
