"""A volume as a picture: so many cells, each an equal share of it, with what lies in each.

What is shown is a list of `Shade`s, disjoint, in the order in which they count: a cell shows the first of which it has
any byte, however few, so that one changed block of a terabyte can be seen. How much of the cell that is, is its level.
Cells are counted by a search a shade, over all edges at once: the size of the volume does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blockferry.blockmap import BlockMap, Kind
from blockferry.chain import Chain
from blockferry.extents import ExtentSet, Offsets

MOST_OTHERS = 6
"""Snapshots or hosts beyond that are shown as one: there are not more colours that can be told apart."""


@dataclasses.dataclass(frozen=True)
class Shade:
    """Some bytes of a volume: of what kind (what colour and sign they have), and what to call them."""

    kind: str
    label: str
    extents: ExtentSet


@dataclasses.dataclass(frozen=True)
class Cells:
    """What each cell shows: `shades[i]` is the number of its shade, -1 for none; `levels[i]` from 1 on, 0 for none."""

    shades: npt.NDArray[np.int64]
    levels: npt.NDArray[np.int64]


def edges(size: int, count: int) -> Offsets:
    """Return the `count + 1` places at which the cells of a volume of `size` bytes begin and end."""
    numbers = np.arange(count + 1, dtype=np.int64)
    whole, rest = divmod(size, count)
    return numbers * whole + numbers * rest // count  # as size * number // count, which may not fit


def bytes_in_cells(extents: ExtentSet, places: Offsets) -> Offsets:
    """Return how many bytes of a set lie between each two of the places, which are in order."""
    return np.diff(_bytes_below(extents, places))


def cells(size: int, shades: Sequence[Shade], count: int, levels: int) -> Cells:
    """Return what each of `count` cells shows, or of as many as there are bytes; the highest level is a full cell."""
    places = edges(size, max(1, min(count, size)))
    lengths = np.maximum(np.diff(places), 1)
    shown = np.full(lengths.size, -1, np.int64)
    filled = np.zeros(lengths.size, np.int64)
    for number, shade in reversed(list(enumerate(shades))):
        inside = bytes_in_cells(shade.extents, places)
        some = inside > 0
        shown[some] = number
        # Rounded up: something is there.
        filled[some] = np.ceil(inside[some] / lengths[some] * levels).astype(np.int64)
    return Cells(shown, filled)


def shades_of_chain(chain: Chain) -> list[Shade]:
    """Return which snapshot of a chain has which blocks, the newest first; of a set, which host's share."""
    newest, *below = chain.states
    if not newest.record.part:
        return shades_of_map(newest.block_map)
    left = newest.block_map.extents(Kind.SAME)
    others = []
    for link in below:
        of_set = "the log of set" if link.record.closing else "snapshot"
        others.append((f"in {of_set} {link.snapshot.id}", left.intersection(link.stored)))
        left = left.difference(link.stored)
    label = "overwritten meanwhile: in the log" if newest.record.closing else "stored as this part"
    own = Shade("changed", label, newest.block_map.extents(Kind.DATA))
    return [own, *_numbered([*others, *_shares(chain, left)])]


def shades_of_map(block_map: BlockMap) -> list[Shade]:
    """Return what was read for a whole snapshot, and what was taken over."""
    same = block_map.extents(Kind.SAME)
    read = block_map.extents(Kind.DATA)
    if not same:
        return [Shade("used", "in use: read", read)]
    return [Shade("changed", "changed: read", read), Shade("used", "in use: as before", same)]


def _shares(chain: Chain, left: ExtentSet) -> list[tuple[str, ExtentSet]]:
    """Return what each host read of a shared volume, the largest share first."""
    by_host: dict[str, ExtentSet] = {}
    for link in chain.shares:
        host = link.record.host
        by_host[host] = by_host.get(host, ExtentSet.empty()).union(link.stored.intersection(left))
    hosts = sorted(by_host, key=lambda host: (-by_host[host].total, host))
    return [(f"read by {host}", by_host[host]) for host in hosts]


def _numbered(others: Sequence[tuple[str, ExtentSet]]) -> list[Shade]:
    """Return shades of which each has a colour of its own, the last of them all that there is no colour left for."""
    if len(others) > MOST_OTHERS:
        rest = ExtentSet.empty().union(*(extents for _label, extents in others[MOST_OTHERS - 1 :]))
        others = [*others[: MOST_OTHERS - 1], (f"in {len(others) - MOST_OTHERS + 1} others", rest)]
    return [Shade(f"other{number}", label, extents) for number, (label, extents) in enumerate(others, 1)]


def _bytes_below(extents: ExtentSet, places: Offsets) -> Offsets:
    """Return how many bytes of a set lie below each place."""
    lengths = extents.ends - extents.starts
    whole = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.searchsorted(extents.starts, places, side="right") - 1
    begun = index >= 0
    below = np.zeros(places.size, np.int64)
    inside = np.minimum(places[begun] - extents.starts[index[begun]], lengths[index[begun]])
    below[begun] = whole[index[begun]] + inside
    return below
