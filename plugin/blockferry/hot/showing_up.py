"""A device that was armed is here: the hot restore onto it begins, or why it does not is noted for whoever looks."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
from collections.abc import Iterator
from typing import Any

from blockferry import service
from blockferry.errors import BlockferryError, NotNowError, PassphraseError, RepositoryError
from blockferry.hot import arming, client, daemon, udev
from blockferry.hot.arming import Armed, Match
from blockferry.hot.client import Request
from blockferry.programs import find

log = logging.getLogger(__name__)


def begin(armed: Armed) -> dict[str, Any]:
    """Begin the restore, in a process of its own or in systemd's unit; return its status as soon as the disk is there.

    Does nothing if it is under way. Raise BlockferryError, which is noted, if the device is refused.
    """
    if udev.systemd_starts_it():
        return _begin_by_systemd(armed)
    with _noted(armed.match):
        return client.start(request_for(armed))


def serve(match: Match) -> None:
    """Restore onto the device that is armed, in this process, until it is told to end.

    Raise NotNowError if it may go well later, another BlockferryError if not; both are noted.
    """
    armed = arming.load(match)
    if armed is None:
        raise BlockferryError(f"{match}: is not armed", remedy="`blockferry armed` lists what is.")
    with _noted(match):
        request = request_for(armed)
        log.warning("%s: %s is here: restoring snapshot %s onto it", match, request.target, armed.snapshot)
        try:
            daemon.serve(request)
        except BlockferryError as error:
            if may_pass(error):
                raise NotNowError(error.message, remedy=error.remedy) from None
            raise


def request_for(armed: Armed) -> Request:
    """Return what is to be done now that the device is here; raise BlockferryError if it is not, or not alone."""
    found = sorted(each.device_node for each in udev.devices_of(armed.match))
    if not found:
        raise BlockferryError(f"{armed.match}: no such device is here", remedy="Plug it in; see `udevadm info`.")
    if len(found) > 1:
        raise BlockferryError(
            f"{armed.match}: several devices are that: {', '.join(found)}",
            remedy="Arm one of them by another of its properties.",
        )
    return Request(
        name=armed.name,
        reference=armed.repository,
        snapshot=armed.snapshot,
        target=found[0],
        rate=armed.rate,
        mount=armed.mount,
    )


def may_pass(error: BlockferryError) -> bool:
    """Tell whether the same may go well later without anybody's doing."""
    return isinstance(error, (RepositoryError, NotNowError)) and not isinstance(error, PassphraseError)


@contextlib.contextmanager
def _noted(match: Match) -> Iterator[None]:
    """Note why what the context does fails."""
    try:
        yield
    except BlockferryError as error:
        arming.note(match, error.message)
        raise
    arming.note(match, "")


def _begin_by_systemd(armed: Armed) -> dict[str, Any]:
    """Have systemd start the unit; the unit itself notes why it fails."""
    unit = udev.UNIT_FILE.replace("@", f"@{armed.match}")
    command = [find("systemctl"), "start", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with contextlib.suppress(service.NobodyThereError):
        return client.ask(armed.name, {"do": "status"})
    now = arming.load(armed.match) or dataclasses.replace(armed, refused="")
    raise BlockferryError(now.refused or done.stderr.strip(), remedy=f"See: journalctl --unit={unit}")
