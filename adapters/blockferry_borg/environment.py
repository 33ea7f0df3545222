"""What environment variables say: to borg, which gets all of them, and to us, of how to use it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from blockferry.errors import UsageError

LOCK_WAIT_VARIABLE = "BLOCKFERRY_LOCK_WAIT"
READ_PATIENCE_VARIABLE = "BLOCKFERRY_READ_PATIENCE"
CHECKPOINT_VARIABLE = "BLOCKFERRY_BORG_CHECKPOINT"
COMPRESSION_VARIABLE = "BLOCKFERRY_BORG_COMPRESSION"
UMASK_VARIABLE = "BLOCKFERRY_BORG_UMASK"
NAME_VARIABLE = "BLOCKFERRY_BORG_ARCHIVE_NAME"

_LONGEST_PASSPHRASE = 4096
"""Bytes: what every pipe holds."""


class BorgEnvironment:
    """The variables of one repository, with the passphrase behind BORG_PASSPHRASE_FD, which can be read only once."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Take variables, looked up when they are needed; raise UsageError if the passphrase cannot be read."""
        self.variables = variables
        self._secret: bytes | None = None
        number = variables.get("BORG_PASSPHRASE_FD")
        if number is not None:
            try:
                with os.fdopen(int(number), "rb", closefd=False) as opened:
                    self._secret = opened.read()
            except (ValueError, OSError) as error:
                raise UsageError(
                    f"BORG_PASSPHRASE_FD: {number!r} cannot be read: {error}",
                    remedy="Set it to the number of an open descriptor, or leave it unset.",
                ) from None

    def passphrase_pipe(self) -> int | None:
        """Return the read end of a new pipe with the passphrase, which the caller closes; None if there is none."""
        if self._secret is None:
            return None
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as filled:
            filled.write(self._secret[:_LONGEST_PASSPHRASE])
        return reading

    def for_process(self, more: Mapping[str, str], pipe: int | None) -> dict[str, str]:
        """Return the environment of a process of borg's, with `more`, which finds the passphrase in a pipe."""
        passphrase = {} if pipe is None else {"BORG_PASSPHRASE_FD": str(pipe)}
        return {**self.variables, **more, **passphrase}

    def lock_wait(self) -> int:
        """Return for how many seconds to wait for a repository's lock; UsageError if the variable holds no number."""
        return self._seconds(LOCK_WAIT_VARIABLE, "1")

    def read_patience(self) -> int:
        """Return for how many seconds a read may take: some chunks, over a slow line. UsageError likewise."""
        return self._seconds(READ_PATIENCE_VARIABLE, "300")

    def checkpoint_interval(self) -> int:
        """Return after how many seconds what is stored so far is made worth keeping; borg's own is half an hour."""
        text = self.variables.get(CHECKPOINT_VARIABLE, "1800")
        if not text.isdecimal():
            raise UsageError(
                f"{CHECKPOINT_VARIABLE}: {text!r} is not a number of seconds",
                remedy="Set it to a whole one, 0 for no checkpoints, or leave it unset.",
            )
        return int(text)

    def compression(self) -> str:
        """Return what `borg create --compression` is to take."""
        return self.variables.get(COMPRESSION_VARIABLE) or "lz4"

    def umask(self) -> str:
        """Return the umask of the files that borg makes in a repository, in octal digits; "" for borg's own."""
        text = self.variables.get(UMASK_VARIABLE, "")
        if text and not re.fullmatch(r"[0-7]{1,4}", text):
            raise UsageError(
                f"{UMASK_VARIABLE}: {text!r} is no umask", remedy="Set it to octal digits, as 0077, or leave it unset."
            )
        return text

    def _seconds(self, variable: str, default: str) -> int:
        text = self.variables.get(variable, default)
        try:
            return max(0, math.ceil(float(text)))
        except (ValueError, OverflowError):
            raise UsageError(
                f"{variable}: {text!r} is not a number of seconds", remedy="Set it to one, or leave it unset."
            ) from None
