"""Which files a group takes and leaves: borg's patterns, with the verdicts that borg 1.4 gives (`borg help patterns`).

A pattern sees a path without the leading slash. In all styles but `re:` and `pf:` a match on a directory is a match on
all that is in it. Full paths (`pf:`) are looked up before everything else, and the last line of a path counts; else the
first line that matches does. Names are `str` as `os.fsdecode` makes them: bytes that are no UTF-8 match like others.

This is asked once for each of millions of files. So lines that follow each other and say the same are one matcher.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from blockferry.errors import UsageError
from blockferry.groups.matching import UNREADABLE, Matcher, Pattern, style_named


class Verdict(enum.Enum):
    """What becomes of a file or directory."""

    INCLUDE = "include"
    EXCLUDE = "exclude"
    """Left out; what is in the directory is asked about nevertheless."""
    EXCLUDE_NO_RECURSE = "exclude, and do not recurse"


_COMMANDS = {"+": Verdict.INCLUDE, "-": Verdict.EXCLUDE, "!": Verdict.EXCLUDE_NO_RECURSE}
_REMEDY = "A pattern is `+ PATTERN`, `- PATTERN` or `! PATTERN`; see `borg help patterns`."


class Rules:
    """Include and exclude patterns, in order. False if there are none: then all is included, and nobody need ask."""

    def __init__(self, full_paths: dict[str, Verdict], runs: Sequence[tuple[Matcher, Verdict]]) -> None:
        self._full_paths = full_paths
        self._runs = tuple(runs)

    @classmethod
    def parse(cls, lines: Sequence[str]) -> Rules:
        """Read the lines of a file of patterns, as of `borg create --patterns-from`: the default style is `sh:`.

        Empty lines and those that begin with # are skipped; `P STYLE` changes the default for the lines that follow.
        Raise UsageError, naming the line, if one cannot be read or names a root (`R`).
        """
        full_paths: dict[str, Verdict] = {}
        runs: list[tuple[list[Pattern], Verdict]] = []
        default = "sh"
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                command, value = _command(text)
                if command in "Pp":
                    default = style_named(value)
                    continue
                pattern, verdict = Pattern.parse(value, default), _COMMANDS[command]
                if pattern.style == "pf":
                    full_paths[pattern.full_path] = verdict
                    continue
                Matcher.of([pattern])
            except UNREADABLE as error:
                raise UsageError(f"pattern {number}, {line!r}: {error}", remedy=_REMEDY) from None
            if not runs or runs[-1][1] is not verdict:
                runs.append(([], verdict))
            runs[-1][0].append(pattern)
        return cls(full_paths, [(Matcher.of(patterns), verdict) for patterns, verdict in runs])

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

    def __init__(self, matchers: dict[str, Matcher], full_paths: dict[str, str]) -> None:
        self._matchers = matchers
        self._full_paths = full_paths
        self._met: set[str] = set()

    @classmethod
    def parse(cls, patterns: Sequence[str]) -> Selection:
        """Read patterns, whose default style is `pp:`; raise UsageError, naming the one that cannot be read."""
        matchers, full_paths = {}, {}
        for text in patterns:
            try:
                pattern = Pattern.parse(text, "pp")
                if pattern.style == "pf":
                    full_paths[pattern.full_path] = text
                else:
                    matchers[text] = Matcher.of([pattern])
            except UNREADABLE as error:
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
        found = path in self._full_paths
        if found:
            self._met.add(self._full_paths[path])
        framed = f"/{path}/"
        for text, matcher in self._matchers.items():
            # One that has met nothing is asked about what another has selected, too: it may mean some of that.
            if not (found and text in self._met) and matcher.matches(path, framed):
                self._met.add(text)
                found = True
        return found

    def unmet(self) -> list[str]:
        """Return the patterns that have matched no path until now."""
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
