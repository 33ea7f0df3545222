"""Exceptions as the parent is told of them."""

from __future__ import annotations

from typing import Any

from borg.helpers import Error
from borg.remote import RemoteRepository


def description(error: BaseException) -> dict[str, Any]:
    """Return the class, message and errno of an exception; of the one at the other end if it came from there."""
    kind, message = type(error).__qualname__, str(error)
    if isinstance(error, Error):
        message = error.get_message()
    elif isinstance(error, RemoteRepository.RPCError):
        kind, message = error.exception_class, error.get_message()
    return {"kind": kind, "message": message, "number": getattr(error, "errno", None)}
