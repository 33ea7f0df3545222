"""Walking a group: what every entry is, and where its content lies, as columns; several processes beside each other.

A process takes a few directories at a time and returns their entries; which directories they hold is added to what is
still to be walked. Entries of a directory are looked at in the order of their inodes, which is that of the disk. Files
that are as they were in an earlier snapshot, by inode, size and time of change, are looked at no further.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import itertools
import logging
import multiprocessing
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from blockferry import kernel
from blockferry.groups.content import PIECE, Contents, compare
from blockferry.groups.table import ENTRY, GONE, UNREADABLE, FileTable, pack_attributes

if TYPE_CHECKING:
    from blockferry.groups.scope import Scope

log = logging.getLogger(__name__)

_PROCESSES = min(4, os.cpu_count() or 1)
_ENTRIES_AT_ONCE = 8192
_DIRECTORIES_AT_ONCE = 32
_RECENT, _COARSE = 50_000_000, 2_050_000_000
"""ns in which a file may change again and keep its time: more than a tick of any kernel's coarse clock; and where
times are whole seconds (ext4 with small inodes, ext3), or every second one (FAT)."""

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass
class Walked:
    """The entries found, by row. `pieces` are not trimmed or placed yet: what the filesystem says, in file order."""

    entries: npt.NDArray[np.void]
    """ENTRY; of several hard links of a file the first is known, the others name it in `link`."""
    names: bytes
    name_ends: Rows
    texts: list[bytes]
    pieces: npt.NDArray[np.void]
    """PIECE, of those files that are not as in the base."""
    piece_ends: Rows
    known: Rows
    """By row: the row in the base of a file that is as it was there, else -1."""
    problems: list[tuple[bytes, str]]
    """Paths that could not be read, and why."""


@dataclasses.dataclass(frozen=True)
class Known:
    """The files of an earlier snapshot, to be known again: sorted by inode."""

    inodes: npt.NDArray[np.uint64]
    rows: Rows
    table: FileTable
    began: int
    """ns: a file that changed a tick of the clock before this, or later, may have changed again since it was read."""

    @classmethod
    def of(cls, table: FileTable, began: int) -> Known:
        """Return what can be known again of a snapshot whose walk began at that time, in ns."""
        entries = table.entries
        usable = (entries["flags"] == 0) & (entries["link"] < 0)
        rows = np.flatnonzero(usable).astype(np.int64)
        order = np.argsort(entries["inode"][rows], kind="stable")
        return cls(entries["inode"][rows][order], rows[order], table, began)

    def find(self, entries: npt.NDArray[np.void]) -> Rows:
        """Return for each entry its row in the snapshot, -1 for what is new or may have changed."""
        if not self.inodes.size:
            return np.full(entries.size, -1, np.int64)
        place = np.searchsorted(self.inodes, entries["inode"]).clip(0, self.inodes.size - 1)
        rows = self.rows[place]
        then = self.table.entries[rows]
        same = (self.inodes[place] == entries["inode"]) & (entries["ctime"] + _tick(entries["ctime"]) < self.began)
        for column in ("mode", "size", "ctime", "mtime"):
            same &= then[column] == entries[column]
        return np.where(same, rows, -1)


class Walker:
    """Walks a group's directories, and looks at files again. A context: it keeps processes."""

    def __init__(self, scope: Scope, contents: Contents, known: Known | None) -> None:
        self._scanner = _Scanner(scope, contents, known)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def walk(self, advance: Callable[[int], None] = lambda _count: None) -> Walked:
        """Return what there is; `advance` is called with how many entries were found since the last call."""
        joined = _Joined()
        todo = deque(joined.add(self._scanner.root()))
        # A small tree is walked before other processes have started.
        while todo and len(joined) < _ENTRIES_AT_ONCE:
            found = self._scanner.scan([todo.popleft()])
            todo.extend(joined.add(found))
            advance(found.entries.size)
        if todo:
            self._spread(todo, joined, advance)
        walked = joined.walked()
        kernel.give_back_memory()
        return walked

    def _spread(self, todo: deque[tuple[int, bytes]], joined: _Joined, advance: Callable[[int], None]) -> None:
        """Have processes walk what is left to do."""
        # By forking: what is known is shared, not copied.
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(_PROCESSES, context, _take, (self._scanner,))
        running: set[Future[_Fragment]] = set()
        while todo or running:
            while todo and len(running) < 2 * _PROCESSES:
                count = min(_DIRECTORIES_AT_ONCE, max(1, len(todo) // (2 * _PROCESSES)))
                running.add(self._pool.submit(_scan, [todo.popleft() for _ in range(count)]))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                found = each.result()
                todo.extend(joined.add(found))
                advance(found.entries.size)

    def settle(self, descriptor: int, size: int) -> None:
        """Wait until a write to an open file that is under way is over."""
        self._scanner.contents.pieces(descriptor, size, bytearray())

    def look_again(self, seen: Seen) -> Future[list[State]]:
        """Begin to find out of each file whether it is still what was seen of it."""
        if self._pool:
            return self._pool.submit(_look_again, seen)
        found: Future[list[State]] = Future()
        found.set_result(self._scanner.look_again(seen))
        return found


class State(enum.Enum):
    """What became of a file since it was seen."""

    SAME = enum.auto()
    WRITTEN = enum.auto()
    """It changed; what was read of it lies where it lay."""
    MOVED = enum.auto()
    """What was at its place may be of another file by now."""
    GONE = enum.auto()


class Seen(NamedTuple):
    """Regular files as they were seen, by column: to another process these are sent faster than objects."""

    paths: list[bytes]
    """Absolute."""
    inodes: list[int]
    sizes: list[int]
    ctimes: list[int]
    pieces: list[bytes]
    """Of each file, PIECE each."""


_scanner: _Scanner | None = None


def _take(scanner: _Scanner) -> None:
    """Keep, in a process of its own, what it is to work with."""
    global _scanner  # noqa: PLW0603  # how a pool's process is told something once
    _scanner = scanner


def _look_again(seen: Seen) -> list[State]:
    if _scanner is None:
        raise RuntimeError("this process was not told what to walk")
    return _scanner.look_again(seen)


def _scan(directories: list[tuple[int, bytes]]) -> _Fragment:
    if _scanner is None:
        raise RuntimeError("this process was not told what to walk")
    return _scanner.scan(directories)


@dataclasses.dataclass
class _Fragment:
    """The entries of some directories. Numbers of texts count within it."""

    entries: npt.NDArray[np.void]
    nlink: npt.NDArray[np.uint32]
    names: list[bytes]
    texts: list[bytes]
    pieces: npt.NDArray[np.void]
    counts: Rows
    known: Rows
    directories: list[tuple[int, bytes]]
    """Those to be walked next: row within the fragment, and path."""
    problems: list[tuple[bytes, str]]


class _Scanner:
    """Looks at directories. One a process."""

    def __init__(self, scope: Scope, contents: Contents, known: Known | None) -> None:
        self.scope = scope
        self.contents = contents
        self.known = known
        self.device = os.stat(scope.root).st_dev

    def root(self) -> _Fragment:
        """Return the group's root as an entry without a name."""
        root = self.scope.root
        facts = os.stat(root)
        into = _Collector(self)
        into.add(b"", facts, -1)
        into.directories.append((0, root))
        into.finish(root, None)
        return into.fragment()

    def scan(self, directories: Iterable[tuple[int, bytes]]) -> _Fragment:
        """Return the entries of directories, given with their rows."""
        into = _Collector(self)
        for row, path in directories:
            try:
                descriptor = os.open(path, _DIRECTORY if path != self.scope.root else _DIRECTORY & ~os.O_NOFOLLOW)
            except OSError as error:
                if error.errno not in GONE_ERRORS:
                    into.problems.append((path, _reason(error)))
                continue
            try:
                self._directory(into, row, path, descriptor)
            except OSError as error:
                into.problems.append((path, _reason(error)))
            finally:
                into.finish(path, descriptor)
                os.close(descriptor)
        return into.fragment()

    def look_again(self, seen: Seen) -> list[State]:
        """Return, for each file, whether it is still what was seen of it."""
        return [self._state(*each) for each in zip(*seen, strict=True)]

    def _state(self, path: bytes, inode: int, size: int, ctime: int, pieces: bytes) -> State:
        """Look at one file again."""
        try:
            descriptor = self.contents.open(path, None)
        except OSError as error:
            return State.GONE if error.errno in GONE_ERRORS else State.MOVED
        try:
            facts = os.fstat(descriptor)
            if facts.st_ino != inode or not stat.S_ISREG(facts.st_mode):
                return State.MOVED
            now = bytearray()
            self.contents.pieces(descriptor, facts.st_size, now, own=facts.st_dev == self.device)
            same_bytes, same_places = compare(pieces, bytes(now))
            if not same_places:
                return State.MOVED
            untouched = (facts.st_ctime_ns, facts.st_size) == (ctime, size)
            return State.SAME if untouched and same_bytes else State.WRITTEN
        except OSError:
            return State.MOVED
        finally:
            os.close(descriptor)

    def _directory(self, into: _Collector, row: int, path: bytes, descriptor: int) -> None:
        """Add the entries of one directory."""
        scope = self.scope
        wanted = scope.only.get(path)
        if wanted is None and scope.is_left_out(descriptor):
            return
        with os.scandir(descriptor) as listed:
            for some in _batches(listed, _ENTRIES_AT_ONCE):
                some.sort(key=os.DirEntry.inode)
                for entry in some:
                    name = os.fsencode(entry.name)
                    if wanted is not None and name not in wanted:
                        continue
                    self._entry(into, row, path + b"/" + name if path != b"/" else path + name, name, entry)
                into.finish(path, descriptor)

    def _entry(self, into: _Collector, row: int, path: bytes, name: bytes, entry: os.DirEntry[str]) -> None:
        """Add one entry, and what is below it to what is to be walked, if it is of the group."""
        include = recurse = True
        if self.scope.group.rules:
            include, recurse = self.scope.verdict(path)
            if not include and not (recurse and entry.is_dir(follow_symlinks=False)):
                return
        try:
            facts = entry.stat(follow_symlinks=False)
        except OSError as error:
            if error.errno not in GONE_ERRORS:
                into.problems.append((path, _reason(error)))
            return
        number = into.add(name, facts, row)
        if stat.S_ISDIR(facts.st_mode) and recurse and facts.st_dev == self.device:
            into.directories.append((number, path))


_MODE, _SIZE = (list(ENTRY.names or ()).index(column) for column in ("mode", "size"))
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
GONE_ERRORS = {errno.ENOENT, errno.ENOTDIR}
"""It was there a moment ago."""


class _Found(NamedTuple):
    """What a closer look at some entries found; -1: no text."""

    flags: list[int]
    counts: list[int]
    """How many pieces each has."""
    texts: list[int]
    attributes: list[int]


class _Collector:
    """Entries on their way into columns: tuples for a few thousand of them, arrays from then on."""

    def __init__(self, scanner: _Scanner) -> None:
        self.scanner = scanner
        self.rows: list[tuple[int, ...]] = []
        self.links: list[int] = []
        self.foreign: set[int] = set()
        """Of the rows, those of other filesystems."""
        self.names: list[bytes] = []
        self.entries: list[npt.NDArray[np.void]] = []
        self.nlink: list[npt.NDArray[np.uint32]] = []
        self.known: list[Rows] = []
        self.texts: dict[bytes, int] = {}
        self.pieces = bytearray()
        self.counts: list[int] = []
        self.directories: list[tuple[int, bytes]] = []
        self.problems: list[tuple[bytes, str]] = []

    def add(self, name: bytes, facts: os.stat_result, parent: int) -> int:
        """Add an entry; return its number in the fragment."""
        self.rows.append(
            (
                parent,
                facts.st_mode,
                facts.st_uid,
                facts.st_gid,
                0,
                -1,
                -1,
                -1,
                facts.st_size,
                facts.st_mtime_ns,
                facts.st_ctime_ns,
                facts.st_ino,
                facts.st_rdev,
            )
        )
        # Another filesystem's file, mounted over one of these, may have the number of any.
        own = facts.st_dev == self.scanner.device
        self.links.append(facts.st_nlink if own else 1)
        if not own:
            self.foreign.add(len(self.rows) - 1)
        self.names.append(name)
        return len(self.names) - 1

    def finish(self, directory: bytes, descriptor: int | None) -> None:
        """Look closer at the entries, all of one directory, that were added since the last call."""
        if not self.rows:
            return
        entries = np.array(self.rows, ENTRY)
        # What is no file has a size of its own that says nothing of content.
        entries["size"][entries["mode"] & 0o170000 != stat.S_IFREG] = 0
        known = self.scanner.known.find(entries) if self.scanner.known else np.full(entries.size, -1, np.int64)
        first = len(self.names) - entries.size
        found = _Found(*([filler] * entries.size for filler in (0, 0, -1, -1)))
        for number in np.flatnonzero(known < 0).tolist():
            name = self.names[first + number]
            path = directory + b"/" + name if name else directory
            try:
                self._look(self.rows[number], number, path, name, descriptor, found)
            except OSError as error:
                gone = error.errno in GONE_ERRORS
                found.flags[number] = GONE if gone else UNREADABLE
                if not gone:
                    self.problems.append((path, _reason(error)))
        entries["flags"], entries["text"], entries["attributes"] = found.flags, found.texts, found.attributes
        self._recall(entries, known)
        self.counts += found.counts
        self.entries.append(entries)
        self.nlink.append(np.array(self.links, np.uint32))
        self.known.append(known)
        self.rows, self.links, self.foreign = [], [], set()

    def _look(
        self, row: tuple[int, ...], number: int, path: bytes, name: bytes, descriptor: int | None, found: _Found
    ) -> None:
        """Find out an entry's attributes, target and content. What changes meanwhile is seen at the second look."""
        kind = row[_MODE] & 0o170000
        if kind == stat.S_IFREG and row[_SIZE]:
            opened = self.scanner.contents.open(name if descriptor is not None else path, descriptor)
            try:
                own = number not in self.foreign
                found.counts[number] = self.scanner.contents.pieces(opened, row[_SIZE], self.pieces, own=own)
                attributes = attributes_of(opened)
            finally:
                os.close(opened)
        else:
            if kind == stat.S_IFLNK:
                target = os.readlink(name if descriptor is not None else path, dir_fd=descriptor)
                found.texts[number] = self._text(target)
            attributes = attributes_of(path)
        if attributes:
            found.attributes[number] = self._text(pack_attributes(attributes))

    def _recall(self, entries: npt.NDArray[np.void], known: Rows) -> None:
        """Take the targets and attributes of entries that are as they were from the earlier snapshot."""
        if self.scanner.known is None:
            return
        table = self.scanner.known.table
        for column in ("text", "attributes"):
            then = np.where(known >= 0, table.entries[column][known], -1)
            for number in np.flatnonzero(then >= 0).tolist():
                entries[column][number] = self._text(table.texts[int(then[number])])

    def _text(self, text: bytes) -> int:
        """Return the number of a text."""
        return self.texts.setdefault(text, len(self.texts))

    def fragment(self) -> _Fragment:
        """Return everything that was added."""
        return _Fragment(
            np.concatenate([np.empty(0, ENTRY), *self.entries]),
            np.concatenate([np.empty(0, np.uint32), *self.nlink]),
            self.names,
            list(self.texts),
            np.frombuffer(bytes(self.pieces), PIECE),
            np.array(self.counts, np.int64),
            np.concatenate([np.empty(0, np.int64), *self.known]),
            self.directories,
            self.problems,
        )


class _Joined:
    """Fragments on their way into one."""

    def __init__(self) -> None:
        self.fragments: list[list[npt.NDArray[Any]]] = []
        self.names = bytearray()
        self.lengths: list[Rows] = []
        self.texts: dict[bytes, int] = {}
        self.problems: list[tuple[bytes, str]] = []
        self.rows = 0

    def __len__(self) -> int:
        return self.rows

    def add(self, found: _Fragment) -> list[tuple[int, bytes]]:
        """Take a fragment in; return the directories that are to be walked next, by row and path."""
        numbers = np.array([self.texts.setdefault(text, len(self.texts)) for text in found.texts], np.int64)
        for column in ("text", "attributes"):
            has = found.entries[column] >= 0
            found.entries[column][has] = numbers[found.entries[column][has]]
        self.names += b"".join(found.names)
        self.lengths.append(np.fromiter(map(len, found.names), np.int64, len(found.names)))
        self.fragments.append([found.entries, found.nlink, found.known, found.counts, found.pieces])
        self.problems += found.problems
        first, self.rows = self.rows, self.rows + found.entries.size
        return [(first + row, path) for row, path in found.directories]

    def walked(self) -> Walked:
        """Return all of it, hard links found."""
        entries, nlink, known, counts, pieces = (_take_all(self.fragments, column) for column in range(5))
        self.fragments = []
        _link(entries, nlink)
        return Walked(
            entries,
            bytes(self.names),
            np.cumsum(np.concatenate(self.lengths)),
            list(self.texts),
            pieces,
            np.cumsum(counts),
            known,
            self.problems,
        )


def _take_all(fragments: list[Any], column: int) -> npt.NDArray[Any]:
    """Return a column of all fragments in one, and have none of them keep it: there is not room for all of it twice."""
    found = np.empty(sum(each[column].size for each in fragments), fragments[0][column].dtype)
    place = 0
    for each in fragments:
        found[place : place + each[column].size] = each[column]
        place += each[column].size
        each[column] = None
    return found


def _link(entries: npt.NDArray[np.void], nlink: npt.NDArray[np.uint32]) -> None:
    """Have every further hard link of a file name the row of the first."""
    rows = np.flatnonzero((nlink > 1) & (entries["mode"] & 0o170000 != stat.S_IFDIR))
    if not rows.size:
        return
    order = rows[np.argsort(entries["inode"][rows], kind="stable")]
    inodes, kinds = entries["inode"][order], entries["mode"][order] & 0o170000
    begins = np.flatnonzero(np.append(True, (inodes[1:] != inodes[:-1]) | (kinds[1:] != kinds[:-1])))
    firsts = np.repeat(order[begins], np.diff(np.append(begins, order.size)))
    further = firsts != order
    entries["link"][order[further]] = firsts[further]


def attributes_of(place: int | bytes) -> dict[bytes, bytes]:
    """Return the extended attributes of an open file or, not followed, of a path."""
    try:
        names = os.listxattr(place) if isinstance(place, int) else os.listxattr(place, follow_symlinks=False)
        if not names:
            return {}
        follow = isinstance(place, int)
        return {os.fsencode(name): os.getxattr(place, name, follow_symlinks=follow) for name in names}
    except OSError:
        return {}  # a filesystem without any, or not ours to see


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _batches(listed: Iterator[os.DirEntry[str]], count: int) -> Iterator[list[os.DirEntry[str]]]:
    while some := list(itertools.islice(listed, count)):
        yield some


def wait_out(times: Rows) -> None:
    """Wait until nothing that changes from now on can have one of these times of change, in ns.

    What the clock has not come to by far is not waited for: it was set back, and a change has another time.
    """
    now = time.time_ns()
    near = times[np.abs(times - now) < _tick(times)]
    if near.size:
        time.sleep(max(0, int((near + _tick(near)).max()) - now) / 1e9)


def is_recent(changed: int) -> bool:
    """Tell whether what changed at that time, in ns, may change again and keep it."""
    times = np.array([changed])
    return bool((np.abs(times - time.time_ns()) < _tick(times)).any())


def _tick(times: Rows) -> Rows:
    """Return within which time of each of these another change may look like the same."""
    ticks: Rows = np.where(times % 10**9, _RECENT, _COARSE)
    return ticks
