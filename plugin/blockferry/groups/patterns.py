"""Which files a group takes and leaves: borg's patterns, with the verdicts that borg 1.4 gives (`borg help patterns`).

A pattern sees a path without the leading slash, and in all styles but `re:` a match on a directory is a match on all
that is in it. Full paths (`pf:`) are looked up before everything else, the last line of a path counts; else the first
line that matches does. Names are `str` as `os.fsdecode` makes them: bytes that are no UTF-8 match as any character.

This is asked once for each of millions of files. So lines that follow each other and say the same are asked in one go,
and what is only a prefix, a name or the end of a name is compared as that, without a regular expression.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import os.path
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from blockferry.errors import UsageError
from blockferry.groups.shell import translate


class Verdict(enum.Enum):
    """What becomes of a file or directory."""

    INCLUDE = "include"
    EXCLUDE = "exclude"
    """Left out; what is in the directory is asked about nevertheless."""
    EXCLUDE_NO_RECURSE = "exclude, and do not recurse"


_COMMANDS = {"+": Verdict.INCLUDE, "-": Verdict.EXCLUDE, "!": Verdict.EXCLUDE_NO_RECURSE}
_STYLES = ("fm", "sh", "re", "pp", "pf")
_UNREADABLE = (ValueError, re.error, OverflowError, RecursionError)
_MAGIC = re.compile(r"[*?\[]")
_REMEDY = "A pattern is `+ PATTERN`, `- PATTERN` or `! PATTERN`; see `borg help patterns`."


class _Pattern(NamedTuple):
    """A pattern, and the style in which it is to be read."""

    style: str
    text: str

    @classmethod
    def parse(cls, text: str, default: str) -> _Pattern:
        """Read `STYLE:PATTERN`, or a pattern in the default style; raise ValueError if there is no such style."""
        if len(text) > 2 and text[2] == ":" and text[:2].isalnum():
            return cls(_style(text[:2]), text[3:])
        return cls(default, text)

    @property
    def full_path(self) -> str:
        """The one path that `pf:` means."""
        return os.path.normpath(self.text).lstrip("/")


@dataclasses.dataclass
class _Matcher:
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
    def of(cls, patterns: Iterable[_Pattern]) -> _Matcher:
        """Return a matcher of patterns of any style but `pf`; raise one of `_UNREADABLE` if one cannot be compiled."""
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


class Rules:
    """Include and exclude patterns, in order. False if there are none: then all is included, and nobody need ask."""

    def __init__(self, full_paths: dict[str, Verdict], runs: Sequence[tuple[_Matcher, Verdict]]) -> None:
        self._full_paths = full_paths
        self._runs = tuple(runs)

    @classmethod
    def parse(cls, lines: Sequence[str]) -> Rules:
        """Read the lines of a file of patterns, as of `borg create --patterns-from`: the default style is `sh:`.

        Empty lines and those that begin with # are skipped; `P STYLE` changes the default for the lines that follow.
        Raise UsageError, naming the line, if one cannot be read or names a root (`R`).
        """
        full_paths: dict[str, Verdict] = {}
        runs: list[tuple[list[_Pattern], Verdict]] = []
        default = "sh"
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                command, value = _command(text)
                if command in "Pp":
                    default = _style(value)
                    continue
                pattern, verdict = _Pattern.parse(value, default), _COMMANDS[command]
                if pattern.style == "pf":
                    full_paths[pattern.full_path] = verdict
                    continue
                _Matcher.of([pattern])
            except _UNREADABLE as error:
                raise UsageError(f"pattern {number}, {line!r}: {error}", remedy=_REMEDY) from None
            if not runs or runs[-1][1] is not verdict:
                runs.append(([], verdict))
            runs[-1][0].append(pattern)
        return cls(full_paths, [(_Matcher.of(patterns), verdict) for patterns, verdict in runs])

    def __bool__(self) -> bool:
        return bool(self._full_paths or self._runs)

    def verdict(self, path: str) -> Verdict:
        """Return what becomes of a path, relative to the group's root; what no pattern matches is included."""
        path = path.lstrip("/")
        if self._full_paths and (found := self._full_paths.get(path)):
            return found
        framed = f"/{path}/"
        for matcher, verdict in self._runs:
            if matcher.matches(path, framed):
                return verdict
        return Verdict.INCLUDE


class Selection:
    """The files that a user names: paths, with all that is below them, as `borg extract` takes them, or patterns."""

    def __init__(self, matchers: dict[str, _Matcher], full_paths: dict[str, str]) -> None:
        self._matchers = matchers
        self._full_paths = full_paths
        self._met: set[str] = set()

    @classmethod
    def parse(cls, patterns: Sequence[str]) -> Selection:
        """Read patterns, whose default style is `pp:`; raise UsageError, naming the one that cannot be read."""
        matchers, full_paths = {}, {}
        for text in patterns:
            try:
                pattern = _Pattern.parse(text, "pp")
                if pattern.style == "pf":
                    full_paths[pattern.full_path] = text
                else:
                    matchers[text] = _Matcher.of([pattern])
            except _UNREADABLE as error:
                raise UsageError(
                    f"{text!r}: {error}", remedy="Name a path, or a pattern as in `borg help patterns`."
                ) from None
        return cls(matchers, full_paths)

    def __bool__(self) -> bool:
        return bool(self._matchers or self._full_paths)

    def matches(self, path: str) -> bool:
        """Tell whether a path is selected; all are where no pattern was given."""
        if not self:
            return True
        path = path.lstrip("/")
        if path in self._full_paths:
            self._met.add(self._full_paths[path])
            return True
        framed = f"/{path}/"
        for text, matcher in self._matchers.items():
            if matcher.matches(path, framed):
                self._met.add(text)
                return True
        return False

    def unmet(self) -> list[str]:
        """Return the patterns that no path was selected by until now."""
        return [text for text in (*self._matchers, *self._full_paths.values()) if text not in self._met]


def _command(text: str) -> tuple[str, str]:
    """Return a line's command and its value; raise ValueError if it has none of either, or names a root."""
    command, value = text[0], text[1:].lstrip()
    if command in "Rr":
        raise ValueError("the places where a group begins are its `paths`, not patterns")
    if command not in {*_COMMANDS, "P", "p"}:
        raise ValueError("does not begin with +, -, ! or P")
    if not value:
        raise ValueError(f"says nothing behind {command}")
    return command, value


def _style(name: str) -> str:
    if name not in _STYLES:
        raise ValueError(f"{name}: no such style; there are {', '.join(_STYLES)}")
    return name


def _ends_in_slash(pattern: _Pattern) -> tuple[str, bool]:
    """Return a glob's normal form, and whether it means only what is in the directory."""
    normal = os.path.normpath(pattern.text)
    return (normal.rstrip("/"), True) if pattern.text.endswith("/") else (normal, False)


def _needle(pattern: _Pattern) -> str:
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


def _expression(pattern: _Pattern) -> str:
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
