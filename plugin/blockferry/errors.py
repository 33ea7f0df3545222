"""What can go wrong, in the words a user is shown, each kind with its exit code.

Every error that reaches a user is one of these: a first line that says what and where, and a `remedy` that says
what to do. Anything else that escapes is a bug and is reported as one, without a traceback.
"""

from __future__ import annotations


class BlockferryError(Exception):
    """Something failed; nothing that looks complete was left behind. `remedy` says what the user can do."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(BlockferryError):
    """The command's words, or the configuration, are off."""

    exit_code = 2


class PartialError(BlockferryError):
    """The work was done except for parts that the message names."""

    exit_code = 3


class NotNowError(BlockferryError):
    """Somebody else holds what is needed (a lock, another backup): the same command may succeed later."""

    exit_code = 75


class VolumeError(BlockferryError):
    """A volume is missing, unreadable, too small, or changed under the backup."""


class TargetError(BlockferryError):
    """A restore target was refused: mounted, too small, or holding something."""


class UnstableVolumeError(VolumeError):
    """The volume is being written to and nothing can make it hold still."""


class ToolMissingError(BlockferryError):
    """A program or library that this needs is not installed."""


class RepositoryError(BlockferryError):
    """The repository's tool refused or failed."""


class RepositoryLockedError(RepositoryError, NotNowError):
    """Another process holds the repository's lock."""


class PassphraseError(RepositoryError):
    """The passphrase is wrong or missing."""


class SnapshotNotFoundError(BlockferryError):
    """No snapshot, or more than one, answers to the name."""


class DamagedSnapshotError(RepositoryError):
    """The repository's content is not what its own record says."""


class BaseUnusableError(RepositoryError):
    """An earlier snapshot cannot be taken over from: the same bytes have to be read and stored anew."""


class TrackerError(BlockferryError):
    """A tracker said that blocks are unchanged which are not."""


class EpochError(BlockferryError):
    """A backup of a shared volume is void: a host did not take part from its beginning to its end."""


class VerificationError(BlockferryError):
    """Bytes that should be equal are not."""


class LogError(BlockferryError):
    """A before-image log is void, torn or none, or cannot be written."""


class LogIndexError(BlockferryError):
    """The index that the hosts of a shared volume have in common does not answer, is full, or refuses."""


class EpochClosedError(LogIndexError):
    """No chunk can be claimed in this epoch: it is closed, or the index does not remember all of its claims."""
