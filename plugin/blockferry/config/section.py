"""One mapping of a configuration, asked key by key: every mistake names its place, its key and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from blockferry.errors import UsageError

Where = Callable[[str], str]
"""What to call the place of a key, as in `/etc/blockferry/config.yaml:12: groups.small.paths`; "" is the mapping."""


class ConfigurationError(UsageError):
    """A mistake in a configuration: the message has its place, `key` is the key in its mapping, "" for the mapping."""

    def __init__(self, message: str, *, remedy: str, key: str) -> None:
        super().__init__(message, remedy=remedy)
        self.key = key
        self.others: list[ConfigurationError] = []
        """The other mistakes in the same file, in the order in which they were found."""


def raise_all(mistakes: Sequence[ConfigurationError]) -> None:
    """Raise the first of some mistakes, with the others; do nothing if there are none."""
    if mistakes:
        mistakes[0].others = list(mistakes[1:])
        raise mistakes[0]


QUOTE = "Write text on one line; in quotes if it is a number."

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Section:
    """A mapping, read by the types that its values have to have. A value of null is as good as none."""

    def __init__(self, mapping: Mapping[Any, Any], where: Where | str, known: Collection[str]) -> None:
        """Take a mapping and the keys that it may have; raise UsageError, with the nearest one, for any other key."""
        self._mapping = mapping
        self._where = where
        for key in mapping:
            if key not in known:
                raise ConfigurationError(
                    f"{self._place(str(key))}: no such key", remedy=nearest(str(key), known), key=key
                )

    def wrong(self, key: str, what: str, remedy: str) -> ConfigurationError:
        """Return the error that says what is wrong with the value of a key."""
        return ConfigurationError(f"{self._place(key)}: {what}", remedy=remedy, key=key)

    def text(self, key: str) -> str:
        """Return a string on one line, "" if there is none."""
        value = self._mapping.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or _CONTROL.search(value):
            raise self.wrong(key, f"{value!r} is no plain text", QUOTE)
        return str(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings, empty if there is none."""
        values = self._mapping.get(key)
        if values is None:
            return ()
        if not isinstance(values, list) or not all(isinstance(each, str) and "\0" not in each for each in values):
            raise self.wrong(key, f"{values!r} is no list of texts", f"Write {key}: [..., ...]; quote what is special.")
        return tuple(map(str, values))

    def flag(self, key: str) -> bool:
        """Return true or false, False if it is not said."""
        value = self._mapping.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, f"{value!r} is neither true nor false", f"Write {key}: true.")
        return bool(value)

    def count(self, key: str) -> int | None:
        """Return a number from 0 on, None if there is none."""
        value = self._mapping.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, f"{value!r} is no whole number from 0 on", f"Write {key}: 7, for example.")
        return int(value)

    def mapping(self, key: str) -> Mapping[Any, Any]:
        """Return the mapping below a key, empty if there is none."""
        value = self._mapping.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, f"{value!r} is no mapping", f"Write {key}: and below it, indented, KEY: VALUE.")
        return value

    def _place(self, key: str) -> str:
        if callable(self._where):
            return self._where(key)
        return f"{self._where}: {key}" if key else self._where


def nearest(name: str, known: Collection[str]) -> str:
    """Return what to do about a name that is not known: the one that was meant, or all."""
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"There are: {', '.join(sorted(known))}." if known else "There are none."
