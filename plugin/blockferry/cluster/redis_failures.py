"""What can go wrong with a Redis: in words, and what to do."""

from __future__ import annotations

from redis import exceptions

from blockferry.cluster.index import PATIENCE

Reason = tuple[str, str]
"""What the index does or is, and what the user can do."""

IS_LOADING = ("is still reading what it had saved", "Wait until it is up, then try again.")
IS_REPLICA = ("is a replica, which takes nothing", "Name the server that it is a replica of.")
IS_SILENT = (
    f"did not answer within {PATIENCE:g} seconds",
    "See whether the server runs, and how busy it and the network are.",
)
IS_FULL = ("is full", "Raise `maxmemory` in redis.conf, or remove what earlier backups left there.")
CANNOT_SAVE = (
    "takes nothing: it cannot save to its disk",
    'See to that disk, or set `save ""` in redis.conf: the index need not be saved.',
)
REFUSES_US = (
    "does not let us in: the user name or the password is wrong or missing",
    "Check BLOCKFERRY_INDEX_PASSWORD_COMMAND or BLOCKFERRY_INDEX_PASSWORD, and the user name in the address.",
)

_BY_KIND: tuple[tuple[type[Exception], Reason], ...] = (
    (exceptions.TimeoutError, IS_SILENT),
    (TimeoutError, IS_SILENT),
    (exceptions.AuthenticationError, REFUSES_US),
    (exceptions.AuthenticationWrongNumberOfArgsError, REFUSES_US),
    (exceptions.BusyLoadingError, IS_LOADING),
    (exceptions.ReadOnlyError, IS_REPLICA),
)
_BY_TEXT = (
    # Redis 6 wraps the error of a command that a script calls in one of another kind.
    ("not allowed when used memory", IS_FULL),
    ("MISCONF", CANNOT_SAVE),
)


def reason(error: Exception, password: str, *, tls: bool) -> Reason:
    """Return what an error of redis-py or of the system means, without the password."""
    text = str(error).strip() or type(error).__name__
    if password:
        text = text.replace(password, "***")
    for kind, known in _BY_KIND:
        if isinstance(error, kind):
            return known
    for sign, known in _BY_TEXT:
        if sign in text:
            return known
    if isinstance(error, exceptions.NoPermissionError):
        return (
            f"does not allow that to this user: {text}",
            "Give the user the commands and the key pattern that the page on the shared index names.",
        )
    if isinstance(error, (exceptions.ConnectionError, OSError)):
        return _not_reached(text, tls)
    return f"failed: {text}", "Look at the server's log."


def _not_reached(text: str, tls: bool) -> Reason:
    if "CERTIFICATE" in text:
        return (
            f"cannot be trusted, or does not trust us: {text}",
            "Check ca=, cert= and key= in its address, and the name in the server's certificate.",
        )
    # A server that wants a certificate and gets none may say so, or just hang up.
    more = " With TLS: whether it wants a certificate (cert=, key=)." if tls else ""
    return f"cannot be reached: {text}", f"See whether the server runs and the address is right.{more}"
