"""A configuration file in YAML: what it says, and on which line it says it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockferry.config.section import Where
from blockferry.errors import UsageError

_REMEDY = "Have a look at its indentation, brackets and quotes."


class YamlFile:
    """A file. What is wrong with it is a UsageError with its line; lines are looked for when they are asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    @functools.cached_property
    def mapping(self) -> Mapping[Any, Any]:
        """What the file says; empty if there is nothing in it."""
        mapping = self._parsed("load")
        if mapping is not None and not isinstance(mapping, Mapping):
            raise UsageError(f"{self.path}:1: is no mapping", remedy="Write KEY: VALUE, as in groups: and volumes:.")
        return mapping or {}

    @functools.cached_property
    def shape(self) -> frozenset[str]:
        """The keys at its top, without so much as looking at what tags and includes mean."""
        return frozenset(str(key.value) for key, _value in _pairs(self._tree))

    def place(self, *keys: str) -> str:
        """Return what names the file, a key, down from the top, and its line; the next one above, if it has none."""
        line = self.line(*keys) or (1 if not keys or self.line(keys[0]) else None)
        where = f"{self.path}:{line}:" if line else f"{self.path}:"
        return f"{where} {'.'.join(keys)}".removesuffix(" ")

    def below(self, *keys: str) -> Where:
        """Return what `place` returns for a key of the mapping that lies below `keys`; "" is the mapping itself."""
        return lambda key: self.place(*keys, *([key] if key else []))

    def line(self, *keys: str) -> int | None:
        """Return the line of a key, counted from 1, or of the nearest above it that is in this very file."""
        node, found = self._tree, None
        for key in keys:
            pair = next((pair for pair in _pairs(node) if str(pair[0].value) == key), None)
            if pair is None:
                break
            found, node = pair[0].start_mark.line + 1, pair[1]
        return found

    @functools.cached_property
    def _tree(self) -> Any:
        return self._parsed("compose")

    def _parsed(self, method: str) -> Any:
        """Return what ruamel's `load` or `compose` makes of the file."""
        from ruamel.yaml import YAML  # noqa: PLC0415  # takes a while, and few commands need it
        from ruamel.yaml.error import MarkedYAMLError, YAMLError  # noqa: PLC0415

        try:
            return getattr(YAML(typ="rt", pure=True), method)(Path(self.path).read_bytes())
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f"{mark.line + 1}:" if mark else ""
            raise UsageError(f"{self.path}:{line} {error.problem or error.context}", remedy=_REMEDY) from None
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be read: {error.strerror}", remedy="Name another with --config."
            ) from None
        except (YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.path}: is no YAML: {str(error).splitlines()[0]}", remedy=_REMEDY) from None


def _pairs(node: Any) -> Sequence[tuple[Any, Any]]:
    """Return the keys and values of a node, none if it is no mapping."""
    from ruamel.yaml.nodes import MappingNode  # noqa: PLC0415  # see above

    return node.value if isinstance(node, MappingNode) else ()
