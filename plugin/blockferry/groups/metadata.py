"""What a file is beside its content: owner, attributes, mode and times, set on what was made."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from blockferry.groups.table import FileTable, unpack_attributes

_NOBODY = (1 << 32) - 1
"""To chown(2) this says to leave the owner alone, which would be root."""
_OF_ROOT = ("security.", "trusted.")
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")

Fail = Callable[[int, OSError, str], None]
"""Told of a row, what failed, and a phrase that says where."""


class Facts(NamedTuple):
    """An entry's columns, as `table.ENTRY` has them; of a hard link those of its file, but for the directory."""

    parent: int
    mode: int
    uid: int
    gid: int
    flags: int
    link: int
    text: int
    attributes: int
    size: int
    mtime: int
    ctime: int
    inode: int
    rdev: int


class Metadata:
    """Sets what a table says of entries. What cannot be set is handed to `fail`, and the rest is set all the same."""

    def __init__(self, table: FileTable, fail: Fail) -> None:
        self.table = table
        self.fail = fail
        self.inherits = False
        """Whether anything that is made may get an ACL that it should not have, from a directory that was there."""
        self._privileged = os.geteuid() == 0
        self._mine = (os.geteuid(), os.getegid())

    def apply(self, target: int | str, row: int, facts: Facts) -> None:
        """Set owner, attributes, mode and times, in the order in which none undoes another: chown(2), chmod(2)."""
        mode = facts.mode & 0o7777
        if self._privileged:
            try:
                if _NOBODY in (facts.uid, facts.gid):
                    raise OSError(errno.EINVAL, "none that can be set")
                os.chown(target, facts.uid, facts.gid)
            except OSError as error:
                self.fail(row, error, "its owner: ")
                mode &= 0o1777
        elif (facts.uid, facts.gid) != self._mine:
            mode &= 0o1777  # setuid would give away ourselves
        if facts.attributes >= 0 or self.inherits:
            self._set_attributes(target, row, facts)
        if not stat.S_ISLNK(facts.mode):
            os.chmod(target, mode)  # noqa: PTH101  # most targets are descriptors
        os.utime(target, ns=(facts.mtime, facts.mtime))

    def _set_attributes(self, target: int | str, row: int, facts: Facts) -> None:
        wanted = unpack_attributes(self.table.texts[facts.attributes]) if facts.attributes >= 0 else {}
        if self.inherits:
            for name in _ACLS:
                with contextlib.suppress(OSError):
                    os.removexattr(target, name)
        for name, value in ((os.fsdecode(each), value) for each, value in wanted.items()):
            if not self._privileged and name.startswith(_OF_ROOT):
                continue  # like the owner
            try:
                os.setxattr(target, name, value)
            except OSError as error:
                self.fail(row, error, f"its attribute {name}: ")


def hands_down(directory: int) -> bool:
    """Tell whether what is made in a directory gets an ACL from it (acl(5))."""
    try:
        return bool(os.getxattr(directory, _ACLS[1]))
    except OSError:
        return False
