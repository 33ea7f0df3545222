"""A volume as an SVG drawing that needs nothing else, small however large the volume is: one path a shade and level.

Names come out of a repository, and are untrusted: what XML cannot carry is replaced, the rest escaped.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from blockferry.picture import Cells, Shade, cells
from blockferry.snapshot import Record

_COLUMNS = 128
_MOST_CELLS = 16384
_LEAST = 4096
"""Bytes of a cell of a small volume."""
_CELL = 6
"""Pixels of a cell."""
_MARGIN = 16
_LINE = 20
_LEVELS = 4
_MOST_CHARACTERS = 96

_STYLE = """\
text{font:14px system-ui,sans-serif;fill:#1a1a1a}
.title{font-weight:600;font-size:16px}
.ground{fill:#ffffff}
.unused{fill:#e6e6e6}
path{fill:none;stroke-width:1}
.changed{stroke:#d1495b}.used,.other1{stroke:#3f6ea8}.group,.other2{stroke:#2a8c4a}
.other3{stroke:#c2a500}.other4{stroke:#2aa7c9}.other5{stroke:#a03c8c}.other6{stroke:#7f7f7f}
.l1{stroke-opacity:.4}.l2{stroke-opacity:.6}.l3{stroke-opacity:.8}
@media (prefers-color-scheme:dark){text{fill:#e6e6e6}.ground{fill:#161616}.unused{fill:#303030}
.changed{stroke:#ff6b7d}.used,.other1{stroke:#6ea4e6}.group,.other2{stroke:#4fc878}.other3{stroke:#e8cf3a}
.other5{stroke:#d06abf}.other6{stroke:#a8a8a8}}
"""

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def draw(record: Record, shades: Sequence[Shade], file: Path) -> None:
    """Draw the blocks of a snapshot into a file, whole or not at all."""
    of = "the packed image of the group " if record.group else ""
    how = f"{record.tier.value} blocks, {record.stability.value}, {decimal(record.size)}"
    drawn = svg(
        record.size, shades, f"{of}{record.volume}", f"snapshot {record.snapshot}, {record.created[:19]}: {how}"
    )
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(drawn, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def svg(size: int, shades: Sequence[Shade], title: str, subtitle: str) -> str:
    """Return the drawing of a volume of `size` bytes."""
    shown = cells(size, shades, min(_MOST_CELLS, max(1, size // _LEAST)), _LEVELS)
    count = shown.shades.size
    top = _MARGIN + 3 * _LINE
    below = top + -(-count // _COLUMNS) * _CELL + _LINE
    width, height = 2 * _MARGIN + _COLUMNS * _CELL, below + (len(shades) + 2) * _LINE + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="ground" width="{width}" height="{height}"/>',
            f'<text class="title" x="{_MARGIN}" y="{_MARGIN + _LINE}">{_text(title)}</text>',
            f'<text x="{_MARGIN}" y="{_MARGIN + 2 * _LINE}">{_text(subtitle)}</text>',
            f'<g transform="translate({_MARGIN} {top}) scale({_CELL})" shape-rendering="crispEdges">',
            *_ground(count),
            *_paths(shown, shades),
            "</g>",
            *_legend(size, shades, below, -(-size // count)),
            "</svg>\n",
        ]
    )


def _ground(count: int) -> Iterator[str]:
    """Yield what lies below all cells: full rows, and the beginning of one."""
    rows, rest = divmod(count, _COLUMNS)
    if rows:
        yield f'<rect class="unused" width="{_COLUMNS}" height="{rows}"/>'
    if rest:
        yield f'<rect class="unused" y="{rows}" width="{rest}" height="1"/>'


def _paths(shown: Cells, shades: Sequence[Shade]) -> Iterator[str]:
    """Yield a path a shade and level: of each run of cells in a row that show it, a line."""
    places = np.arange(shown.shades.size)
    for number, shade in enumerate(shades):
        for level in range(1, _LEVELS + 1):
            mine = (shown.shades == number) & (shown.levels == level)
            begins = places[mine & ~(np.append(False, mine[:-1]) & (places % _COLUMNS > 0))]
            if begins.size:
                ends = places[mine & ~(np.append(mine[1:], False) & (places % _COLUMNS < _COLUMNS - 1))]
                rows, columns = np.divmod(begins, _COLUMNS)
                runs = zip(columns.tolist(), rows.tolist(), (ends - begins + 1).tolist(), strict=True)
                drawn = "".join(f"M{column} {row}.5h{length}" for column, row, length in runs)
                yield f'<path class="{shade.kind} l{level}" d="{drawn}"/>'


def _legend(size: int, shades: Sequence[Shade], top: int, cell: int) -> Iterator[str]:
    """Yield what each colour means, and how many bytes that are."""
    known = [(shade.kind, shade.label, shade.extents.total) for shade in shades]
    known.append(("", "not in use", size - sum(total for _kind, _label, total in known)))
    for number, (kind, label, total) in enumerate(known):
        y = top + number * _LINE
        if kind:
            yield f'<path class="{kind}" style="stroke-width:12" d="M{_MARGIN} {y + 6}h12"/>'
        else:
            yield f'<rect class="unused" x="{_MARGIN}" y="{y}" width="12" height="12"/>'
        words = f"{label}: {decimal(total)} ({100 * total / size:.1f} %)"
        yield f'<text x="{_MARGIN + 20}" y="{y + 11}">{_text(words)}</text>'
    words = f"One cell is {decimal(cell)}, and the fuller its colour, the more of it is meant."
    yield f'<text x="{_MARGIN}" y="{top + len(known) * _LINE + 11}">{words}</text>'


def _text(words: str) -> str:
    """Return words as XML has them, cut to what a line holds."""
    sound = _NO_XML.sub("\ufffd", words)
    return html.escape(sound if len(sound) <= _MOST_CHARACTERS else f"{sound[: _MOST_CHARACTERS - 1]}…")
