"""What borg says went wrong, in our words: what, where, and what to do about it.

Borg's errors are classes; their names are the keys here (borg, "Internals: Frontends", message ids). They arrive
from the worker, from a borg at the other end of an ssh connection, or as `msgid` in the JSON log of a command.
"""

from __future__ import annotations

import errno
import re

from blockferry.errors import (
    BaseUnusableError,
    BlockferryError,
    DamagedSnapshotError,
    PassphraseError,
    RepositoryError,
    RepositoryLockedError,
    SnapshotNotFoundError,
    UsageError,
)

_CHECK = "Run `borg check` on the repository; `borg check --repair` keeps what can be kept."
_ROOM = "Free space there: delete snapshots, then run `borg compact`; or give the repository more room."
_KEY = "Import the key that `borg key export` saved, or set BORG_KEYS_DIR or BORG_KEY_FILE to where it is."
_UNLOCK = "Set BORG_PASSPHRASE, BORG_PASSCOMMAND or BORG_PASSPHRASE_FD to the repository's passphrase."
_ACCESS = (
    "Borg asks, and there is nobody to answer: if it is the repository that you mean, run `borg info` on it once, or "
    "set BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes (a repository that is new to this host and not encrypted) or "
    "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes (one that has moved)."
)

_KNOWN: dict[str, tuple[type[BlockferryError], str]] = {
    "LockTimeout": (RepositoryLockedError, "Another borg is using it: wait, or set BLOCKFERRY_LOCK_WAIT (seconds)."),
    "LockFailed": (RepositoryError, "The lock cannot be made: is the repository writable for this user?"),
    "Repository.DoesNotExist": (RepositoryError, "Check the reference; `borg init` makes a repository."),
    "Repository.InvalidRepository": (RepositoryError, "Check the reference; `borg init` makes a repository."),
    "Repository.InvalidRepositoryConfig": (RepositoryError, _CHECK),
    "Repository.AtticRepository": (RepositoryError, "Run `borg upgrade` on it."),
    "Repository.CheckNeeded": (RepositoryError, _CHECK),
    "Repository.InsufficientFreeSpaceError": (RepositoryError, _ROOM),
    "Repository.StorageQuotaExceeded": (RepositoryError, _ROOM),
    "Repository.ObjectNotFound": (DamagedSnapshotError, f"It is damaged, or was deleted meanwhile. {_CHECK}"),
    "Repository.PathPermissionDenied": (RepositoryError, "Run as the user who owns the repository."),
    "PermissionError": (RepositoryError, "Run as the user who owns the repository."),
    "NoManifestError": (RepositoryError, _CHECK),
    "PassphraseWrong": (PassphraseError, _UNLOCK),
    "NoPassphraseFailure": (PassphraseError, _UNLOCK),
    "PasscommandFailure": (PassphraseError, "Run the command in BORG_PASSCOMMAND by hand and see what it says."),
    "PasswordRetriesExceeded": (PassphraseError, _UNLOCK),
    "KeyfileNotFoundError": (PassphraseError, _KEY),
    "KeyfileMismatchError": (PassphraseError, _KEY),
    "KeyfileInvalidError": (PassphraseError, _KEY),
    "RepoKeyNotFoundError": (PassphraseError, _KEY),
    "Cache.CacheInitAbortedError": (RepositoryError, _ACCESS),
    "Cache.RepositoryAccessAborted": (RepositoryError, _ACCESS),
    "Cache.EncryptionMethodMismatch": (RepositoryError, "Somebody may have put another repository in its place."),
    "Cache.RepositoryReplay": (RepositoryError, "The repository is older than what this host saw: was it restored?"),
    "Cache.RepositoryIDNotUnique": (RepositoryError, "Two repositories have one id: one is a copy of the other."),
    "ConnectionClosed": (RepositoryError, "Try `borg info` on it: does ssh log in, is borg installed over there?"),
    "ConnectionClosedWithHint": (
        RepositoryError,
        "Try `borg info` on it: does ssh log in, is borg installed over there? BORG_REMOTE_PATH can name it.",
    ),
    "PathNotAllowed": (RepositoryError, "The server restricts this key to other paths (borg serve)."),
    "MandatoryFeatureUnsupported": (RepositoryError, "Use a newer borg."),
    "UnsupportedPayloadError": (RepositoryError, "Use a newer borg."),
    "IntegrityError": (DamagedSnapshotError, _CHECK),
    "DecompressionError": (DamagedSnapshotError, _CHECK),
    "FileIntegrityError": (RepositoryError, "Delete borg's cache of it (`borg delete --cache-only`) and try again."),
    "ManifestAuthenticationError": (DamagedSnapshotError, _CHECK),
    "TAMRequiredError": (RepositoryError, "It is unauthenticated: see `borg upgrade --tam` and borg's change log."),
    "ArchiveTAMRequiredError": (RepositoryError, "See `borg check --repair` and borg's change log (1.2.5)."),
    "TAMInvalid": (DamagedSnapshotError, _CHECK),
    "ArchiveTAMInvalid": (DamagedSnapshotError, _CHECK),
    "Archive.DoesNotExist": (SnapshotNotFoundError, "`blockferry snapshots` lists what is there."),
    "DamagedError": (DamagedSnapshotError, "Restore what is left of it with `borg extract`, or take another snapshot."),
    "CompressionError": (UsageError, "Set BLOCKFERRY_BORG_COMPRESSION as `borg create --compression` takes it."),
    "LocationError": (UsageError, "Write borg:PATH, borg:ssh://USER@HOST/PATH or borg:USER@HOST:PATH."),
}


def failure(where: str, kind: str, message: str, number: int | None = None) -> BlockferryError:
    """Return the error for what borg calls `kind` (a class name) and says in `message`; `where` names the repository.

    `number` is the errno of an OSError.
    """
    first = without_credentials(next(iter(message.strip().splitlines()), "") or kind)
    if number == errno.ENOSPC or "[Errno 28]" in message:
        return RepositoryError(f"{where}: no space left: {first}", remedy=_ROOM)
    if kind == "BaseUnusableError":
        return BaseUnusableError(f"{where}: the base {first}")
    if "but matched 0" in first:  # what borg 2 says of an archive that is not there
        kind = "Archive.DoesNotExist"
    # A remote borg names nested classes without the class around them.
    known = _KNOWN.get(kind) or next((found for name, found in _KNOWN.items() if name.endswith(f".{kind}")), None)
    error, remedy = known or (RepositoryError, "Try the same with borg itself (borg info, borg check).")
    if known is None and kind not in first:
        first = f"{kind}: {first}"
    return error(f"{where}: {first}", remedy=remedy)


def without_credentials(text: str) -> str:
    """Return a text in which a URL's password is not shown."""
    return re.sub(r"(\w+://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)
