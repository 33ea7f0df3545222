"""The files of a group as columns: a row an entry, a directory before what is in it.

`docs/format.md` gives the stored form.

No Python object stands for a file: a million of them are some hundred bytes each. The table lies in the group's image
itself, as the last thing in it, and so is read and authenticated like everything else that a repository holds; what it
says is checked all the same before anybody follows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from blockferry.errors import DamagedSnapshotError

CHANGED = 1
"""An entry's flag: it changed while it was read, again and again; what is stored may be of different instants."""
UNREADABLE = 2
"""An entry's flag: its content could not be read, and is not stored."""
GONE = 4
"""An entry's flag: it was removed while the backup ran; there is nothing to restore."""
BESIDE = -1
"""The address of an extent that was read through the filesystem: inline, compressed, encrypted, or changing."""

ENTRY = np.dtype(
    [
        ("parent", "<i4"),  # the row of its directory; -1 for row 0, the group's root
        ("mode", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("flags", "<u4"),
        ("link", "<i4"),  # the row of the first entry that is a hard link of the same file, else -1
        ("text", "<i4"),  # a symbolic link's target: which of the texts; else -1
        ("attributes", "<i4"),  # extended attributes and ACLs: which of the texts; else -1
        ("size", "<i8"),
        ("mtime", "<i8"),  # ns since the epoch
        ("ctime", "<i8"),
        ("inode", "<u8"),
        ("rdev", "<u8"),
    ]
)
EXTENT = np.dtype(
    [
        ("logical", "<i8"),  # where in its file
        ("length", "<i8"),
        ("place", "<i8"),  # where in the group's image
        ("address", "<i8"),  # where on the volume, or BESIDE
    ]
)
_MAGIC = b"blockferry files 1\n"
_COUNTS = np.dtype([("entries", "<u8"), ("extents", "<u8"), ("texts", "<u8"), ("names", "<u8"), ("text_bytes", "<u8")])
_LARGEST = (1 << 62) - 1
"""Any two such numbers can be added."""
_LONGEST_VALUE = 64 << 10
"""Of an extended attribute (xattr(7))."""
_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class FileTable:
    """Entries, in an order in which each comes after its directory; of a file with content also its extents.

    A byte of a file that no extent has is zero. Of several hard links only the first has extents.
    """

    entries: npt.NDArray[np.void]
    """ENTRY, by row."""
    names: bytes
    """The last components of all paths, one after the other; row 0 has none."""
    name_ends: npt.NDArray[np.int64]
    """By row: where its name ends in `names`; it begins where that of the row before ends."""
    extents: npt.NDArray[np.void]
    """EXTENT, of one file after the other, in the order of rows and within a file of `logical`."""
    extent_ends: npt.NDArray[np.int64]
    """By row: where its extents end in `extents`."""
    texts: Sequence[bytes]
    """Symbolic links' targets and sets of extended attributes, each once."""

    def __len__(self) -> int:
        return int(self.entries.size)

    def name(self, row: int) -> bytes:
        """Return the last component of an entry's path."""
        return self.names[int(self.name_ends[row - 1]) if row else 0 : int(self.name_ends[row])]

    def names_of(self, rows: Rows) -> list[bytes]:
        """Return the last components of several entries' paths."""
        begins = np.where(rows > 0, self.name_ends[rows - 1], 0).tolist()
        return [self.names[begin:end] for begin, end in zip(begins, self.name_ends[rows].tolist(), strict=True)]

    def path(self, row: int) -> bytes:
        """Return an entry's path, relative to the group's root, whose own is empty."""
        parts: list[bytes] = []
        while row > 0:
            parts.append(self.name(row))
            row = int(self.entries["parent"][row])
        return b"/".join(reversed(parts))

    def paths(self) -> Iterator[bytes]:
        """Yield the path of every entry, by row."""
        directories: dict[int, bytes] = {0: b""}
        is_directory = (self.entries["mode"] & 0o170000) == stat.S_IFDIR
        for row, (parent, directory) in enumerate(
            zip(self.entries["parent"].tolist(), is_directory.tolist(), strict=True)
        ):
            above = directories.get(parent, b"")
            path = above + b"/" + self.name(row) if above else self.name(row)
            if directory:
                directories[row] = path
            yield path

    def extents_of(self, row: int) -> npt.NDArray[np.void]:
        """Return the extents of a file; a hard link has those of the first one."""
        link = int(self.entries["link"][row])
        row = row if link < 0 else link
        return self.extents[int(self.extent_ends[row - 1]) if row else 0 : int(self.extent_ends[row])]

    def attributes(self, row: int) -> dict[bytes, bytes]:
        """Return an entry's extended attributes; POSIX ACLs are among them, as the kernel has them."""
        number = int(self.entries["attributes"][row])
        return {} if number < 0 else unpack_attributes(self.texts[number])

    def target(self, row: int) -> bytes:
        """Return where a symbolic link leads."""
        return self.texts[int(self.entries["text"][row])]

    @property
    def gone(self) -> npt.NDArray[np.bool_]:
        """By row: whether it was removed during the backup, and is as if it had never been."""
        entries = self.entries
        found: npt.NDArray[np.bool_] = (entries["flags"] & GONE != 0) & (entries["mode"] & 0o170000 != stat.S_IFDIR)
        return found

    @property
    def stored_size(self) -> int:
        """How many bytes `to_bytes` returns: known before flags, sizes and places are."""
        return stored_size(
            len(self), int(self.extents.size), len(self.texts), len(self.names), sum(map(len, self.texts))
        )

    def to_bytes(self) -> bytearray:
        """Return the stored form: column after column, which is what compresses."""
        lengths = [len(text) for text in self.texts]
        counts = np.array([(len(self), self.extents.size, len(lengths), len(self.names), sum(lengths))], _COUNTS)
        columns = [counts, *(self.entries[name] for name in ENTRY.names or ())]
        columns += [self.extents[name] for name in EXTENT.names or ()]
        columns += [self.name_ends, self.extent_ends, np.cumsum(lengths, dtype="<i8")]
        # Filled in place: of a million files it is a hundred megabytes.
        stored, place = bytearray(self.stored_size), len(_MAGIC)
        stored[:place] = _MAGIC
        for column in columns:
            np.frombuffer(stored, column.dtype.newbyteorder("<"), column.size, place)[:] = column
            place += column.nbytes
        for text in (self.names, *self.texts):
            stored[place : place + len(text)] = text
            place += len(text)
        return stored

    @classmethod
    def from_bytes(cls, stored: bytes | memoryview, image_size: int, where: str) -> FileTable:
        """Return the table of the stored form, whatever follows it.

        Raise DamagedSnapshotError, naming `where`, if it is none.
        """
        try:
            table = cls._read(memoryview(stored))
            table._check(image_size)
            return table
        except (ValueError, IndexError, OverflowError) as error:
            raise DamagedSnapshotError(
                f"{where}: the table of its files cannot be read: {error}",
                remedy="Take another snapshot; check the repository with its own tool.",
            ) from None

    @classmethod
    def _read(cls, stored: memoryview) -> FileTable:
        """Cut the stored form into columns."""
        if bytes(stored[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("it is of no known version")
        counts = [int(count) for count in np.frombuffer(stored, _COUNTS, 1, len(_MAGIC))[0]]
        entries, extents, texts, names, text_bytes = counts
        if max(counts) > _LARGEST or stored_size(*counts) > len(stored):
            raise ValueError(f"it has {len(stored)} bytes, and says otherwise")
        place = len(_MAGIC) + _COUNTS.itemsize

        def column(dtype: npt.DTypeLike, count: int) -> npt.NDArray[np.generic]:
            nonlocal place
            found = np.frombuffer(stored, dtype, count, place)
            place += found.nbytes
            return found

        entry_columns, extent_columns = np.empty(entries, ENTRY), np.empty(extents, EXTENT)
        for into, count in ((entry_columns, entries), (extent_columns, extents)):
            for name in into.dtype.names or ():
                into[name] = column(into.dtype[name], count)
        name_ends, extent_ends, text_ends = (
            column("<i8", count).astype(np.int64) for count in (entries, entries, texts)
        )
        for ends, total in ((name_ends, names), (extent_ends, extents), (text_ends, text_bytes)):
            # Compared, not subtracted: a difference of any two numbers may wrap around.
            sorted_ends = not ends.size or (int(ends[0]) >= 0 and not bool((ends[1:] < ends[:-1]).any()))
            if not sorted_ends or (int(ends[-1]) if ends.size else 0) != total:
                raise ValueError("its columns do not fit each other")
        blob = bytes(stored[place + names : place + names + text_bytes])
        begins = [0, *text_ends.tolist()]
        return cls(
            entry_columns,
            bytes(stored[place : place + names]),
            name_ends,
            extent_columns,
            extent_ends,
            [blob[start:end] for start, end in itertools.pairwise(begins)],
        )

    def _check(self, image_size: int) -> None:
        """Raise ValueError if anything in it leads outside of it, of its file, or of the image."""
        entries, extents, rows = self.entries, self.extents, np.arange(len(self))
        kinds = entries["mode"] & 0o170000
        if not bool(np.isin(kinds, _KINDS).all()) or bool((entries["mode"] > 0o177777).any()):
            raise ValueError("an entry is of no known kind")
        if not len(self) or kinds[0] != stat.S_IFDIR or entries["parent"][0] != -1 or self.name_ends[0] != 0:
            raise ValueError("it has no root")
        parents = entries["parent"][1:]
        if (
            bool((parents < 0).any())
            or bool((parents >= rows[1:]).any())
            or bool((kinds[parents] != stat.S_IFDIR).any())
        ):
            raise ValueError("an entry is in no directory")
        for column in ("text", "attributes"):
            if bool((entries[column] >= len(self.texts)).any()) or bool((entries[column] < -1).any()):
                raise ValueError("an entry's text is missing")
        is_link, missed = kinds == stat.S_IFLNK, entries["flags"] & (GONE | UNREADABLE) != 0
        if bool((is_link & (entries["text"] < 0) & ~missed).any()) or bool((~is_link & (entries["text"] >= 0)).any()):
            raise ValueError("a symbolic link leads nowhere")
        if any(not self.texts[number] for number in np.unique(entries["text"][entries["text"] >= 0]).tolist()):
            raise ValueError("a symbolic link leads nowhere")
        if bool((entries["size"] < 0).any()) or bool((entries["size"] > _LARGEST).any()):
            raise ValueError("a size is out of bounds")
        self._check_links(kinds)
        self._check_names()
        self._check_texts()
        self._check_extents(extents, image_size)

    def _check_links(self, kinds: npt.NDArray[np.integer[Any]]) -> None:
        """Raise ValueError unless each hard link is of an entry before it, of its kind and no link itself."""
        links = self.entries["link"]
        linked = np.flatnonzero(links != -1)
        if bool((links[linked] < 0).any()) or bool((links[linked] >= linked).any()):
            raise ValueError("a hard link is of nothing")
        if bool((kinds[links[linked]] != kinds[linked]).any()) or bool((links[links[linked]] != -1).any()):
            raise ValueError("a hard link is of something else")
        if bool((kinds[linked] == stat.S_IFDIR).any()):
            raise ValueError("a directory is a hard link")

    def _check_names(self) -> None:
        """Raise ValueError if a name could lead out of its directory."""
        lengths = np.diff(self.name_ends)
        if bool((lengths < 1).any()) or bool((lengths > 255).any()) or b"/" in self.names or b"\0" in self.names:
            raise ValueError("a name is none")
        starts = self.name_ends[:-1]
        dots = np.append(np.frombuffer(self.names, np.uint8) == ord("."), False)
        if bool(dots[starts][lengths == 1].any()) or bool((dots[starts] & dots[starts + 1])[lengths == 2].any()):
            raise ValueError("a name leads elsewhere")

    def _check_texts(self) -> None:
        """Raise ValueError if a symbolic link's target or a set of extended attributes cannot be one."""
        for number in np.unique(self.entries["text"]).tolist():
            if number >= 0 and b"\0" in self.texts[number]:
                raise ValueError("a symbolic link has no possible target")
        for number in np.unique(self.entries["attributes"]).tolist():
            for name, value in (unpack_attributes(self.texts[number]) if number >= 0 else {}).items():
                if len(name) > 255 or len(value) > _LONGEST_VALUE:
                    raise ValueError("an extended attribute is too long")

    def _check_extents(self, extents: npt.NDArray[np.void], image_size: int) -> None:
        """Raise ValueError unless the extents are sorted, disjoint, and within their file and the image."""
        if not extents.size:
            return
        counts = np.diff(self.extent_ends, prepend=0)
        owners = np.repeat(np.arange(len(self)), counts)
        if bool((self.entries["mode"][owners] & 0o170000 != stat.S_IFREG).any()) or bool(
            (self.entries["link"][owners] != -1).any()
        ):
            raise ValueError("what is no file has content")
        for column in ("logical", "place", "length"):
            if bool((extents[column] < 0).any()) or bool((extents[column] > _LARGEST).any()):
                raise ValueError("an extent is out of bounds")
        ends = extents["logical"] + extents["length"]
        same_file = owners[1:] == owners[:-1]
        if bool((extents["length"] == 0).any()) or bool((ends > self.entries["size"][owners]).any()):
            raise ValueError("an extent is not in its file")
        if bool((extents["logical"][1:] < ends[:-1])[same_file].any()):
            raise ValueError("the extents of a file overlap")
        if bool((extents["place"] + extents["length"] > image_size).any()):
            raise ValueError("an extent is not in the image")


def stored_size(entries: int, extents: int, texts: int, names: int, text_bytes: int) -> int:
    """Return the length of the stored form of a table with these counts."""
    columns = entries * (ENTRY.itemsize + 16) + extents * EXTENT.itemsize + texts * 8
    return len(_MAGIC) + _COUNTS.itemsize + columns + names + text_bytes


def pack_attributes(attributes: dict[bytes, bytes]) -> bytes:
    """Return extended attributes as a text: name, NUL, length of the value (u32 LE), value; sorted by name."""
    return b"".join(
        name + b"\0" + len(value).to_bytes(4, "little") + value for name, value in sorted(attributes.items())
    )


def unpack_attributes(text: bytes) -> dict[bytes, bytes]:
    """Return the attributes in a text; ValueError if it is cut off."""
    found: dict[bytes, bytes] = {}
    while text:
        name, _, rest = text.partition(b"\0")
        length = int.from_bytes(rest[:4], "little")
        if not name or len(rest) < 4 + length:
            raise ValueError("a set of extended attributes is cut off")
        found[name], text = rest[4 : 4 + length], rest[4 + length :]
    return found
