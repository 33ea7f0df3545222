"""What a group's table says of files, for people and for programs; and which of them a user means."""

from __future__ import annotations

import base64
import datetime
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blockferry.errors import UsageError
from blockferry.groups.names import shown
from blockferry.groups.patterns import Selection
from blockferry.groups.stored import StoredGroup
from blockferry.groups.table import CHANGED, GONE, UNREADABLE, FileTable, Rows


def select(table: FileTable, patterns: Sequence[str]) -> Rows:
    """Return the rows that patterns select, all if there is none; UsageError if one of them selects nothing."""
    if not patterns:
        return np.arange(len(table))
    selection = Selection.parse(patterns)
    rows = [row for row, path in enumerate(table.paths()) if row and selection.matches(os.fsdecode(path))]
    if unmet := selection.unmet():
        raise UsageError(
            f"no file in the snapshot matches {unmet[0]!r}",
            remedy="Paths are relative to the group's root, as `blockferry files SNAPSHOT --list` prints them.",
        )
    return np.array(rows, np.int64)


def lines(group: StoredGroup, rows: Rows) -> Iterator[str]:
    """Yield a line for each row: mode, owner and group, size, time of change and path; where a link leads."""
    for entry in entries(group, rows):
        try:
            when = datetime.datetime.fromtimestamp(entry["mtime_ns"] // 10**9, datetime.UTC).astimezone()
            time = when.strftime("%Y-%m-%d %H:%M:%S")
        except (ValueError, OverflowError, OSError):
            time = f"{entry['mtime_ns'] // 10**9} s"  # of no year that a calendar here has
        line = f"{entry['mode']} {entry['uid']:>6} {entry['gid']:>6} {entry['size']:>12} {time} {entry['shown']}"
        if "target" in entry:
            line += f" -> {entry['target']}"
        if "hard_link_of" in entry:
            line += f" link to {entry['hard_link_of']}"
        remarks = [flag for flag in ("changed", "unreadable") if entry[flag]]
        yield f"{line}  ({', '.join(remarks)})" if remarks else line


def objects(group: StoredGroup, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each row. A path that is no UTF-8 also comes as bytes, in `path_b64`."""
    for entry in entries(group, rows):
        del entry["shown"]
        yield entry


def entries(group: StoredGroup, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield what is known of each row, which are in order."""
    table = group.table
    wanted = np.zeros(len(table), np.bool_)
    wanted[rows] = True
    wanted &= ~table.gone
    columns = table.entries[["mode", "uid", "gid", "flags", "link", "size", "mtime"]]
    links = table.entries["link"]
    missed = table.entries["flags"][np.where(links >= 0, links, np.arange(len(table)))] & (UNREADABLE | GONE) != 0
    for row, (path, is_wanted) in enumerate(zip(table.paths(), wanted.tolist(), strict=True)):
        if not is_wanted:
            continue
        mode, uid, gid, flags, link, size, mtime = columns[row].item()
        entry = {
            "path": path.decode("utf-8", "replace") or ".",
            "shown": shown(path) or ".",
            "mode": stat.filemode(mode),
            "uid": uid,
            "gid": gid,
            "size": size,
            "mtime_ns": mtime,
            "changed": bool(flags & CHANGED),
            "unreadable": bool(missed[row]),
        }
        if entry["path"].encode() != (path or b"."):
            entry["path_b64"] = base64.b64encode(path).decode()
        if stat.S_ISLNK(mode) and not entry["unreadable"]:
            entry["target"] = shown(table.target(row))
        if link >= 0:
            entry["hard_link_of"] = shown(table.path(link))
        yield entry
