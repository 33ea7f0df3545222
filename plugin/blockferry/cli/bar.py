"""A volume as some lines of characters: each is an equal share of it. Colours help, and are not needed to tell them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from blockferry.cli.output import Bar
from blockferry.picture import Shade, cells

_UNWATCHED_WIDTH = 80
_ROWS = 8
_LEAST_CELLS = 8
_MARGIN = 12
"""What the place takes at which a row begins: the longest is `1,000.0 kB`."""
_LEVELS = 2


@dataclasses.dataclass(frozen=True)
class Marks:
    """The characters for nothing, and by kind for some and for most of a cell."""

    nothing: str
    of: Mapping[str, str]


PLAIN = Marks(".", {"used": "-=", "group": "oO", "changed": "xX"})
BLOCKS = Marks("·", {"used": "░▒", "group": "=≡", "changed": "▓█"})
"""All of them are in the fonts of the kernel's console too."""

_STYLES = {"": "bright_black", "used": "blue", "group": "green", "changed": "bold red"}


def print_bar(bar: Bar) -> None:
    """Print a volume on stdout, with a legend: as wide as the terminal, in 80 plain columns where there is none."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNWATCHED_WIDTH)
    fancy = console.is_terminal and not console.legacy_windows and console.encoding.startswith("utf")
    for line in lines(bar.size, bar.shades, console.width, BLOCKS if fancy else PLAIN):
        console.print(line, no_wrap=True, overflow="crop", soft_wrap=not console.is_terminal)


def lines(size: int, shades: Sequence[Shade], width: int, marks: Marks) -> list[Text]:
    """Return the lines: rows of cells, each with the place at which it begins, and what the characters mean."""
    columns = max(_LEAST_CELLS, width - _MARGIN)
    shown = cells(size, shades, columns * _ROWS, _LEVELS)
    count = shown.shades.size
    rows = []
    for first in range(0, count, columns):
        row = Text(f"{decimal(size * first // count):>{_MARGIN - 2}}  ")
        numbers, levels = shown.shades[first : first + columns], shown.levels[first : first + columns]
        for (number, level), alike in itertools.groupby(zip(numbers.tolist(), levels.tolist(), strict=True)):
            kind = shades[number].kind if number >= 0 else ""
            sign = marks.of[kind][level - 1] if kind else marks.nothing
            row.append(sign * len(list(alike)), _STYLES[kind])
        rows.append(row)
    return [*rows, Text(), *_legend(size, shades, marks, -(-size // count))]


def _legend(size: int, shades: Sequence[Shade], marks: Marks, cell: int) -> list[Text]:
    """Return what each character means, and how many bytes that are."""
    known = [(shade.kind, marks.of[shade.kind], shade.label, shade.extents.total) for shade in shades]
    unused = size - sum(total for _kind, _marks, _label, total in known)
    known.append(("", f"{marks.nothing} ", "not in use", unused))
    wide, long = max(len(label) for _k, _m, label, _t in known), max(len(decimal(total)) for *_rest, total in known)
    return [
        *(
            Text.assemble(
                (sign, _STYLES[kind]), f"  {label:<{wide}}  {decimal(total):>{long}}  {100 * total / size:5.1f} %"
            )
            for kind, sign, label, total in known
        ),
        Text(f"    one cell is {decimal(cell)}; the second sign: more than half of it"),
    ]
